"""Files of finished tickets: the same bits through every format, and a sentence for every file that does not fit."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import sparsekit as sk
from sparsekit.__main__ import main
from sparsekit.export import describe, export_file, read_portable, save_dense, save_prune, to_prune
from sparsekit.files import read_tensors, write_tensors
from sparsekit.nn import SparseModule, dense_state


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 24), nn.Linear(24, 5)
    )
    model[1].running_mean.normal_()
    return model


X = torch.randn(6, 2, 6, 6, generator=torch.Generator().manual_seed(1))


def sparse(model=None, impl="csr", sparsity=0.8, **how) -> nn.Module:
    model = net() if model is None else model
    return sk.convert(model, sk.prune(model, sparsity, **how), impl=impl)


def assert_equal(got, want):
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].dtype == want[name].dtype and torch.equal(got[name], want[name]), name


@pytest.mark.parametrize("saved", ["csr", "dense", "auto"])
@pytest.mark.parametrize("loaded", ["csr", "dense", "auto"])
def test_a_ticket_moves_between_formats_bit_for_bit(tmp_path, saved, loaded):
    ticket, target = sparse(impl=saved), net(seed=7)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    assert sk.save(ticket, tmp_path / "t.safetensors", recipe={"rounds": 3}) == tmp_path / "t.safetensors"
    got = sk.load(tmp_path / "t.safetensors", target, example_inputs=X, impl=loaded)
    assert_equal(dense_state(got), dense_state(ticket))
    assert_equal(sk.masks_of(got), sk.masks_of(ticket))
    assert_equal(target.state_dict(), before)  # the model is left alone
    if loaded != "auto":
        assert {m.format.name for m in got.modules() if isinstance(m, SparseModule)} == {loaded}
    torch.testing.assert_close(got.eval()(X), ticket.eval()(X), rtol=1e-5, atol=1e-5)
    assert read_portable(tmp_path / "t.safetensors")[2]["recipe"] == {"rounds": 3}


def test_channels_travel_as_compact(tmp_path):
    ticket = sparse(impl="compact", sparsity=0.5, pattern="channel", scope="layer")
    sk.save(ticket, tmp_path / "t")
    got = sk.load(tmp_path / "t", net(seed=7), impl="compact")
    assert_equal(dense_state(got), dense_state(ticket))


def test_a_loaded_ticket_trains_and_stays_pruned(tmp_path):
    sk.save(sparse(), tmp_path / "t")
    ticket = sk.load(tmp_path / "t", net(seed=7), example_inputs=X, training=True)
    masks, before = sk.masks_of(ticket), dense_state(ticket)
    optimizer = torch.optim.AdamW(ticket.parameters(), lr=0.1, weight_decay=0.1)
    ticket(X).square().mean().backward()
    optimizer.step()
    after = dense_state(ticket)
    for name, mask in masks.items():
        assert not after[name][~mask].any() and not torch.equal(after[name], before[name])


def test_dense_models_can_be_saved_too(tmp_path):
    model = net()
    sk.save(model, tmp_path / "t")
    got = sk.load(tmp_path / "t", net(seed=7))
    assert_equal(got.state_dict(), model.state_dict())
    assert not any(isinstance(m, SparseModule) for m in got.modules())


def test_a_converted_model_may_be_the_target(tmp_path):
    ticket = sparse()
    sk.save(ticket, tmp_path / "t")
    assert_equal(
        dense_state(sk.load(tmp_path / "t", sparse(net(seed=7), sparsity=0.3), impl="csr")), dense_state(ticket)
    )


def test_a_layer_may_be_the_whole_model(tmp_path):
    layer = nn.Linear(8, 4)
    ticket = sk.convert(layer, sk.prune(layer, 0.5), impl="csr")
    sk.save(ticket, tmp_path / "t")
    assert_equal(dense_state(sk.load(tmp_path / "t", nn.Linear(8, 4), impl="csr")), dense_state(ticket))


def test_other_dtypes_keep_theirs(tmp_path):
    ticket = sparse(net().double())
    sk.save(ticket, tmp_path / "t")
    assert_equal(dense_state(sk.load(tmp_path / "t", net(seed=7).double(), impl="csr")), dense_state(ticket))


def test_the_file_holds_survivors_and_bits_only(tmp_path):
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256))
    ticket = sparse(model, sparsity=0.9)
    sk.save(ticket, tmp_path / "packed")
    save_dense(dense_state(ticket), tmp_path / "dense")
    weights, header = 2 * 256 * 256, 1500
    survivors = round(0.1 * weights)
    assert (tmp_path / "packed").stat().st_size <= 4 * survivors + weights // 8 + 4 * 512 + header
    assert (tmp_path / "packed").stat().st_size < 0.15 * (tmp_path / "dense").stat().st_size


@pytest.mark.parametrize(("density", "share"), [(0.5, 0.55), (0.2, 0.24), (0.1, 0.125), (0.02, 0.03)])
def test_a_file_is_as_small_as_its_density_and_a_few_bits(tmp_path, density, share):
    model = nn.Sequential(nn.Conv2d(64, 64, 3), nn.Linear(512, 512))
    sk.save(sparse(model, sparsity=1 - density, scope="layer"), tmp_path / "t")
    save_dense(model.state_dict(), tmp_path / "d")
    assert (tmp_path / "t").stat().st_size < share * (tmp_path / "d").stat().st_size


def test_the_formats_of_a_file_are_taken_without_measuring(tmp_path):
    model = net()
    ticket = sk.convert(model, sk.prune(model, 0.8), impl={"0": "csr", "4": "dense", "5": "csr"})
    sk.save(ticket, tmp_path / "t")
    got = sk.load(tmp_path / "t", net(seed=7), impl="saved")
    layers = [m for m in got.modules() if isinstance(m, SparseModule)]
    assert [m.format.name for m in layers] == ["csr", "dense", "csr"] and all(m.plan.forced for m in layers)
    assert_equal(dense_state(got), dense_state(ticket))


@pytest.mark.parametrize(
    ("saved", "why"),
    [
        ("panel", r"'panel' cannot run it on cpu: "),
        ("os.system", r"got 'os.system', which is no format of this version"),
        (["csr"], r"got \['csr'\], which is no format"),
        (None, "the file names none"),
    ],
)
def test_a_format_that_cannot_run_here_is_planned_anew_and_said(tmp_path, saved, why):
    sk.save(sparse(), tmp_path / "t")
    tensors, header = read_tensors(tmp_path / "t")
    header["weights"]["4.weight"]["format"] = saved
    write_tensors(tmp_path / "t", tensors, header)
    with pytest.warns(UserWarning, match=rf"4\.weight: Expected the format it was saved in, {why}.*planned anew"):
        got = sk.load(tmp_path / "t", net(seed=7), impl="saved")
    assert got[0].format.name == "csr" and not got[4].plan.forced
    assert_equal(dense_state(got), dense_state(sparse()))


def test_what_a_later_version_wrote_is_kept(tmp_path):
    sk.save(sparse(), tmp_path / "t", recipe={"rounds": 3})
    tensors, header = read_tensors(tmp_path / "t")
    header["later"], header["weights"]["4.weight"]["scale"] = {"a": [1]}, 0.5
    write_tensors(tmp_path / "t", tensors, header)
    export_file(tmp_path / "t", "packed", tmp_path / "again")
    assert (tmp_path / "t").read_bytes() == (tmp_path / "again").read_bytes()
    assert_equal(dense_state(sk.load(tmp_path / "again", net(seed=7), impl="saved")), dense_state(sparse()))


# As torch.nn.utils.prune has it


def test_a_ticket_under_torch_prune_and_back():
    ticket = sparse()
    pruned = to_prune(ticket)
    assert torch.nn.utils.prune.is_pruned(pruned)
    assert {"0.weight_orig", "0.weight_mask"} <= pruned.state_dict().keys()
    torch.testing.assert_close(pruned.eval()(X), ticket.eval()(X), rtol=1e-5, atol=1e-5)
    assert_equal(dense_state(sk.convert(pruned, impl="csr")), dense_state(ticket))


def test_a_file_of_torch_prune_s_keys_and_back(tmp_path):
    ticket = sparse()
    sk.save(ticket, tmp_path / "t")
    export_file(tmp_path / "t", "prune", tmp_path / "p")
    pruned = to_prune(sparse(net(seed=7), sparsity=0.3))
    pruned.load_state_dict(load_file(tmp_path / "p"))
    assert_equal(dense_state(sk.convert(pruned, impl="csr")), dense_state(ticket))
    assert_equal(dense_state(sk.load(tmp_path / "p", net(seed=7), impl="csr")), dense_state(ticket))
    got = read_portable(export_file(tmp_path / "p", "packed", tmp_path / "again"))
    assert_equal(got[0], dense_state(ticket))
    assert_equal(got[1], sk.masks_of(ticket))


def test_weights_that_torch_prune_left_under_a_mask_are_zero(tmp_path):
    mask = torch.tensor([[True, False]])
    save_prune({"fc.weight": torch.ones(1, 2)}, {"fc.weight": mask}, tmp_path / "p")
    assert read_portable(tmp_path / "p")[0]["fc.weight"].tolist() == [[1, 0]]
    write_tensors(tmp_path / "q", {"fc.weight_orig": torch.ones(1, 2), "fc.weight_mask": torch.ones(2)})
    with pytest.raises(ValueError, match=r"q: fc\.weight: Expected a mask of shape \[1, 2\], got \[2\]"):
        read_portable(tmp_path / "q")


# What a file holds


def test_info_names_every_weight_of_a_file(tmp_path, capsys):
    model = net()
    masks = sk.prune(model, 0.9, scope="layer") | {
        "5.weight": torch.tensor([True, False, True, True, False])[:, None] * torch.ones(24, dtype=torch.bool)
    }
    sk.save(sk.convert(model, masks, impl="csr"), tmp_path / "t", recipe={"rounds": 3})
    facts = describe(tmp_path / "t")
    rows = {row["name"]: row for row in facts["tensors"]}
    assert list(rows) == list(read_portable(tmp_path / "t")[0]) and facts["recipe"] == {"rounds": 3}
    linear = rows["4.weight"]
    assert (linear["shape"], linear["dtype"], linear["format"]) == ([24, 128], "float32", "csr")
    assert (linear["pattern"], linear["coding"], linear["dense_bytes"]) == ("unstructured", "elias-fano", 4 * 24 * 128)
    assert linear["density"] == pytest.approx(0.1, abs=1e-3) and 0.1 < linear["bytes"] / linear["dense_bytes"] < 0.12
    assert rows["5.weight"]["pattern"] == "channel" and rows["5.weight"]["bytes"] == 3 * 24 * 4 + 1
    assert facts["share"] == sum(r["bytes"] for r in facts["tensors"]) / sum(r["dense_bytes"] for r in facts["tensors"])
    assert main(["info", str(tmp_path / "t")]) == 0
    text = capsys.readouterr().out
    assert "4.weight  24x128" in text and "elias-fano" in text and "sparsekit file, version 2" in text
    assert main(["info", "--json", str(tmp_path / "t")]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(facts))


def test_info_reads_plain_files_and_refuses_others(tmp_path, capsys):
    save_dense(net().state_dict(), tmp_path / "d")
    assert main(["info", str(tmp_path / "d")]) == 0
    assert "plain safetensors" in capsys.readouterr().out
    (tmp_path / "x").write_text("{}")
    assert main(["info", str(tmp_path / "x")]) == 2
    assert "x: Expected a whole safetensors file" in capsys.readouterr().err
    assert main(["info", str(tmp_path)]) == 2
    assert f"{tmp_path}: Expected a sparsekit file, got a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (lambda: nn.Sequential(*net()[:5], nn.Linear(24, 6)), r"Expected 5\.weight of shape \[6, 24\].* got \[5, 24\]"),
        (lambda: net()[:5], r"Expected the tensors of this model, got 5\.bias, 5\.weight as well"),
        (lambda: net().append(nn.Linear(5, 5)), r"Expected 6\.weight of shape \[5, 5\].* got none"),
        (lambda: nn.ReLU(), r"Expected the tensors of this model, got 0\.weight, "),
    ],
)
def test_another_model_is_refused_by_key_and_shapes(tmp_path, model, why):
    sk.save(sparse(), tmp_path / "t.safetensors")
    with pytest.raises(ValueError, match=rf"t\.safetensors: {why}"):
        sk.load(tmp_path / "t.safetensors", model())


def test_damaged_masks_are_noticed(tmp_path):
    sk.save(sparse(), tmp_path / "t")
    tensors, header = read_tensors(tmp_path / "t")
    bits = tensors["4.weight#mask"]
    moved = int((bits == 1).nonzero()[0])  # a byte with one survivor: let it be another
    bits[moved] = 2
    write_tensors(tmp_path / "t", tensors, header)
    with pytest.raises(ValueError, match=r"t: .*digest in the header.*damaged"):
        sk.load(tmp_path / "t", net())


def test_torn_plain_and_missing_files_are_refused(tmp_path):
    sk.save(sparse(), tmp_path / "t")
    (tmp_path / "t").write_bytes((tmp_path / "t").read_bytes()[:-10])
    with pytest.raises(ValueError, match="t: Expected a whole safetensors file"):
        sk.load(tmp_path / "t", net())
    save_dense(net().state_dict(), tmp_path / "d")
    with pytest.raises(ValueError, match="d: Expected a file that sparsekit wrote or weight_orig and weight_mask"):
        sk.load(tmp_path / "d", net())
    with pytest.raises(FileNotFoundError, match="gone"):
        sk.load(tmp_path / "gone", net())


def test_a_recipe_that_is_no_json_leaves_no_file(tmp_path):
    with pytest.raises(TypeError):
        sk.save(sparse(), tmp_path / "t", recipe={"x": object()})
    assert not list(tmp_path.iterdir())


# From runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two rounds and the state each ended in."""
    folder, states = tmp_path_factory.mktemp("run"), []
    for round_ in sk.tickets(net(), 2, 0.5, run_dir=folder, impl="csr", note={"data": "made"}):
        optimizer = torch.optim.SGD(round_.model.parameters(), lr=0.1)
        round_.model(X).square().mean().backward()
        optimizer.step()
        states.append(dense_state(round_.model))
    return folder, states


def test_a_run_exports_its_last_round(finished, tmp_path):
    run, states = finished
    out = export_file(run, "packed", tmp_path / "new" / "t.safetensors")
    assert out == tmp_path / "new" / "t.safetensors"
    assert_equal(dense_state(sk.load(out, net(seed=7))), states[2])
    recipe = read_portable(out)[2]["recipe"]
    assert recipe["round"] == 2 and recipe["config"]["data"] == "made"


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_run_exports_any_round_dense(finished, tmp_path, number):
    run, states = finished
    export_file(run, "dense", tmp_path / "d.safetensors", number)
    state = load_file(tmp_path / "d.safetensors")
    assert_equal(state, states[number])
    model = net(seed=7)
    model.load_state_dict(state)  # the plain torch model, its own keys


def test_a_round_s_own_file_is_a_packed_file(finished):
    run, states = finished
    got = sk.load(run / "round_01" / "trained.safetensors", net(seed=7))
    assert_equal(dense_state(got), states[1])


def test_packed_files_export_to_dense_and_packed(finished, tmp_path):
    run, states = finished
    packed = export_file(run, "packed", tmp_path / "a")
    again = export_file(packed, "packed", tmp_path / "b")
    assert packed.read_bytes() == again.read_bytes()
    assert_equal(load_file(export_file(packed, "dense", tmp_path / "c")), states[2])


def test_rounds_beyond_ninety_nine_are_in_order(finished, tmp_path):
    run, _ = finished
    copy = tmp_path / "run"
    for number in (9, 99, 100):
        folder = copy / f"round_{number:02d}"
        folder.mkdir(parents=True)
        (folder / "result.json").write_text("{}")
        (folder / "trained.safetensors").write_bytes((run / "round_02" / "trained.safetensors").read_bytes())
    (copy / "round_table").mkdir()
    (copy / "round_table" / "result.json").write_text("{}")
    (copy / "config.json").write_text(json.dumps({}))
    assert read_portable(export_file(copy, "packed", tmp_path / "o"))[2]["recipe"]["round"] == 100


@pytest.mark.parametrize(
    ("source", "to", "number", "error", "why"),
    [
        ("run", "tar", None, ValueError, "Expected to= one of packed, dense, .* got .tar."),
        ("run", "dense", 7, FileNotFoundError, "Expected a finished round of 0, 1, 2, got 7"),
        ("run", "dense", -1, FileNotFoundError, "got -1"),
        ("file", "dense", 1, ValueError, "Expected a run directory with --round, got a file"),
        ("empty", "dense", None, FileNotFoundError, "Expected a run with a finished round, got none"),
        ("gone", "dense", None, FileNotFoundError, "gone: Expected a sparsekit file"),
    ],
)
def test_exports_that_cannot_be(finished, tmp_path, source, to, number, error, why):
    (tmp_path / "empty").mkdir()
    sk.save(net(), tmp_path / "file")
    with pytest.raises(error, match=why):
        export_file(finished[0] if source == "run" else tmp_path / source, to, tmp_path / "new" / "out", number)
    assert not (tmp_path / "new").exists()


def test_a_failed_export_leaves_the_old_file(finished, tmp_path, monkeypatch):
    out = export_file(finished[0], "dense", tmp_path / "d", 0)
    before = out.read_bytes()

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sparsekit.files.save_file", fail)
    with pytest.raises(OSError, match="No space"):
        export_file(finished[0], "dense", tmp_path / "d", 2)
    assert out.read_bytes() == before and list(tmp_path.iterdir()) == [out]

"""Files of finished tickets: the same bits through every format, and a sentence for every file that does not fit."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import sparsekit as sk
from sparsekit.export import export_file, read_portable, save_dense
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

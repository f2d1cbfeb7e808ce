"""Run directories: a killed search goes on to the same bits, and nothing foreign is touched."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ticket_nets import assert_equal, mlp, net, run, search, train
from torch import nn

import sparsekit as sk
from sparsekit import files
from sparsekit.nn import SparseModule, dense_state
from sparsekit.ticket import store

WORKER = Path(__file__).with_name("ticket_worker.py")
pytestmark = pytest.mark.usefixtures("one_thread")


# Going on


def worker(tmp_path, name, die="", cache=None, impl="auto", rewind="4it"):
    """Run a search in a process of its own; ``die`` says where it is killed."""
    env = os.environ | {"SPARSEKIT_CACHE": str(cache or tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(WORKER), str(tmp_path / name), die, impl, rewind], env=env, capture_output=True, text=True
    )
    assert done.returncode == (-signal.SIGKILL if die else 0), done.stderr
    return done.stdout.split()


def results(folder: Path) -> dict[str, dict]:
    found = {}
    for path in sorted(folder.glob("**/*.safetensors")):
        found[str(path.relative_to(folder))] = files.read_tensors(path)[0]
    return found


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_search_goes_on_to_the_same_bits(tmp_path):
    how = {"impl": "csr"}  # formats round differently, and a later round's are chosen by the clock
    assert worker(tmp_path, "whole", **how) == ["0", "1", "2", "3"]
    assert worker(tmp_path, "killed", "0:7", **how) == ["0"]  # after the rewind point
    assert worker(tmp_path, "killed", "2:5", **how) == ["0", "1", "2"]  # in the middle of a round
    assert worker(tmp_path, "killed", "2:files", **how) == ["2"]  # between the files of a round
    left = [path.name for path in (tmp_path / "killed").iterdir() if path.name.startswith(".")]
    assert left == [".round_02.partial"]
    assert worker(tmp_path, "killed", cache=tmp_path / "other", **how) == ["2", "3"]
    whole, killed = results(tmp_path / "whole"), results(tmp_path / "killed")
    assert whole.keys() == killed.keys() and len(whole) == 2 + 2 * 4
    for file in whole:
        assert_equal(killed[file], whole[file])
    assert not [path for path in (tmp_path / "killed").iterdir() if path.name.startswith(".")]
    rounds = [json.loads((tmp_path / run / "summary.json").read_text())["rounds"] for run in ("whole", "killed")]
    for row, again in zip(*rounds, strict=True):
        assert [row[k] for k in ("density", "val_loss", "steps")] == [
            again[k] for k in ("density", "val_loss", "steps")
        ]
    assert worker(tmp_path, "killed", **how) == []  # nothing left to train


@pytest.mark.parametrize("rewind", ["init", "lr", "none"])
def test_a_search_given_up_goes_on_to_the_same_bits(tmp_path, rewind):
    how = {"rewind": rewind, "criterion": "random", "rounds": 3}
    run(run_dir=tmp_path / "whole", **how)
    for stop in (0, 1, 2, 3):
        for round_ in search(run_dir=tmp_path / "broken", **how):
            train(round_, steps=3 if round_.number == stop else 6)
            if round_.number == stop:
                break
    numbers = [r.number for r, *_ in run(run_dir=tmp_path / "broken", **how)[0]]
    assert numbers == [3]
    whole, broken = results(tmp_path / "whole"), results(tmp_path / "broken")
    for file in whole:
        assert_equal(broken[file], whole[file])


def test_a_round_begun_keeps_its_formats(tmp_path):
    how = {"impl": "auto", "run_dir": tmp_path / "run", "rounds": 1}
    for round_ in search(**how):
        if round_.number:
            break
    kept = json.loads((tmp_path / "run" / "formats.json").read_text())
    assert kept == {"1": {n: m.format.name for n, m in round_.model.named_modules() if isinstance(m, SparseModule)}}
    turned = {name: "csr" if format == "dense" else "dense" for name, format in kept["1"].items()}
    (tmp_path / "run" / "formats.json").write_text(json.dumps({"1": turned}))
    for round_ in search(**how):
        layers = {n: m.format.name for n, m in round_.model.named_modules() if isinstance(m, SparseModule)}
        assert layers == turned
        twin = round_.variant(net())
        assert {n: m.format.name for n, m in twin.named_modules() if isinstance(m, SparseModule)} == turned


def test_in_memory_it_is_the_same_search(tmp_path):
    on_disk, _ = run(run_dir=tmp_path / "run", rewind="3it")
    in_memory, found = run(rewind="3it")
    for (a, *_), (b, *_) in zip(on_disk, in_memory, strict=True):
        assert_equal(dense_state(a.model), dense_state(b.model))
    assert len(found.summary["rounds"]) == 3


def test_a_finished_search_trains_nothing_and_more_rounds_go_on(tmp_path):
    first, found = run(rounds=1, run_dir=tmp_path / "run")
    again, same = run(rounds=1, run_dir=tmp_path / "run")
    assert not again and same.summary == found.summary
    more, longer = run(rounds=3, run_dir=tmp_path / "run")
    assert [r.number for r, *_ in more] == [2, 3]
    assert longer.summary["rounds"][:2] == found.summary["rounds"]
    at_once, _ = run(rounds=3)
    assert_equal(dense_state(more[-1][0].model), dense_state(at_once[-1][0].model))
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == longer.summary


@pytest.mark.parametrize(
    ("other", "what"),
    [
        ({"rate": 0.3}, r"rate 0\.2, got 0\.3"),
        ({"rewind": "lr"}, "rewind 'init', got 'lr'"),
        ({"scope": "global"}, "scope 'layer', got 'global'"),
        ({"note": {"seed": 1}}, "seed 0, got 1"),
        ({"note": {}}, "seed 0, got None"),
        ({"model": mlp(4, 3)}, r"0\.weight of shape \[4, 1, 3, 3\], got none"),
    ],
)
def test_another_configuration_is_refused_by_name(tmp_path, other, what):
    how = {"run_dir": tmp_path, "note": {"seed": 0}, "rounds": 0}
    run(**how)
    before = {path: path.read_bytes() for path in tmp_path.glob("**/*") if path.is_file()}
    with pytest.raises(ValueError, match=rf"Expected the configuration this run began with \(.*{what}"):
        list(search(**how | other))
    assert {path: path.read_bytes() for path in tmp_path.glob("**/*") if path.is_file()} == before


def test_the_order_of_rates_matters_because_later_ones_win(tmp_path):
    list(search(rounds=0, rate={"*": 0.2, "7": 0.1}, run_dir=tmp_path))
    with pytest.raises(ValueError, match="Expected the configuration"):
        list(search(rounds=0, rate={"7": 0.1, "*": 0.2}, run_dir=tmp_path))


def test_the_same_note_may_hold_tuples(tmp_path):
    for _ in range(2):
        assert search(rounds=0, note={"size": (1, 2)}, run_dir=tmp_path).config["size"] == [1, 2]
        list(search(rounds=0, note={"size": (1, 2)}, run_dir=tmp_path))


def test_another_machine_is_only_warned_about(tmp_path):
    list(search(rounds=0, note={"threads": 2, "torch": "1"}, run_dir=tmp_path))
    with pytest.warns(UserWarning, match=r"Expected the machine this run began on \(threads 2, got 4\)"):
        list(search(rounds=0, note={"threads": 4, "torch": "1"}, run_dir=tmp_path))


def test_foreign_directories_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="Expected a run directory or an empty one, got other files"):
        list(search(run_dir=tmp_path))
    with pytest.raises(NotADirectoryError, match=r"notes\.txt: Expected a run directory, got a file"):
        list(search(run_dir=tmp_path / "notes.txt"))
    (tmp_path / "config.json").write_text('{"architectures": ["other"]}')
    with pytest.raises(ValueError, match=r"config\.json: Expected the configuration of a ticket search"):
        list(search(run_dir=tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "notes.txt"]


def test_a_kill_before_the_first_file_leaves_a_usable_directory(tmp_path):
    (tmp_path / ".config.json.12ab34cd.partial").write_text("{")
    list(search(rounds=0, run_dir=tmp_path))
    assert not (tmp_path / ".config.json.12ab34cd.partial").exists()


@pytest.mark.parametrize("file", ["trained.safetensors", "end.safetensors", "result.json"])
def test_a_full_disk_loses_at_most_the_round(tmp_path, monkeypatch, file):
    def write(path, *content, real):
        if Path(path).name == file and "round_01" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, *content)

    with monkeypatch.context() as patch:
        for name in ("write_tensors", "write_json"):
            real = getattr(store, name)
            patch.setattr(store, name, lambda path, *content, real=real: write(path, *content, real=real))
        with pytest.raises(OSError, match="No space left"):
            run(run_dir=tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").glob("*round_*")) == ["round_00"]
    seen, _ = run(run_dir=tmp_path / "run")
    assert [r.number for r, *_ in seen] == [1, 2]
    assert_equal(dense_state(seen[-1][0].model), dense_state(run()[0][-1][0].model))


@pytest.mark.parametrize("file", ["start.safetensors", "round_00/trained.safetensors", "round_00/end.safetensors"])
def test_damaged_files_of_a_run_are_named(tmp_path, file):
    run(rounds=0, run_dir=tmp_path)
    files.write_tensors(tmp_path / file, {"a": torch.ones(1)}, {})
    with pytest.raises(ValueError, match=rf"{Path(file).name}: Expected"):
        run(rounds=1, run_dir=tmp_path)
    (tmp_path / file).write_bytes((tmp_path / file).read_bytes()[:-3])
    with pytest.raises(ValueError, match=rf"{Path(file).name}: Expected a whole safetensors file"):
        run(rounds=1, run_dir=tmp_path)


# Bad arguments


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ({"rounds": -1}, "Expected rounds as a whole number"),
        ({"rounds": 1.5}, "Expected rounds as a whole number"),
        ({"rounds": True}, "Expected rounds as a whole number"),
        ({"rate": 1.5}, "Expected a share between 0 and 1, got 1.5"),
        ({"rate": {"5": 0.1}}, r"0\.weight: Expected a share for every layer"),
        ({"pattern": "diagonal"}, "Expected a pattern"),
        ({"pattern": "2:4"}, "Expected rounds=1 with pattern '2:4'"),
        ({"criterion": "luck"}, "Expected a criterion of magnitude, random, .* or a function, got 'luck'"),
        ({"scope": "local"}, "Expected scope 'global', 'layer'"),
        ({"rewind": "start"}, "Expected rewind"),
        ({"impl": "coo"}, "Expected a format of dense"),
        ({"exclude": "fc9"}, "fc9"),
        ({"model": nn.ReLU()}, "Expected a model with a linear or convolution layer, got ReLU"),
        ({"note": {"rate": 1}}, "Expected a note without the search's own names, got ..rate"),
    ],
)
def test_bad_arguments_fail_before_anything_is_written(tmp_path, how, why):
    with pytest.raises(ValueError, match=why):
        search(run_dir=tmp_path / "run", **how)
    assert not (tmp_path / "run").exists()


def test_pruned_models_and_strange_notes_are_refused():
    model = sk.convert(mlp(8, 6, 4), sk.prune(mlp(8, 6, 4), 0.5), impl="csr")
    with pytest.raises(ValueError, match=r"fc1\.weight: Expected a dense weight, got a pruned one"):
        search(model)
    with pytest.raises(TypeError, match="Expected a note of JSON values"):
        search(note={"x": object()})

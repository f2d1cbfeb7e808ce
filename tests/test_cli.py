"""The command line: what it does, and one sentence with exit code 2 for what it cannot do."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import sparsekit as sk
from sparsekit import models
from sparsekit.__main__ import main

MODEL, STEPS = "mlp:64-32-10", 40


@pytest.fixture(autouse=True)
def _plain(monkeypatch):
    monkeypatch.delenv("SPARSEKIT_DATA", raising=False)


@pytest.fixture(scope="module", autouse=True)
def _threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def search(out, *options, code=0):
    pytest.importorskip("sklearn")
    length = [] if {"--epochs", "--iterations"} & {*options} else ["--iterations", str(STEPS)]
    rounds = [] if "--rounds" in options else ["--rounds", "2"]
    model = [] if "--model" in options else ["--model", MODEL]
    assert main(["ticket", *model, "--data", "digits", *rounds, *length, *options, "--out", str(out)]) == code
    return json.loads((out / "summary.json").read_text()) if code == 0 else None


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "run"
    return folder, search(folder, "--control", "reinit")


def test_help_names_the_commands():
    done = subprocess.run([sys.executable, "-m", "sparsekit", "--help"], capture_output=True, text=True, check=True)
    for command in ("info", "ticket", "stability", "reproduce", "report", "plan", "export", "bench"):
        assert command in done.stdout


@pytest.mark.parametrize("argv", [[], ["dance"], ["ticket"], ["export", "x", "--to", "tar", "-o", "y"], ["report"]])
def test_usage_errors_are_code_2(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2 and "usage: sparsekit" in capsys.readouterr().err


@pytest.mark.parametrize("seed", ["-1", "4294967296", "one"])
def test_seeds_are_those_of_every_generator(seed, tmp_path, capsys):
    with pytest.raises(SystemExit):
        search(tmp_path / "run", "--seed", seed)
    assert f"Expected a seed between 0 and 4294967295, got '{seed}'" in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0 and capsys.readouterr().out == f"sparsekit {sk.__version__}\n"


def test_info(capsys):
    assert main(["info"]) == 0
    assert torch.__version__ in capsys.readouterr().out
    assert main(["info", "--json"]) == 0
    assert torch.__version__ in json.dumps(json.loads(capsys.readouterr().out))


def test_a_search_leaves_its_summary(run):
    folder, summary = run
    config, rounds = summary["config"], summary["rounds"]
    assert (config["model"], config["data"], config["iterations"], config["seed"]) == (MODEL, "digits", STEPS, 0)
    assert config["rate"] == {"*": 0.2, "fc2.weight": 0.1}
    total = 64 * 32 + 320
    want = [1, (64 * 32 - 410 + 288) / total, (64 * 32 - 410 - 328 + 259) / total]
    assert [row["density"] for row in rounds] == pytest.approx(want)
    assert all(0.5 < row["test_accuracy"] <= 1 and row["speedup"] > 0 for row in rounds)
    assert ["controls" in row for row in rounds] == [False, True, True]
    assert summary["total"]["control_seconds"] == pytest.approx(sum(row.get("control_seconds", 0) for row in rounds))
    assert (folder / "round_02" / "trained.safetensors").is_file()


def test_a_relaunch_trains_nothing_and_prints_the_ledger_again(run, capsys, monkeypatch):
    folder, summary = run
    monkeypatch.setattr("sparsekit.ticket.command.train_round", None)
    assert search(folder, "--control", "reinit") == summary
    printed = capsys.readouterr()
    assert "accuracy %" in printed.out and str(folder) in printed.out and not printed.err


def test_seeds_criteria_schedules_and_controls(tmp_path, capsys):
    pytest.importorskip("scipy")
    options = ["--density", "0.3", "--schedule", "cubic", "--criterion", "snip", "--score-at", "init", "--seeds", "2"]
    controls = ["--control", "random,random,noise:0.5", "--least", "1", "--scope", "global"]
    length = ["--rounds", "2", "--iterations", "30"]
    argv = ["ticket", "--model", MODEL, "--data", "digits", *length, *options, *controls]
    assert main([*argv, "--out", str(tmp_path / "a")]) == 0
    table = capsys.readouterr().out
    assert "verdict" in table and "noise:0.5 %" in table and "[" in table
    found = json.loads((tmp_path / "a" / "study.json").read_text())
    assert found["seeds"] == [0, 1] and [row["round"] for row in found["rounds"]] == [1, 2]
    assert found["rounds"][1]["density"] == pytest.approx(0.3, abs=0.01)
    assert found["rounds"][0]["density"] == pytest.approx(0.3 + 0.7 / 8, abs=0.01)
    assert list(found["rounds"][0]["controls"]) == ["random", "noise:0.5"]
    summaries = [json.loads((tmp_path / "a" / f"seed_{seed}" / "summary.json").read_text()) for seed in (0, 1)]
    assert len(summaries[0]["rounds"][1]["controls"]["random"]["runs"]) == 2
    assert summaries[0]["rounds"][0]["test_accuracy"] != summaries[1]["rounds"][0]["test_accuracy"]
    assert main([*argv, "--workers", "2", "--out", str(tmp_path / "b")]) == 0  # side by side: the same figures
    again = json.loads((tmp_path / "b" / "study.json").read_text())
    assert again["rounds"] == found["rounds"]
    assert main(["report", str(tmp_path / "a" / "seed_0")]) == 0


def test_stability(run, tmp_path, capsys):
    argv = ["stability", "--model", MODEL, "--data", "digits", "--iterations", "60", "--alphas", "4"]
    steps = ["--steps", "60", "0", "--ticket", str(run[0] / "round_02" / "trained.safetensors")]
    assert main([*argv, *steps, "--json", str(tmp_path / "s.json")]) == 0
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "s.json").read_text())
    assert [row["step"] for row in found["steps"]] == [0, 60] and "stable from step" in printed
    assert found["steps"][1]["value"] == 0 and found["steps"][1]["stable"]
    assert found["stable_from"] in (0, 60) and len(found["steps"][0]["curves"][0]) == 4
    assert main([*argv, "--steps", "61"]) == 2 and main([*argv, "--children", "1"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert "Expected steps between 0 and 60, got [61]" in lines[0] and "Expected children as a whole" in lines[1]


def test_more_rounds_go_on(run, tmp_path):
    folder, summary = run
    longer = search(shutil.copytree(folder, tmp_path / "run"), "--control", "reinit", "--rounds", "3")
    assert longer["rounds"][:3] == summary["rounds"] and len(longer["rounds"]) == 4


def test_report(run, capsys):
    pytest.importorskip("matplotlib")
    folder, _ = run
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.md")
    figures = [path.name for path in (folder / "figures").iterdir()]
    text = (folder / "report.md").read_text()
    assert len(figures) >= 2 and all(f"figures/{name}" in text for name in figures)


def test_export_both_ways(run, tmp_path, capsys):
    folder, summary = run
    packed, dense = tmp_path / "t.safetensors", tmp_path / "d.safetensors"
    assert main(["export", str(folder), "--to", "packed", "-o", str(packed)]) == 0
    assert capsys.readouterr().out.strip() == str(packed)
    assert main(["export", str(packed), "--to", "dense", "-o", str(dense)]) == 0
    model = models.build(MODEL, input_shape=(64,))
    model.load_state_dict(load_file(dense))
    ticket = sk.load(packed, model, impl="csr")
    x = torch.randn(5, 64)
    torch.testing.assert_close(ticket(x), model(x), rtol=1e-5, atol=1e-5)
    assert int(sum(mask.sum() for mask in sk.masks_of(ticket).values())) == round(
        summary["rounds"][2]["density"] * (64 * 32 + 320)
    )
    assert main(["export", str(folder), "--to", "dense", "--round", "0", "-o", str(dense)]) == 0
    assert all((load_file(dense)[name] != 0).all() for name in ("fc1.weight", "fc2.weight"))


def facts(summary):
    return [(row["density"], row["test_accuracy"], row["val_loss"]) for row in summary["rounds"]]


def test_the_seed_decides_everything(tmp_path):
    how = ["--impl", "csr", "--threads", "1", "--criterion", "random"]
    first, again = (search(tmp_path / name, *how, "--seed", "5") for name in "ab")
    other = search(tmp_path / "c", *how, "--seed", "6")
    assert facts(first) == facts(again) and facts(first)[0] != facts(other)[0]
    assert first["config"]["threads"] == 1


def test_controls_do_not_change_the_search(tmp_path):
    how = ["--impl", "csr", "--threads", "1", "--rewind", "none"]
    assert facts(search(tmp_path / "a", *how)) == facts(search(tmp_path / "b", *how, "--control", "reinit"))


@pytest.mark.parametrize(
    ("options", "key", "value"),
    [
        (["--rate", "0.5"], "rate", {"*": 0.5, "fc2.weight": 0.25}),
        (["--rate", "0.5", "--scope", "global"], "rate", 0.5),
        (["--scope", "global"], "rate", 0.2),
        (["--pattern", "block:4x1"], "pattern", "block:4x1"),
        (["--pattern", "2:4", "--rounds", "1"], "pattern", "2:4"),
        (["--criterion", "random"], "criterion", "random"),
        (["--rewind", "5it"], "rewind", "5it"),
        (["--rewind", "1ep"], "rewind", "1ep"),
        (["--rewind", "lr"], "rewind", "lr"),
        (["--rewind", "none"], "rewind", "none"),
        (["--epochs", "2"], "iterations", 2 * (1200 // 60)),
        (["--impl", "dense"], "impl", "dense"),
    ],
)
def test_options(tmp_path, options, key, value):
    summary = search(tmp_path / "run", "--seed", "3", *options)
    assert summary["config"][key] == value
    rounds = summary["rounds"]
    assert len(rounds) == summary["config"]["rounds"] + 1
    assert all(later["density"] < row["density"] for row, later in zip(rounds, rounds[1:], strict=False))
    skipped = {"5it": 5, "1ep": 20}.get(summary["config"]["rewind"], 0)
    assert [row["steps"] for row in rounds] == [40] + [40 - skipped] * (len(rounds) - 1)


def test_channels_of_the_output_layer_are_classes_and_stay(tmp_path):
    summary = search(tmp_path / "run", "--pattern", "channel", "--rate", "0.3")
    layers = {layer["name"]: layer for layer in summary["rounds"][2]["layers"]}
    assert layers["fc2"]["density"] == 1 and layers["fc1"]["density"] < 0.6
    assert summary["config"]["exclude"] == ["fc2.weight"]


def test_a_small_convolutional_net(tmp_path):
    summary = search(tmp_path / "run", "--model", "digits-conv", "--iterations", "10", "--rounds", "1")
    assert [layer["shape"] for layer in summary["rounds"][1]["layers"]][0] == [32, 1, 3, 3]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--model", "lenet-5"], "Expected a model of lenet-300-100"),
        (["--model", "mlp:65-32-10"], "Expected widths from 64"),
        (["--data", "imagenet"], "Expected a data set of digits, mnist"),
        (["--pattern", "diagonal"], "Expected a pattern 'unstructured'"),
        (["--pattern", "2:4"], "Expected rounds=1 with pattern '2:4'"),
        (["--criterion", "luck"], "Expected a criterion of magnitude, random"),
        (["--rewind", "soon"], "Expected rewind 'init'"),
        (["--rewind", "40it"], "Expected --rewind to a step before the last, 40, got 40it"),
        (["--rewind", "2ep"], "Expected --rewind to a step before the last, 40, got 2ep"),
        (["--data", "mnist"], "Expected train-images"),
        (["--data", "mnist", "--data-dir", "/no/such/place"], "/no/such/place, which is not a directory"),
        (["--rounds", "-1"], "Expected rounds as a whole number of pruning rounds, got -1"),
        (["--iterations", "0"], "Expected --iterations of at least 1, got 0"),
        (["--epochs", "0"], "Expected --epochs of at least 1, got 0"),
        (["--epochs", "-2"], "Expected --epochs of at least 1, got -2"),
        (["--threads", "0"], "Expected --threads of at least 1, got 0"),
        (["--rate", "1.5"], "Expected --rate in [0, 1), got 1.5"),
        (["--rate", "nan"], "Expected --rate in [0, 1), got nan"),
        (["--density", "1.5"], "Expected a density between 0 and 1, got 1.5"),
        (["--density", "0.1", "--rate", "0.2"], "Expected --rate or --density, got both"),
        (["--schedule", "cubic"], "Expected --density with --schedule cubic, got none"),
        (["--seeds", "0"], "Expected --seeds of at least 1, got 0"),
        (["--control", "reinit,luck"], "Expected controls of reinit, random, shuffle, noise, signs, linear (noise"),
        (["--control", "noise:loud"], "Expected noise:SIGMAS with a number, got 'noise:loud'"),
        (["--least", "-1"], "Expected least as a whole number of at least 0, got -1"),
        (["--impl", "coo"], "Expected a format of dense, compact, csr, bsr, lanes, panel, bitmap, nm"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(tmp_path, capsys, options, why):
    search(tmp_path / "run", *options, code=2)
    printed = capsys.readouterr()
    assert printed.err.startswith("sparsekit ticket: ") and why in printed.err and printed.err.count("\n") == 1
    assert not printed.out and not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(tmp_path, capsys):
    search(tmp_path / "run", "--device", "cuda", code=2)
    assert "got cuda: torch sees no CUDA device" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_another_configuration_in_the_directory(run, capsys):
    folder, summary = run
    search(folder, "--control", "reinit", "--iterations", "41", code=2)
    assert f"iterations {STEPS}, got 41" in capsys.readouterr().err
    assert json.loads((folder / "summary.json").read_text()) == summary


def test_directories_that_are_not_runs(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    search(tmp_path, code=2)
    search(tmp_path / "file", code=2)
    for argv in (["report", "gone"], ["export", "gone", "--to", "dense", "-o", "out/d"]):
        assert (
            main([arg.replace("gone", str(tmp_path / "gone")).replace("out", str(tmp_path / "out")) for arg in argv])
            == 2
        )
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and "got other files" in lines[0] and "got a file" in lines[1]
    assert "gone" in lines[2] and "gone" in lines[3]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_place_that_cannot_be_written_to(run, tmp_path, capsys):
    assert main(["export", str(run[0]), "--to", "dense", "-o", str(tmp_path)]) == 2
    assert "Expected the name of a file, got a directory" in capsys.readouterr().err


def test_an_interrupt_is_130_and_keeps_finished_rounds(tmp_path, capsys, monkeypatch):
    from sparsekit.ticket import command

    train = command.train_round

    def stop(round_, *args):
        if round_.number == 1:
            raise KeyboardInterrupt
        return train(round_, *args)

    with monkeypatch.context() as patch:
        patch.setattr(command, "train_round", stop)
        pytest.importorskip("sklearn")
        argv = ["ticket", "--model", MODEL, "--data", "digits", "--rounds", "1", "--iterations", "20"]
        assert main([*argv, "--out", str(tmp_path / "run")]) == 130
    assert "finished rounds are kept" in capsys.readouterr().err
    assert (tmp_path / "run" / "round_00").is_dir() and not (tmp_path / "run" / "round_01").exists()
    assert main([*argv, "--out", str(tmp_path / "run")]) == 0


def test_rewinding_to_the_first_stable_step(tmp_path, capsys):
    how = ("--rewind", "auto", "--control", "linear", "--rounds", "1")
    summary = search(tmp_path / "run", *how)
    found = json.loads((tmp_path / "run" / "stability.json").read_text())
    assert found["stable_from"] in (0, 1, 2, 5, 10, 20)
    at = f"{found['stable_from']}it" if found["stable_from"] else "init"
    assert summary["config"]["rewind"] == at and f"rewinding to step {found['stable_from']}" in capsys.readouterr().out
    linear = summary["rounds"][1]["controls"]["linear"]
    assert linear["test_accuracy"] > 0.3 and linear["steps"] == STEPS - found["stable_from"]
    before = (tmp_path / "run" / "stability.json").stat().st_mtime_ns
    assert search(tmp_path / "run", *how) == summary
    assert (tmp_path / "run" / "stability.json").stat().st_mtime_ns == before
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "stability.json").write_text(json.dumps(found | {"stable_from": None}))
    search(tmp_path / "none", *how, code=2)
    assert "Expected --rewind auto to find a step that is stable to SGD noise, got none" in capsys.readouterr().err


def test_a_ticket_moves_and_a_trained_network_is_a_start(tmp_path, capsys):
    search(tmp_path / "run", "--rounds", "1", "--impl", "csr")
    how = ["--data", "digits", "--iterations", str(STEPS), "--optimizer", "sgd", "--lr", "0.1", "--exclude", "fc2"]
    file = tmp_path / "found.json"
    assert main(["transfer", str(tmp_path / "run"), *how, "--seeds", "2", "--json", str(file)]) == 0
    printed, found = capsys.readouterr().out, json.loads(file.read_text())
    assert "sgd; newly drawn: fc2.bias, fc2.weight" in printed and f"verdict: {found['verdict']['word']}" in printed
    assert {name: len(runs) for name, runs in found["runs"].items()} == {"dense": 2, "ticket": 2, "random": 2}
    assert all(0.2 < run["test_accuracy"] <= 1 for runs in found["runs"].values() for run in runs)
    for options, why in (
        (["--round", "5"], "Expected a finished round 5, got none"),
        (["--exclude", "fc9"], "Expected exclude to name parameters of the new model, got 'fc9'"),
        (["--model", "conv2"], "with its name and shape in the new model"),
    ):
        assert main(["transfer", str(tmp_path / "run"), "--data", "digits", "--iterations", "2", *options]) == 2
        assert why in capsys.readouterr().err
    assert main(["transfer", str(tmp_path / "none"), "--data", "digits"]) == 2
    assert "Expected a finished round, got none" in capsys.readouterr().err

    trained = tmp_path / "run" / "round_00" / "trained.safetensors"
    summary = search(tmp_path / "again", "--rounds", "1", "--impl", "csr", "--start", str(trained))
    assert "newly drawn: none" in capsys.readouterr().out and len(summary["config"]["start"]) == 16
    start = sk.ticket.solo.read_start(tmp_path / "again")
    weights = sk.ticket.solo.read_round(tmp_path / "run", 0)[0]
    assert all(torch.equal(start[name], tensor) for name, tensor in weights.items())
    search(tmp_path / "again", "--rounds", "1", "--impl", "csr", code=2)  # another start is another search
    assert "Expected the configuration this run began with (start" in capsys.readouterr().err
    search(tmp_path / "never", "--start", str(trained), "--model", "digits-conv", code=2)
    assert "Expected a weight of this network" in capsys.readouterr().err and not (tmp_path / "never").exists()

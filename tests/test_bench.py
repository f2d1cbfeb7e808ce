"""The benchmark suites: what is a row, what is none, and what is made of rows."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from sparsekit import bench
from sparsekit.__main__ import main
from sparsekit.bench import cases, compare, models, page, problem, rivals, runner, timing
from sparsekit.bench.results import place, read
from sparsekit.ticket import train


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    """Short measurements."""
    monkeypatch.setattr(runner, "SECONDS", dict.fromkeys(runner.SECONDS, 0.001))


@pytest.fixture
def no_probe(monkeypatch):
    rates = {"flops": {"float32": 1e11}, "bytes": {"1000000": 1e11, "100000000": 1e10}, "threads": 1}
    monkeypatch.setattr(runner, "probe", lambda where: rates)
    return rates


# ---- cases ------------------------------------------------------------------------------------------


def test_levels_grow_and_names_are_unique():
    for suite, known in cases.SUITES.items():
        names = [case.name for case in known]
        assert len(set(names)) == len(names), suite
        sizes = [len(bench.select(suite, level, where="cuda")) for level in cases.LEVELS]
        assert 0 < sizes[0] <= sizes[1] <= sizes[2] == len(known), suite
        assert not any(case.device for case in bench.select(suite, "full"))
    assert {case.name for case in bench.select("hero", filter="4096 d0.1 step")} == {"linear-4096x1024-b64-d0.1-step"}
    assert len(bench.select("all")) == sum(len(bench.select(suite)) for suite in cases.SUITES)


def test_models_have_cases_of_uniform_masks():
    usual = {case.name: case for case in bench.select("models", filter="uniform")}
    assert usual.keys() == {
        f"{model}-uniform-d0.1-{work}"
        for model in ("lenet-300-100-b60", "vgg16-b16", "resnet18-b1") for work in ("forward", "step")
    }  # fmt: skip
    assert {case.masks for case in usual.values()} == {"uniform"}


@pytest.mark.parametrize("words", [{"suite": "dance"}, {"suite": "hero", "filter": "transformer"}])
def test_no_such_cases(words):
    with pytest.raises(ValueError, match="Expected"):
        bench.select(**words)


@pytest.mark.parametrize("name", ["resnet18.stem", "resnet50.stage4_reduce", "linear-784x300", "resnet18.stage2_first"])
def test_shapes(name):
    layer = cases.LAYERS[name]
    with torch.device("meta"):
        y = layer.module()(torch.empty(layer.input))
    assert y.numel() == layer.positions * layer.out


def test_a_mask_has_the_blocks_and_the_density_of_its_case():
    case = cases.Case("blocks", "linear-1024x1024", "forward", 0.1, 64, "bsr", (16, 8))
    mask = problem.make_mask(case, (1000, 500), torch.Generator().manual_seed(0))
    assert mask.shape == (1000, 500) and mask.float().mean().item() == pytest.approx(0.1, abs=0.02)
    blocks = mask[:992, :496].view(62, 16, 62, 8).float().mean((1, 3))
    assert ((blocks == 0) | (blocks == 1)).all()


# ---- rows -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["csr", "bsr", "dense"])
@pytest.mark.parametrize("work", ["forward", "dx", "dw", "step"])
@pytest.mark.parametrize("subject", ["linear-64x64", "conv3x3-8-8"])
def test_every_work_agrees_with_float64(subject, work, format):
    block = (8, 1) if format == "bsr" else (1, 1)
    batch = cases.LAYERS[subject].batch
    for suite in ("ops", "layers"):
        case = cases.Case(suite, subject, work, 0.3, batch, format, block)
        posed = problem.pose(case)
        if suite == "layers" and work in ("dx", "dw"):
            continue
        layer, thunk = problem.sparse_thunk(posed)
        assert problem.verdict(thunk(), posed, packed=layer.pack) < 1e-6
        thunks, notes = runner.thunks_of(posed, runner.Session(level="usual"))
        assert "dense" in thunks and not any(name in notes for name in thunks)
        assert not any(why.startswith("failed") for why in notes.values()), notes


@pytest.mark.parametrize("format", ["panel", "nm", "bitmap"])
def test_what_only_gpus_have_is_posed_as_it_is_there(format):
    chosen = [case for case in bench.select("ops", "full", where="cuda") if case.format == format]
    assert {case.dtype for case in chosen} == {"bfloat16", "float16"}
    assert {case.work for case in chosen} == ({"forward"} if format == "bitmap" else {"forward", "dx", "dw"})
    for work in {case.work for case in chosen}:
        block = (8, 1) if format == "panel" else (1, 1)
        posed = problem.pose(cases.Case("ops", "linear-64x64", work, 0.5, 16, format, block, "bfloat16"))
        layer, thunk = problem.sparse_thunk(posed)
        assert layer.format.name == format and problem.verdict(thunk(), posed, packed=layer.pack) < 2e-2


def test_a_row_says_all_there_is_to_know(no_probe):
    (case,) = bench.select("overhead", "quick", "linear-64x64-b16-d0.1-forward")
    row = bench.run_case(case, runner.Session(rates=no_probe))
    assert (row.op, row.shape, row.input, row.pattern, row.format) == (
        "linear", [64, 64], [16, 64], "unstructured", "csr",
    )  # fmt: skip
    assert 0 < row.p20_us <= row.p50_us <= row.p80_us and row.ratio == pytest.approx(row.dense_us / row.p50_us)
    assert row.error < 1e-5 and row.bytes < row.dense_bytes and row.limit in ("flops", "bytes")
    assert row.percent_of_limit == pytest.approx(100 * row.limit_us / row.p50_us)
    survivors = problem.pose(case).mask.sum().item()
    assert row.flops == 2 * survivors * 16 and row.gflops == pytest.approx(row.flops / row.p50_us / 1e3)
    known = {r.name for r in rivals.RIVALS if r.level != "full"}
    assert set(row.rivals) | set(row.notes) == known - {"dense channels_last"}


def test_what_is_wrong_is_not_timed(no_probe, monkeypatch, tmp_path, capsys):
    made = problem.sparse_thunk

    def wrong(posed):
        layer, thunk = made(posed)
        return layer, lambda: [t * 1.001 for t in thunk()]

    monkeypatch.setattr(runner, "sparse_thunk", wrong)
    out = tmp_path / "r.json"
    argv = ["bench", "overhead", "--filter", "linear-8x8 forward", "--json", str(out)]
    assert main(argv) == 1
    found = read(out)
    assert found["rows"] == [] and len(found["failed"]) == 2
    assert "NOT TIMED: forward: Expected" in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.setattr(runner, "probe", lambda where: no_probe)
    assert main(argv) == 0
    assert len(read(out)["rows"]) == 2 and read(out)["failed"] == {}


def test_a_rival_that_is_wrong_or_broken_is_a_line(monkeypatch):
    posed = problem.pose(cases.Case("layers", "linear-64x64", "forward", 0.3, 16))

    def broken(p):
        raise OSError("no such\n runtime")

    fakes = (
        rivals.Rival("dense", "", rivals._dense, "quick"),
        rivals.Rival("liar", "", lambda p: lambda: (p.x,)),
        rivals.Rival("off by a percent", "", lambda p: lambda: (1.01 * p.expected[0],)),
        rivals.Rival("broken", "", broken),
        rivals.Rival("absent", "", broken, needs="no_such_package"),
        rivals.Rival("late", "", broken, "full"),
    )
    monkeypatch.setattr(runner, "RIVALS", fakes)
    monkeypatch.setattr(rivals, "RIVALS", fakes)
    thunks, notes = runner.thunks_of(posed, runner.Session())
    assert list(thunks) == ["dense"] and notes.keys() == {"liar", "off by a percent", "broken", "absent"}
    assert "within" in notes["off by a percent"] and notes["broken"] == "failed: no such runtime"
    assert notes["absent"] == "not installed: pip install no_such_package"


def test_a_ticket_and_its_regrouped_rows_are_checked_and_timed(monkeypatch, no_probe):
    pytest.importorskip("sklearn")
    real = [case for case in bench.select("models", "quick") if case.masks == "ticket"]
    assert {(case.work, case.regrouped) for case in real} == {
        (work, order) for work in ("forward", "step") for order in (False, True)
    }
    monkeypatch.setattr(models, "Training", lambda iterations: train.Training(20))
    models._ticket.cache_clear()
    rows = [bench.run_case(case, runner.Session("cpu", "quick")) for case in real if case.work == "forward"]
    models._ticket.cache_clear()
    assert [(row.masks, row.order) for row in rows] == [("ticket", "natural"), ("ticket", "regrouped")]
    assert all(0 < row.error < 1e-3 and row.bytes < row.dense_bytes for row in rows)
    table = runner.table(rows)
    assert "mlp:64-300-100-10 ticket |" in table and "mlp:64-300-100-10 ticket regrouped |" in table


def test_uniform_masks_give_every_layer_the_density(monkeypatch):
    monkeypatch.setitem(cases.MODELS, "digits-conv", ((1, 8, 8), 2, 10))
    case = cases.Case("models", "digits-conv", "forward", 0.25, 2, "auto")
    told = [models.prepare(replace(case, masks=masks)).notes["density"] for masks in ("magnitude", "uniform")]
    assert told[1] == "0.25 of the weights, 0.25 of the multiply-adds"
    assert told[0].startswith("0.25 of the weights") and told[0] != told[1]


def test_what_wants_data_is_left_out_with_the_reason(monkeypatch, tmp_path, no_probe):
    monkeypatch.setenv("SPARSEKIT_DATA", str(tmp_path))
    models._ticket.cache_clear()
    said = []
    rows = bench.run("models", filter="lenet ticket forward", say=said.append)
    assert rows == [] and "lenet-300-100-b60-ticket-d0.1-forward: left out: mnist: Expected" in "\n".join(said)


def test_models_are_checked_and_timed(monkeypatch):
    monkeypatch.setitem(cases.MODELS, "mlp:16-32-4", ((16,), 5, 4))
    for work in ("forward", "step"):
        row = bench.run_case(cases.Case("models", "mlp:16-32-4", work, 0.5, 5, "auto"))
        assert row.ratio > 0 and row.error < 1e-3 and row.shape == [16 * 32 + 32 * 4]
    row = bench.run_case(cases.Case("memory", "mlp:64-64-4", "memory", 0.1, 1))
    assert row.p50_us is None and row.bytes < row.dense_bytes and row.ratio == row.dense_bytes / row.bytes


def test_a_model_that_is_wrong_is_not_timed(monkeypatch):
    monkeypatch.setitem(cases.MODELS, "mlp:16-32-4", ((16,), 5, 4))
    monkeypatch.setattr(
        models, "convert", lambda model, masks, **how: torch.nn.Sequential(model, torch.nn.Softsign()).eval()
    )
    with pytest.raises(AssertionError, match="logits: Expected the float64"):
        bench.run_case(cases.Case("models", "mlp:16-32-4", "forward", 0.5, 5, "auto"))


def test_percentiles_and_limits():
    ticks = iter(range(10**6))
    spread = timing.spreads({"a": lambda: next(ticks)}, 0.002)["a"]
    assert 0 < spread.p20 <= spread.p50 <= spread.p80 < 1000
    rates = {"flops": {"float32": 1e9, "bfloat16": 2e9}, "bytes": {"1000": 1e9, "10000": 1e8}}
    assert timing.limit(rates, "float32", 5000, 100) == ("flops", 5.0)
    assert timing.limit(rates, "bfloat16", 5000, 900) == ("flops", 2.5)
    assert timing.limit(rates, "float16", 100, 5000) == ("bytes", 50.0)
    assert timing.limit(rates, "float32", 0, 10**6) == ("bytes", 1e4)


def test_rates_are_found_here():
    rates = timing.probe()
    assert rates["flops"].keys() == {"float32", "float64", "bfloat16"} and min(rates["flops"].values()) > 1e8
    assert len(rates["bytes"]) == 4 and min(rates["bytes"].values()) > 1e8


# ---- files ------------------------------------------------------------------------------------------


def test_a_stopped_run_goes_on(no_probe, tmp_path, capsys, monkeypatch):
    out = tmp_path / "r.json"
    argv = ["bench", "overhead", "--quick", "--filter", "linear-8x8", "--threads", "1", "--json", str(out)]
    first, measured, here = runner.run_case, [], (torch.get_num_threads(), os.sched_getaffinity(0))

    def stop(case, session):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(case.name)
        return first(case, session)

    monkeypatch.setattr(runner, "run_case", stop)
    assert main(argv) == 130
    before = read(out)["rows"]
    assert [row["name"] for row in before] == measured
    monkeypatch.setattr(runner, "run_case", first)
    assert main(argv) == 0
    after = read(out)
    assert (torch.get_num_threads(), os.sched_getaffinity(0)) == here
    assert after["rows"][:2] == before and len(after["rows"]) == 4 and "1" in after["limits"]
    assert "2 of 4 rows are in the file already" in capsys.readouterr().out
    monkeypatch.setattr(runner, "run_case", None)
    assert main(argv) == 0  # measures nothing
    assert read(out)["rows"] == after["rows"]


def test_a_file_of_another_machine_is_not_mixed(no_probe, tmp_path, capsys):
    out = tmp_path / "r.json"
    argv = ["bench", "overhead", "--filter", "linear-8x8 forward", "--json", str(out)]
    assert main(argv) == 0
    found = json.loads(out.read_text())
    found["environment"]["cpu"] = "abacus"
    out.write_text(json.dumps(found))
    assert main(argv) == 2 and "got abacus" in capsys.readouterr().err
    assert json.loads(out.read_text()) == found
    assert main([*argv, "--again"]) == 0 and read(out)["environment"]["cpu"] != "abacus"


def test_a_folder_names_the_file(tmp_path):
    facts = {"device": "cpu-x-2c", "date": "2026-01-02", "commit": "abc1234", "dirty": True}
    assert place(tmp_path, facts) == tmp_path / "cpu-x-2c" / "2026-01-02-abc1234-dirty.json"
    assert place(tmp_path / "new.json", facts) == tmp_path / "new.json"


TORN = ["", "[]", "{}", '{"environment": {}, "rows": [{}]}', '{"environment": 1, "rows": []}']


@pytest.mark.parametrize("text", TORN)
def test_files_that_are_none(tmp_path, text, capsys):
    path = tmp_path / "r.json"
    path.write_text(text)
    assert main(["bench", "--page", str(tmp_path / "p.html"), str(path)]) == 2
    assert "Expected a result file of sparsekit bench" in capsys.readouterr().err
    assert main(["bench", "--compare", str(path), str(tmp_path / "gone.json")]) == 2


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["dance"], "Expected a suite of hero, ops"),
        (["hero", "--filter", "gnn"], "Expected cases named like 'gnn'"),
        (["hero", "--threads", "0"], "Expected --threads of at least 1"),
        (["hero", "--graphs"], "Expected --graphs with --device cuda"),
        (["--page", "x.txt", "y.json"], "Expected --page OUT.html FILE"),
        (["--base", "no-such-ref"], "Expected --base with a commit"),
    ],
)
def test_bad_options(options, why, capsys, no_probe, monkeypatch):
    if "--base" in options:
        monkeypatch.setattr("sparsekit.bench.command.run", lambda *args, **how: [])
    assert main(["bench", *options]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("sparsekit bench: ") and why in printed.err


# ---- comparison and page ----------------------------------------------------------------------------


def results(**ratios):
    rows = [
        {"suite": "layers", "name": f"{name}-d0.1-forward", "threads": 1, "work": "forward", "ratio": ratio,
         "density": 0.1, "p20_us": 99.0, "p50_us": 100.0, "p80_us": 101.0, "dense_us": 100 * ratio, "op": "linear",
         "rivals": {"dense": [99 * ratio, 100 * ratio, 101 * ratio], "other <b>": [50.0, 60.0, 70.0]}, "bytes": 10,
         "dense_bytes": 100, "flops": 100, "moved": 10, "gflops": 1.0, "dtype": "float32", "notes": {"x": "<i>"}}
        for name, ratio in ratios.items()
    ]  # fmt: skip
    rates = {"flops": {"float32": 1e11}, "bytes": {"1000": 1e11, "100000": 1e10}}
    environment = {"cpu": "abacus & co", "device": "cpu-x", "date": "2026-01-02", "commit": "abc", "torch": "2"}
    return {"environment": environment, "limits": {"1": rates}, "rows": rows, "failed": {"layers/z": "wrong"}}


def test_regressions_are_beyond_noise(tmp_path, capsys):
    old, new = results(a=4.0, b=4.0, c=4.0, d=4.0, gone=1.0), results(a=4.1, b=3.0, c=5.0, d=3.9, new=1.0)
    changes, alone = compare.compare(old, new)
    verdicts = {change.name.removeprefix("layers/")[0]: change.verdict for change in changes}
    assert verdicts == {"a": "same", "b": "worse", "c": "better", "d": "same"}
    assert changes[0].name.startswith("layers/b") and len(alone) == 2
    loud = copy.deepcopy(new)
    for row in loud["rows"]:
        row["p80_us"], row["p20_us"] = 150.0, 60.0
    assert all(change.verdict == "same" for change in compare.compare(old, loud)[0])
    for name, found in (("old", old), ("new", new)):
        (tmp_path / f"{name}.json").write_text(json.dumps(found))
    paths = [str(tmp_path / "old.json"), str(tmp_path / "new.json")]
    assert main(["bench", "--compare", *paths]) == 1
    assert "1 worse, 2 same, 1 better, 2 in one file only" in capsys.readouterr().out
    assert main(["bench", "--compare", paths[0], paths[0]]) == 0


def test_base_runs_the_same_suite_on_another_tree(tmp_path, monkeypatch):
    def git(*words):
        subprocess.run(["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *words], check=True,
                       capture_output=True)  # fmt: skip

    package = tmp_path / "sparsekit"
    (tmp_path / "kernels").mkdir()
    package.mkdir()
    (package / "__init__.py").write_text("")
    made = json.dumps(results(a=4.0))
    (package / "__main__.py").write_text(
        f"import sys, pathlib\nassert sys.argv[1:4] == ['bench', 'layers', '--quick'], sys.argv\n"
        f"pathlib.Path(sys.argv[-1]).write_text({made!r})\n"
    )
    (tmp_path / "setup.py").write_text("")
    git("init", "-q")
    git("add", "-A")
    git("commit", "-qm", "x")
    after = tmp_path / "after.json"
    after.write_text(json.dumps(results(a=2.0)))
    monkeypatch.setattr(compare, "__file__", str(package / "bench" / "compare.py"))
    changes, alone = compare.against("HEAD", ["layers", "--quick"], after)
    assert [change.verdict for change in changes] == ["worse"] and not alone
    trees = subprocess.run(["git", "-C", str(tmp_path), "worktree", "list"], capture_output=True, text=True, check=True)
    assert len(trees.stdout.splitlines()) == 1


class Reader(HTMLParser):
    """Collects tags, attributes and the cells of the table."""

    def __init__(self):
        super().__init__()
        self.tags, self.links, self.rows, self.cell = [], [], [], None

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag == "tr":
            self.rows.append([])
        self.cell = tag in ("td", "th") or (tag == "button" and self.cell)
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        if self.cell and self.rows:
            self.rows[-1][-1] += data.strip()


def test_the_page_holds_everything_itself(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    found = results(a=0.5, b=4.0)
    found["rows"] += [dict(row, name=row["name"].replace("0.1", d), density=float(d)) for row in found["rows"][:1]
                      for d in ("0.2", "0.5")]  # fmt: skip
    path = tmp_path / "r.json"
    path.write_text(json.dumps(found))
    assert main(["bench", "--page", str(tmp_path / "sub" / "p.html"), str(path)]) == 0
    text = Path(capsys.readouterr().out.strip()).read_text()
    reader = Reader()
    reader.feed(text)
    assert reader.tags.count("svg") == 2 and reader.tags.count("tr") == 5
    assert [link for link in reader.links if not link.startswith("#")] == []
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)  # names of standards, fetched by nobody
    assert not re.search(r"""@import|url\(["']?(?!#)|https?://(?!www\.w3\.org)""", text)
    assert {len(row) for row in reader.rows} == {14}
    row = next(row for row in reader.rows if row[1].startswith("b-"))
    assert row[5:8] == ["400.0", "100.0", "4.00x"] and row[11:13] == ["other <b>", "0.60x"]
    assert "abacus &amp; co" in text and "NOT TIMED layers/z: wrong" in text and "in 3 of them sparse loses" in text


CLICKS = """<script>{
const said = [], named = text => [...document.querySelectorAll('th button')].find(b => b.textContent === text);
const say = () => said.push([...document.querySelectorAll('tbody tr')].filter(r => !r.hidden)
  .map(r => r.cells[1].textContent[0]).join(''));
for (const column of ['ratio', 'ratio', 'case']) { named(column).click(); say(); }
const field = document.querySelector('input');
field.value = 'FORWARD b-'; field.dispatchEvent(new Event('input')); say();
document.body.dataset.said = said.join(' ');
}</script>"""


def test_the_page_sorts_and_filters_in_a_browser(tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("neither chromium nor google-chrome is installed")
    path = tmp_path / "p.html"
    path.write_text(page.page([results(b=4.0, a=0.5, c=11.0)]) + CLICKS)
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
               "--dump-dom", path.as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert 'data-said="abc cba abc b"' in done.stdout, done.stderr[-2000:]


def test_committed_results_make_a_page(tmp_path):
    folder = Path(bench.__file__).resolve().parents[2] / "benchmarks/results"
    others = (  # own formats
        "lenet", "tickets", "regroup", "refill", "compaction", "replicates", "guarantee", "real", "patterns"
    )  # fmt: skip
    files = [f for f in sorted(folder.glob("cpu-*/*.json")) if not f.name.startswith(others)]
    if not files:
        pytest.skip("an installed package has no results")
    for file in files:
        assert page.write_page([file], tmp_path / "p.html").stat().st_size > 1000


def test_the_suites_are_benchmarks_of_pytest_too(tmp_path):
    pytest.importorskip("pytest_benchmark")
    root = Path(bench.__file__).resolve().parents[2]
    out = tmp_path / "b.json"
    rows = tmp_path / "rows.json"
    command = [sys.executable, "-m", "pytest", "-q", "benchmarks/test_suites.py", "--suite", "overhead",
               "--rows", str(rows), "-k", "linear-8x8 and forward", f"--benchmark-json={out}",
               "-p", "no:cacheprovider"]  # fmt: skip
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(command, cwd=root, env=alone, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    found = json.loads(out.read_text())["benchmarks"]
    assert len(found) == 2 and all(b["extra_info"]["ratio"] > 0 and b["extra_info"]["error"] < 1e-5 for b in found)
    kept = read(rows)
    assert kept["rows"] == [b["extra_info"] for b in found] and kept["limits"]["1"]["flops"]


def test_the_readme_is_made_of_rows(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(Path(bench.__file__).resolve().parents[2] / "benchmarks"))
    import readme

    found = results(x=1.0)
    model = found["rows"].pop()
    for case in bench.select("hero"):
        row = dict(model, suite="hero", name=case.name, work=case.work, density=case.density, ratio=0.1 / case.density)
        found["rows"] += [dict(row, threads=2), dict(row, threads=1, ratio=99.0)]
    (tmp_path / "r.json").write_text(json.dumps(found))
    (tmp_path / "benchmarks/results").mkdir(parents=True)
    (tmp_path / "README.md").write_text(
        "a\n<!-- table -->\nbefore\n<!-- /table -->\n<!-- losses -->\n\n<!-- /losses -->\nz\n"
    )
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["readme.py", str(tmp_path / "r.json"), "--threads", "2"])
    readme.main()
    text = (tmp_path / "README.md").read_text()
    row = "| **0.20** / **0.20** | **0.50** / **0.50** | 1.0 / 1.0 | 2.0 / 2.0 | 5.0 / 5.0 |"
    assert f"| Linear 1024 → 1024, batch 64 {row}" in text
    assert "before" not in text and text.count("hero linear-784x300-b60-d0.2-step") == 1 and text.endswith("z\n")
    assert (tmp_path / "benchmarks/results/crossover.svg").read_text().startswith("<svg")

"""Every recipe runs at its smallest scale, says what it found beside the paper, and goes on where it was."""

import json

import pytest

from sparsekit.__main__ import main
from sparsekit.reproduce import RECIPES, Check, reproduce, table


@pytest.mark.parametrize("name", RECIPES)
def test_smoke(name, tmp_path, capsys):
    checks = reproduce(name, "smoke", tmp_path)
    assert checks and all(isinstance(check, Check) for check in checks)
    assert not [check for check in checks if check.passed is False]
    kept = json.loads((tmp_path / "checks.json").read_text())
    assert [check["claim"] for check in kept["checks"]] == [check.claim for check in checks]
    page = (tmp_path / "checks.md").read_text()
    assert all(check.claim in page and check.found in page for check in checks)
    capsys.readouterr()


def test_an_interrupted_run_goes_on(tmp_path):
    first = reproduce("lenet", "smoke", tmp_path)
    (tmp_path / "checks.json").unlink()
    ledger = (tmp_path / "seed_0" / "summary.json").read_bytes()
    assert reproduce("lenet", "smoke", tmp_path) == first
    assert (tmp_path / "seed_0" / "summary.json").read_bytes() == ledger


def test_command_line(tmp_path, capsys, monkeypatch):
    assert main(["reproduce"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in RECIPES)
    assert main(["reproduce", "collapse", "--scale", "smoke", "--out", str(tmp_path)]) == 0
    assert "PASS" in capsys.readouterr().out
    broken = RECIPES["collapse"].__class__("collapse", lambda setting: [Check("a", "b", "c", False)], "", "")
    monkeypatch.setitem(RECIPES, "collapse", broken)
    assert main(["reproduce", "collapse", "--scale", "smoke", "--out", str(tmp_path)]) == 1
    assert "FAIL" in capsys.readouterr().out
    assert main(["reproduce", "nothing"]) == 2
    assert "Expected a recipe of" in capsys.readouterr().err


def test_words():
    checks = [Check("one", "1", "2", True), Check("another", "3", "4", False), Check("open", "5", "6", None)]
    assert [line.split()[0] for line in table(checks).splitlines()[1:]] == ["PASS", "FAIL", "too"]
    with pytest.raises(ValueError, match="Expected a scale of smoke, short, paper"):
        reproduce("lenet", "huge")
    with pytest.raises(ValueError, match="at least 1 seed"):
        reproduce("lenet", "smoke", seeds=0)

"""What check.py reports of tests that pass, fail, skip, die and hang."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import check
import pytest
import torch
from test_sanitizer import runs_still

SUITE = """
import os, subprocess, sys, time
from pathlib import Path
import pytest

def test_first(record_property):
    record_property("error_ratio", 0.25)

def test_fails():
    assert 1 + 1 == 3, "one and one"

def test_skips():
    pytest.skip("for a reason")

def test_dies():
    os.abort()

def test_hangs():
    sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
    child = subprocess.Popen(sleep, preexec_fn=os.setpgrp)
    Path(os.environ["OUT"], "child").write_text(str(child.pid))
    time.sleep(60)

def test_last():
    pass
"""


def test_outcomes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setattr(check, "STALL_S", 20)
    monkeypatch.setattr(check, "LOG", tmp_path / "log")
    suite, path = tmp_path / "test_suite.py", tmp_path / "record.json"
    suite.write_text(SUITE)
    groups = tuple(
        check.Group(name, (str(suite), "-k", which), 120)
        for name, which in (("all", "test"), ("good", "first or last"), ("none", "skips"))
    )
    (tmp_path / "test_broken.py").write_text("import nothing_of_this_name")
    groups += (check.Group("broken", (str(tmp_path / "test_broken.py"),), 60),)
    assert not check.check(groups, path, None)
    record = json.loads(path.read_text())
    assert record == json.loads((tmp_path / "out" / "record.json").read_text())
    tests = {test["id"].split("::")[-1]: test for test in record["groups"]["all"]["tests"]}
    assert {name: test["outcome"] for name, test in tests.items()} == {
        "test_first": "passed",
        "test_fails": "failed",
        "test_skips": "skipped",
        "test_dies": "failed",
        "test_hangs": "failed",
        "test_last": "passed",
    }
    assert tests["test_fails"]["reason"].startswith("AssertionError: one and one")
    assert tests["test_skips"]["reason"] == "Skipped: for a reason"
    assert tests["test_dies"]["reason"] == "died with signal 6"
    assert tests["test_hangs"]["reason"] == "killed: no word for 20 s"
    assert not runs_still(int((tmp_path / "out" / "child").read_text()))
    printed = capsys.readouterr().out.splitlines()
    rows = [" ".join(line.split()[:4]) for line in printed]
    assert {"all 2 3 1", "good 2 0 0", "none 0 0 1", "broken 0 0 0"} <= set(rows)
    assert "No module named 'nothing_of_this_name'" in record["groups"]["broken"]["error"]
    assert "test_fails: AssertionError: one and one" in "\n".join(printed)
    assert "0.25 of allowed" in "\n".join(printed)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_why_nothing_runs() -> None:
    environment = {**os.environ, "PYTHONPATH": str(check.ROOT)}
    command = [sys.executable, check.__file__]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert done.stdout.startswith("gpu-check: nothing ran, as ") and done.stdout.count("\n") == 1

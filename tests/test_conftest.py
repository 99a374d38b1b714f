"""Which parametrisations `make test` runs, and which `make test-sample` draws."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
SUITE = """
import pytest

@pytest.mark.thinned
@pytest.mark.parametrize("backend", ["portable", "reference"])
@pytest.mark.parametrize("a", range(3))
@pytest.mark.parametrize("b", range(2))
@pytest.mark.parametrize("c", range(3))
def test_thinned(backend, a, b, c): ...

@pytest.mark.thinned
@pytest.mark.parametrize("a", range(3))
def test_of_one_parameter(a): ...

@pytest.mark.thinned
def test_without_parameters(): ...

@pytest.mark.parametrize("backend", ["portable", "reference"])
def test_whole(backend): ...

@pytest.mark.slow
@pytest.mark.parametrize("a", range(9))
def test_slow(a): ...
"""


def collected(folder: Path, *options: str) -> list[str]:
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = slow\n  thinned\n")
    (folder / "test_suite.py").write_text(SUITE)
    shutil.copy(HERE / "conftest.py", folder)
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *options]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return [line.partition("::")[2] for line in done.stdout.splitlines() if "::" in line]


def test_thinned_tests_show_every_pair_on_each_backend(tmp_path: Path) -> None:
    found = collected(tmp_path)
    shown = [name[13:-1].split("-") for name in found if name.startswith("test_thinned")]
    assert len(shown) < 2 * 18
    for backend in ("portable", "reference"):
        values = [
            (f"c{c}", f"b{b}", f"a{a}") for c, b, a, its_backend in shown if its_backend == backend
        ]
        pairs = {pair for each in values for pair in itertools.combinations(each, 2)}
        assert len(pairs) == 3 * 2 + 3 * 3 + 2 * 3
    assert [name for name in found if "thinned" not in name] == [
        *(f"test_of_one_parameter[{a}]" for a in range(3)),
        "test_without_parameters",
        "test_whole[portable]",
        "test_whole[reference]",
    ]


def test_a_sample_is_drawn_from_the_slow_tests_by_its_seed(tmp_path: Path) -> None:
    options = ("-m", "slow", "--sample", "2")
    draws = [
        collected(tmp_path, *options, f"--hypothesis-seed={seed}") for seed in ("1a", "1a", "2")
    ]
    assert draws[0] == draws[1] != draws[2]
    assert [name.partition("[")[0] for name in draws[0]] == ["test_thinned"] * 4 + ["test_slow"] * 2
    assert not set(draws[0]) & set(collected(tmp_path))

"""The kernels under compute-sanitizer: memory, races on shared memory, uninitialised memory and
barriers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
TIME_S = 80  # below the time after which check.py takes a test for hung


def find_sanitizer() -> str | None:
    """On the PATH, or in the toolkit that nvcc says it belongs to."""
    folders = [Path("/usr/local/cuda")]
    if shutil.which("nvcc"):
        told = subprocess.run(["nvcc", "--dryrun", "x.cu"], capture_output=True, text=True).stderr
        top = re.search(r"^#\$ TOP=(.*)$", told, re.MULTILINE)
        folders += [Path(top.group(1)).resolve()] if top else []
    places = [folder / name for folder in folders for name in ("bin", "compute-sanitizer")]
    path = os.pathsep.join([os.environ.get("PATH", ""), *map(str, places)])
    return shutil.which("compute-sanitizer", path=path)


@pytest.fixture(scope="module")
def runs(cuda: None) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """All tools at once, each with a process of its own."""
    sanitizer = find_sanitizer()
    if sanitizer is None:
        pytest.skip("compute-sanitizer is neither on the PATH nor in nvcc's toolkit")
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    calls = [sys.executable, str(Path(__file__).with_name("small_calls.py"))]
    options = ["--error-exitcode", "9", "--print-limit", "5"]
    processes = {
        tool: subprocess.Popen(
            [sanitizer, "--tool", tool, *options, *calls],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for tool in TOOLS
    }
    yield processes
    for process in processes.values():
        process.kill()


@pytest.mark.parametrize("tool", TOOLS)
def test_sanitizer(runs: dict[str, subprocess.Popen[str]], tool: str) -> None:
    try:
        text, _ = runs[tool].communicate(timeout=TIME_S)
    except subprocess.TimeoutExpired:
        pytest.skip(f"{tool} took longer than {TIME_S} s")
    if "Device not supported" in text:
        pytest.skip(f"compute-sanitizer: {text.strip().splitlines()[0]}")
    assert runs[tool].returncode == 0, text[-2500:]
    assert "all calls ran" in text, text[-2500:]

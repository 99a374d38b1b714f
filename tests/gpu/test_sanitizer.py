"""The kernels under compute-sanitizer: memory, races on shared memory, uninitialised memory and
barriers."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
TIME_S = 80  # below the time after which check.py takes a test for hung


def find_sanitizer() -> str | None:
    """On the PATH, or in the toolkit that nvcc belongs to."""
    folders = [Path("/usr/local/cuda")]
    if shutil.which("nvcc"):
        dryrun = subprocess.run(["nvcc", "--dryrun", "x.cu"], capture_output=True, text=True).stderr
        top = re.search(r"^#\$ TOP=(.*)$", dryrun, re.MULTILINE)
        folders += [Path(top.group(1)).resolve()] if top else []
    places = [folder / name for folder in folders for name in ("bin", "compute-sanitizer")]
    path = os.pathsep.join([os.environ.get("PATH", ""), *map(str, places)])
    return shutil.which("compute-sanitizer", path=path)


def start(command: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    """In a process group of its own, to be killed together with what it starts."""
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=os.setpgrp,
    )


def kill(process: subprocess.Popen[str]) -> None:
    """The process and what it started, also where it has ended itself."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def runs(cuda: None) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """All tools at once, each in a process of its own."""
    sanitizer = find_sanitizer()
    if sanitizer is None:
        pytest.skip("compute-sanitizer is neither on the PATH nor in nvcc's toolkit")
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    calls = [sys.executable, str(Path(__file__).with_name("small_calls.py"))]
    options = ["--error-exitcode", "9", "--print-limit", "5"]
    processes = {
        tool: start([sanitizer, "--tool", tool, *options, *calls], environment) for tool in TOOLS
    }
    yield processes
    for process in processes.values():
        kill(process)


FAKE = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
time.sleep(float(sys.argv[1]))
"""


@pytest.mark.parametrize("seconds", [60, 0])
def test_a_killed_sanitizer_takes_its_child_along(seconds: int) -> None:
    """While it runs, and where it has ended before its child."""
    process = start([sys.executable, "-c", FAKE, str(seconds)], dict(os.environ))
    assert process.stdout is not None
    child = int(process.stdout.readline())
    if seconds == 0:
        process.wait()
    assert runs_still(child)
    kill(process)
    end = time.time() + 10
    while runs_still(child) and time.time() < end:
        time.sleep(0.05)
    assert not runs_still(child) and process.poll() is not None


def runs_still(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"  # killed, and nobody has asked how it ended


@pytest.mark.parametrize("tool", TOOLS)
def test_sanitizer(runs: dict[str, subprocess.Popen[str]], tool: str) -> None:
    try:
        text, _ = runs[tool].communicate(timeout=TIME_S)
    except subprocess.TimeoutExpired:
        kill(runs[tool])
        pytest.skip(f"{tool} took longer than {TIME_S} s")
    if "Device not supported" in text:
        pytest.skip(f"compute-sanitizer: {text.strip().splitlines()[0]}")
    assert runs[tool].returncode == 0, text[-2500:]
    assert "all calls ran" in text, text[-2500:]

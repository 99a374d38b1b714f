"""What ``make gpu-check`` and ``make gpu-bench`` share: the build for the GPU that is here, a
process under time limits, and records that outlive a hang or a kill."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MESSAGE_CHARS = 3000
BUILD_S = 150


def places(path: Path) -> list[Path]:
    """Where a record is kept: here, and under $OUT."""
    folders = [path.parent, *map(Path, filter(None, [os.environ.get("OUT")]))]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    return [folder / path.name for folder in folders]


def save(record: dict[str, Any], path: Path) -> None:
    """Whole or not at all."""
    text = json.dumps(record, indent=1)
    for target in places(path):
        partial = target.with_suffix(".partial")
        partial.write_text(text)
        partial.replace(target)


def save_log(log: Path) -> None:
    if os.environ.get("OUT") and log.exists():
        shutil.copy(log, os.environ["OUT"])


def output_of(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 and done.stdout.strip() else None


def smi(query: str) -> str | None:
    """What nvidia-smi answers of the GPU that this process uses."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0] or "0"
    return output_of("nvidia-smi", f"--id={visible}", query, "--format=csv,noheader")


def why_nothing_runs() -> str | None:
    try:
        import torch
    except ImportError as error:
        return f"torch cannot be imported ({error})"
    if not torch.backends.cuda.is_built():
        return f"torch {torch.__version__} is a build without CUDA"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device that it can use"
    return None


def architecture_here() -> str:
    """What the kernels are built for here, as in TORCH_CUDA_ARCH_LIST."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}" + ("a" if major == 9 else "")


def context_lives() -> bool:
    import torch

    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def environment(**variables: str) -> dict[str, str]:
    """A process's own that works on this tree, installed or not."""
    path = filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))
    here = {"PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join(path)}
    return {**os.environ, **here, **variables}


def kill_session(leader: int) -> None:
    """Kill every process of the session that ``leader`` began, whatever process group it is in."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            session = int(path.read_text().rpartition(")")[2].split()[3])
            if session == leader:
                os.kill(int(path.parent.name), signal.SIGKILL)


def run_process(
    command: list[str],
    seconds: float,
    log: Path,
    watch: Path | None = None,
    stall_s: float = 0,
    **variables: str,
) -> tuple[int, str | None]:
    """Run to the log; the exit status, and why it was killed or died, if it did not exit. Killed
    after ``seconds``, and where ``watch`` stays as it is for ``stall_s``. What the process started
    ends with it."""
    log.parent.mkdir(exist_ok=True)
    begin = time.time()
    with log.open("a") as output:
        print(f"\n$ {' '.join(command)}", file=output, flush=True)
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(**variables),
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        killed = None
        while process.poll() is None and killed is None:
            time.sleep(0.1)
            last_word = max(begin, watch.stat().st_mtime if watch else time.time())
            if time.time() - begin > seconds:
                killed = f"killed: out of time after {seconds:.0f} s"
            elif watch and time.time() - last_word > stall_s:
                killed = f"killed: no word for {stall_s} s"
        kill_session(process.pid)
    status = process.wait()
    if killed is not None:
        return status, killed
    return status, f"died with signal {-status}" if status < 0 else None


def build(architecture: str, log: Path, host_model: bool = False) -> dict[str, Any]:
    """Build the kernels, or the host model beside them, as far as their sources are newer: the
    outcome, and where it failed the compiler's words."""
    begin = time.time()
    status, killed = run_process(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        BUILD_S,
        log,
        COGVIEW_KERNELS_CUDA="1",
        COGVIEW_KERNELS_HOST_MODEL=str(int(host_model)),
        TORCH_CUDA_ARCH_LIST=architecture,
        MAX_JOBS=str(os.cpu_count()),
    )
    row: dict[str, Any] = {"outcome": "passed", "seconds": round(time.time() - begin, 1)}
    if status != 0:
        lines = log.read_text()[-MESSAGE_CHARS:].strip().splitlines()
        errors = [line for line in lines if re.search("error|^cogview_kernels:", line)] or lines
        row |= {"outcome": "failed", "reason": killed or errors[0], "text": "\n".join(lines)}
    return row

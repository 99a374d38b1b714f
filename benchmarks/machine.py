"""The machine, the commit and the versions that a record is of; records that survive a hang or a
kill; processes under a time limit. ``make gpu-check`` uses it before torch is known to work."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MESSAGE_CHARS = 3000
BUILD_S = 150
START_S = 60  # of a process, beyond the time that it may then be silent
PACKAGES = ("triton", "flash-attn-4", "flash-attn-3", "liger-kernel", "quack-kernels", "numpy")


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def record_name(stem: str, machine: dict[str, Any], commit: dict[str, Any], date: str) -> str:
    """``<stem>-<device>-<date>-<commit>.json``"""
    device = re.sub(r"\W+", "-", machine["device"]).strip("-").lower()
    return f"{stem}-{device}-{date[:10]}-{commit['id'][:7]}.json"


def new_path(path: Path) -> Path:
    """``path``, numbered if there is a file already."""
    first, number = path, 2
    while path.exists():
        path, number = first.with_stem(f"{first.stem}-{number}"), number + 1
    return path


def save_record(record: dict[str, Any], path: Path) -> None:
    """Writes a complete file or none, and a copy to ``$OUT``. Each element of a list has a line of
    its own, so that a difference of two records can be read."""
    fields = []
    for name, value in record.items():
        text = json.dumps(value, indent=1).replace("\n", "\n ")
        if isinstance(value, list) and value:
            text = "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]"
        fields.append(f" {json.dumps(name)}: {text}")
    for folder in (path.parent, *map(Path, filter(None, [os.environ.get("OUT")]))):
        folder.mkdir(parents=True, exist_ok=True)
        partial = (folder / path.name).with_suffix(".partial")
        partial.write_text("{\n" + ",\n".join(fields) + "\n}\n")
        partial.replace(folder / path.name)


def save_log(log: Path) -> None:
    if os.environ.get("OUT") and log.exists():
        shutil.copy(log, os.environ["OUT"])


def output_of(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 and done.stdout.strip() else None


def smi(*fields: str) -> dict[str, str]:
    """What nvidia-smi answers about the GPU that this process uses; empty without nvidia-smi."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0] or "0"
    query = f"--query-gpu={','.join(fields)}"
    answer = output_of("nvidia-smi", f"--id={visible}", query, "--format=csv,noheader")
    return dict(zip(fields, answer.split(", "), strict=False)) if answer else {}


def clocks() -> dict[str, str]:
    """Of the GPU, at this moment."""
    return smi("clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "temperature.gpu")


def machine_info(device: torch.device) -> dict[str, Any]:
    """The machine and its software; nothing that names the host."""
    import torch

    cpuinfo = Path("/proc/cpuinfo")
    brand = cpuinfo.exists() and re.search(r"model name\s*: (.+)", cpuinfo.read_text())
    versions: dict[str, str] = {"torch": str(torch.__version__)}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    if torch.version.cuda:
        versions |= {"cuda": torch.version.cuda, "cudnn": str(torch.backends.cudnn.version())}
    if nvcc := re.search(r"release \S+ ([^\s,]+)", output_of("nvcc", "--version") or ""):
        versions["nvcc"] = nvcc.group(1)
    info: dict[str, Any] = {
        "device": brand.group(1) if brand else platform.processor() or platform.machine(),
        "device_type": device.type,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "torch": versions["torch"],
        "versions": versions,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        info |= smi("driver_version", "power.limit") | {"clocks": clocks()}
        info |= {
            "device": properties.name,
            "compute_capability": [properties.major, properties.minor],
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
        }
    return info


def commit_info() -> dict[str, Any]:
    """Git's, else ``$COMMIT`` for a copy of the sources without their history."""
    commit = output_of("git", "rev-parse", "HEAD")
    changes = output_of("git", "status", "--porcelain", "-uno", "--", ":!benchmarks/results")
    return {
        "id": commit or os.environ.get("COMMIT") or "unknown",
        "time": output_of("git", "show", "-s", "--format=%cI"),
        "dirty": bool(changes) if commit else None,  # None: working-tree state unknown
    }


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
    """Whether this process can still use the GPU."""
    import torch

    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def kill_session(leader: int) -> None:
    """Kills every process of the session that ``leader`` began, in whatever process group."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            if int(path.read_text().rpartition(")")[2].split()[3]) == leader:
                os.kill(int(path.parent.name), signal.SIGKILL)


def run_process(
    command: list[str],
    seconds: float,
    log: Path,
    watch: Path | None = None,
    stall_s: float = 0,
    **variables: str,
) -> tuple[int, str | None]:
    """Runs a command on this tree, installed or not. Its output goes to the log. It is killed after
    ``seconds``, or when ``watch`` was not written for ``stall_s``, with all that it started.

    Returns:
        The exit status, and why it was killed or died, if it did not exit.
    """
    log.parent.mkdir(exist_ok=True)
    begin = time.time()
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    env = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": path, **variables}
    killed = None
    with log.open("a") as out:
        print(f"\n$ {' '.join(command)}", file=out, flush=True)
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=out, stderr=out, start_new_session=True
        )
        try:
            while process.poll() is None and killed is None:
                time.sleep(0.1)
                written = watch.stat().st_mtime if watch else time.time()
                written = written if written > begin else begin + START_S
                if time.time() > begin + seconds:
                    killed = f"killed: out of time after {seconds:.0f} s"
                elif time.time() > written + stall_s and watch:
                    killed = f"killed: no word for {stall_s} s"
        finally:
            kill_session(process.pid)
    status = process.wait()
    return status, killed or (f"died with signal {-status}" if status < 0 else None)


def build(architecture: str, log: Path, host_model: bool = False) -> dict[str, Any]:
    """Builds the kernels, or the host model beside them, as far as their sources are newer.

    Returns:
        The outcome, and the compiler's words if it failed.
    """
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

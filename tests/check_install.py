"""Installs the package in fresh virtual environments, in every way that is supported, and uses it.

    python tests/check_install.py [case ...]

Needs no package but a Python with venv and pip; downloads torch once per environment.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

USE = """
import torch, cogview_kernels as ck
from cogview_kernels import extension
q, k, v = (torch.randn(2, 4, 96, 16, requires_grad=True) for _ in range(3))
layout = ck.ThreeRegionLayout(5, ck.sample_pivots(5, 96, 8), query_window=16)
out = ck.three_region_attention(q, k, v, layout)
out.sum().backward()
dense = ck.three_region_attention(q, k, v, layout, backend="reference")
assert (out - dense).abs().max() < 1e-5
y = torch.ops.cogview_kernels.pb_relax_layer_norm(torch.randn(3, 8), None, None, 1e-5, 1)[0]
assert y.isfinite().all()
print("kernels for:", ", ".join(extension.architectures()) or extension.why_not_built())
assert bool(extension.architectures()) == {kernels}
for operator in ("pb_relax_layer_norm_forward_out", "three_region_attention_forward_out"):
    name = f"cogview_kernels::{operator}"
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA") == {kernels}, name
"""


class Environment:
    """A bare virtual environment and the processes run in it."""

    def __init__(self, folder: Path, hide_nvcc: bool = False) -> None:
        self.python = folder / "venv" / "bin" / "python"
        self.work = folder
        self.variables = {
            name: value
            for name, value in os.environ.items()
            if name not in ("PYTHONPATH", "CUDA_HOME", "CUDA_PATH", "VIRTUAL_ENV")
        }
        if hide_nvcc:
            self.variables["PATH"] = os.pathsep.join(
                entry
                for entry in self.variables["PATH"].split(os.pathsep)
                if not (Path(entry) / "nvcc").exists()
            )
            tools = folder / "tools"  # what stood beside nvcc and is still needed
            tools.mkdir()
            for name in ("c++", "g++", "cc", "ninja"):
                found = shutil.which(name)
                if found and not shutil.which(name, path=self.variables["PATH"]):
                    (tools / name).symlink_to(found)
            self.variables["PATH"] += os.pathsep + str(tools)
        subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)

    @property
    def has_nvcc(self) -> bool:
        return shutil.which("nvcc", path=self.variables["PATH"]) is not None

    def run(self, *arguments: str | Path, expect: int = 0, **variables: str) -> str:
        process = subprocess.run(
            [self.python, *arguments],
            cwd=self.work,
            env=self.variables | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if process.returncode != expect:
            print(process.stdout)
            raise SystemExit(f"{arguments}: expected exit {expect}, got {process.returncode}")
        return process.stdout

    def pip(self, *arguments: str | Path, expect: int = 0, **variables: str) -> str:
        return self.run("-m", "pip", "install", *arguments, expect=expect, **variables)

    def use(self, kernels: bool | None = None) -> None:
        kernels = self.has_nvcc if kernels is None else kernels
        print("  ", self.run("-c", USE.replace("{kernels}", str(kernels))).strip())
        report = self.run("-m", "cogview_kernels")
        assert "portable path" in report, report


def checkout(folder: Path) -> Path:
    """The files that git tracks, without anything built."""
    target = folder / "source"
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    for name in names.stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


def with_isolation(folder: Path) -> None:
    environment = Environment(folder)
    environment.pip("-q", "-c", ROOT / "constraints.txt", "torch")
    environment.pip("-q", "-c", ROOT / "constraints.txt", checkout(folder))
    environment.use()


def without_isolation(folder: Path) -> None:
    environment = Environment(folder)
    constraints = ("-q", "-c", ROOT / "constraints.txt")
    environment.pip(*constraints, "torch", "setuptools", "ninja", "pybind11")
    environment.pip(*constraints, "--no-build-isolation", f"{checkout(folder)}[cogview]")
    environment.use()
    assert "demo" in environment.run("-m", "cogview", "--help")


def without_nvcc(folder: Path) -> None:
    environment = Environment(folder, hide_nvcc=True)
    environment.pip("-q", "-c", ROOT / "constraints.txt", "torch")
    source = checkout(folder)
    said = environment.pip(source, COGVIEW_KERNELS_CUDA="1", expect=1)
    assert "there is no nvcc" in said, said
    environment.pip("-q", "-c", ROOT / "constraints.txt", source)
    environment.use(kernels=False)


def sdist_wheel_install(folder: Path) -> None:
    environment = Environment(folder)
    constraints = ("-q", "-c", ROOT / "constraints.txt")
    environment.pip(*constraints, "torch", "build", "setuptools", "ninja", "pybind11")
    environment.run(
        "-m", "build", "--no-isolation", "--sdist", "--outdir", folder, checkout(folder)
    )
    (sdist,) = folder.glob("*.tar.gz")
    environment.run(
        "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, sdist
    )
    (wheel,) = folder.glob("*.whl")
    environment.pip(*constraints, wheel)
    environment.use()


CASES = {
    case.__name__: case
    for case in (with_isolation, without_isolation, without_nvcc, sdist_wheel_install)
}


def main() -> None:
    for name in sys.argv[1:] or CASES:
        start = time.monotonic()
        print(f"{name} ...", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            CASES[name](Path(folder))
        print(f"{name}: passed in {time.monotonic() - start:.0f} s", flush=True)
    print(f"{len(sys.argv[1:] or CASES)} passed, 0 failed")


if __name__ == "__main__":
    main()

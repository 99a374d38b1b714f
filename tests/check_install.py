"""Installs the package in fresh virtual environments, in every supported way, and uses it.

    python tests/check_install.py [case ...]

Needs only a Python with venv and pip. torch is installed once; each case starts from a copy of that
environment. Kernels are compiled for one architecture: `make build` compiles them for all.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("cogview_kernels", "cogview")
ARCHITECTURE = "9.0a"
CONSTRAINTS = ("-q", "-c", str(ROOT / "constraints.txt"))

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
assert extension._C is not None, extension.why_not_built()
assert list(extension.architectures()) == {architectures}
for operator in ("pb_relax_layer_norm_forward_out", "three_region_attention_forward_out"):
    name = f"cogview_kernels::{operator}"
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA") == bool({architectures})
"""

# Prints where a package was imported from.
LOCATE = "import importlib, sys; print(importlib.import_module(sys.argv[1]).__path__[0])"


class Environment:
    """A virtual environment with torch and nothing else, and the processes that run in it."""

    def __init__(self, folder: Path, with_torch: Path, hide_nvcc: bool = False) -> None:
        self.folder = folder
        self.python = folder / "venv" / "bin" / "python"
        self.variables = {
            name: value
            for name, value in os.environ.items()
            if name not in ("PYTHONPATH", "CUDA_HOME", "CUDA_PATH", "VIRTUAL_ENV")
        }
        self.variables["TORCH_CUDA_ARCH_LIST"] = ARCHITECTURE
        if hide_nvcc:
            self.variables["PATH"] = os.pathsep.join(
                entry
                for entry in self.variables["PATH"].split(os.pathsep)
                if not (Path(entry) / "nvcc").exists()
            )
            tools = folder / "tools"  # programs that lay beside nvcc and are still needed
            tools.mkdir()
            for name in ("c++", "g++", "cc", "ninja"):
                found = shutil.which(name)
                if found and not shutil.which(name, path=self.variables["PATH"]):
                    (tools / name).symlink_to(found)
            self.variables["PATH"] += os.pathsep + str(tools)
        shutil.copytree(with_torch, folder / "venv", symlinks=True, copy_function=os.link)

    @property
    def has_nvcc(self) -> bool:
        return shutil.which("nvcc", path=self.variables["PATH"]) is not None

    def run(self, *arguments: str | Path, expect: int = 0, **variables: str) -> str:
        process = subprocess.run(
            [self.python, *arguments],
            cwd=self.folder,
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

    def check(self, kernels: bool | None = None) -> None:
        """Use the installed package, and look for each module of the checkout in it."""
        kernels = self.has_nvcc if kernels is None else kernels
        architectures = [ARCHITECTURE] if kernels else []
        program = USE.replace("{architectures}", repr(architectures))
        print(f"  {self.folder.name}: {self.run('-c', program).strip()}")
        report = self.run("-m", "cogview_kernels")
        assert "portable path" in report, report
        for package in PACKAGES:
            installed = Path(self.run("-c", LOCATE, package).strip())
            assert installed.is_relative_to(self.folder / "venv"), installed
            missing = tracked_files(package) - files_below(installed)
            assert not missing, f"{package}: not installed: {missing}"


def tracked_files(folder: str) -> set[str]:
    """Relative to the folder; those that git tracks and that are there."""
    command = ["git", "ls-files", "-z", folder]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    names = [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]
    return {Path(name).relative_to(folder).as_posix() for name in names}


def files_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def checkout(folder: Path) -> Path:
    """The files that git tracks, without anything built."""
    target = folder / "source"
    for name in tracked_files("."):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target / name)
    return target


def with_isolation(folder: Path, with_torch: Path) -> None:
    environment = Environment(folder, with_torch)
    environment.pip(*CONSTRAINTS, checkout(folder))
    environment.check()


def sdist_without_isolation(folder: Path, with_torch: Path) -> None:
    """A source distribution, a wheel from it, and the wheel with an extra, without isolation."""
    environment = Environment(folder, with_torch)
    environment.pip(*CONSTRAINTS, "build", "setuptools", "ninja", "pybind11")
    source = checkout(folder)
    environment.run("-m", "build", "--no-isolation", "--sdist", "--outdir", folder, source)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    for part in ("csrc", *PACKAGES):
        missing = {f"{part}/{name}" for name in tracked_files(part)} - packed
        assert not missing, f"not in the source distribution: {missing}"
    environment.run(
        "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, sdist
    )
    (wheel,) = folder.glob("*.whl")
    environment.pip(*CONSTRAINTS, f"{wheel}[cogview]")
    environment.check()
    assert "demo" in environment.run("-m", "cogview", "--help")


def without_nvcc(folder: Path, with_torch: Path) -> None:
    environment = Environment(folder, with_torch, hide_nvcc=True)
    source = checkout(folder)
    output = environment.pip(source, COGVIEW_KERNELS_CUDA="1", expect=1)
    assert "there is no nvcc" in output, output
    environment.pip(*CONSTRAINTS, source)
    environment.check(kernels=False)


CASES = {case.__name__: case for case in (with_isolation, sdist_without_isolation, without_nvcc)}


def main() -> None:
    names = sys.argv[1:] or list(CASES)
    start = time.monotonic()

    def seconds() -> str:
        return f"{time.monotonic() - start:.0f} s"

    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(2) as pool:
        with_torch = Path(temporary) / "with_torch"
        subprocess.run([sys.executable, "-m", "venv", with_torch], check=True)
        install = [with_torch / "bin" / "python", "-m", "pip", "install", *CONSTRAINTS, "torch"]
        subprocess.run(install, check=True)
        print(f"installed torch in {seconds()}", flush=True)

        def run(name: str) -> None:
            folder = Path(temporary) / name
            folder.mkdir()
            CASES[name](folder, with_torch)
            print(f"{name}: passed after {seconds()}", flush=True)

        for result in [pool.submit(run, name) for name in names]:
            result.result()
    print(f"{len(names)} passed, 0 failed")


if __name__ == "__main__":
    main()

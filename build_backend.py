"""setuptools' build backend, asking for torch only where the target environment has none.

Kernels are compiled against the torch that is already installed, whether or not pip isolates the
build, so that `pip install .` neither downloads a second torch nor builds against another one.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (the hooks that stay as they are)

TORCH_REQUIREMENT = "torch>=2.10"


def find_nvcc() -> tuple[str | None, str | None]:
    """CUDA_HOME (or CUDA_PATH) where it is set, and the nvcc: the one under it, else, where it is
    not set, the one on the PATH."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return home, shutil.which(str(Path(home) / "bin" / "nvcc") if home else "nvcc")


def find_torch() -> Path | None:
    """The folder of the installed torch, seen from inside an isolated build too."""
    spec = find_spec("torch")
    if spec is not None and spec.origin is not None:
        return Path(spec.origin).parent
    prefixes = [sys.prefix]
    settings = Path(sys.prefix) / "pyvenv.cfg"
    shared = r"(?im)^include-system-site-packages\s*=\s*true"
    if settings.is_file() and re.search(shared, settings.read_text()):
        prefixes.append(sys.base_prefix)
    for prefix in prefixes:
        for scheme in ("purelib", "platlib"):
            folder = Path(sysconfig.get_path(scheme, vars={"base": prefix, "platbase": prefix}))
            if (folder / "torch" / "version.py").is_file():
                return folder / "torch"
    return None


def torch_version(torch_folder: Path) -> str:
    text = (torch_folder / "version.py").read_text()
    match = re.search(r"__version__ = ['\"]([^'\"]+)", text)
    if match is None:
        raise RuntimeError(f"{torch_folder / 'version.py'}: no __version__ found")
    return match.group(1)


def _with_torch(requirements: list[str]) -> list[str]:
    wanted = os.environ.get("COGVIEW_KERNELS_CUDA", "auto") != "0" and find_nvcc()[1] is not None
    if not wanted or find_torch() is not None:
        return requirements
    return [*requirements, TORCH_REQUIREMENT]


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return _with_torch(build_meta.get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return _with_torch(build_meta.get_requires_for_build_editable(config_settings))

"""Builds `cogview_kernels._C` with ninja: kernels (nvcc, no torch header), operators (torch's
stable ABI) and hooks (pybind11). For tests also `cogview_kernels._host_model`: the same kernels and
operators, compiled for the CPU (csrc/host_model/).

Environment: COGVIEW_KERNELS_CUDA=auto|0|1 (auto: kernels where nvcc is found; 1: fail where it is
not), TORCH_CUDA_ARCH_LIST, MAX_JOBS, DEBUG=1, CUDA_HOME, CXX; COGVIEW_KERNELS_HOST_MODEL=1 (build
`_host_model` too), COGVIEW_KERNELS_SANITIZE=1 (and with AddressSanitizer and UBSan in place of its
own checks of plain accesses; `make sanitize` shows how to load it).
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).parent))
from build_backend import find_nvcc, find_torch, torch_version

ROOT = Path(__file__).parent.resolve()
DEFAULT_ARCHITECTURES = ("8.0", "9.0a", "10.0", "12.0+PTX")
STABLE_ONLY = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY"]  # torch 2.10
OWN_PATHS = (
    f"-ffile-prefix-map={ROOT}/="  # errors name csrc/operators/operators.cpp, wherever it was built
)

# The host model. Kernels keep the accesses that their source makes, one hook each; they alias as
# freely as nvcc lets them. The model itself is not instrumented.
HOST_MODEL = ["-std=c++20", "-DCOGVIEW_HOST_MODEL", "-fPIC", "-fvisibility=hidden", "-g1", "-Wall"]
HOST_MODEL += ["-fno-strict-aliasing", "-ffp-contract=off", "-Wno-unknown-pragmas"]
HOST_MODEL_HOOKS = ["-O2", "-fsanitize=thread", "-fno-tree-vectorize", "-fno-tree-slp-vectorize"]
HOST_MODEL_HOOKS += ["-fno-store-merging", "-fno-tree-loop-distribute-patterns"]
HOST_MODEL_HOOKS += ["--param", "tsan-instrument-func-entry-exit=0"]
HOST_MODEL_SANITIZE = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]


class BuildError(SystemExit):
    def __init__(self, message: str) -> None:
        super().__init__(f"cogview_kernels: {message}")


@dataclass(frozen=True)
class Cuda:
    """The CUDA toolkit that compiles the kernels, and what it compiles them for."""

    nvcc: str
    root: Path
    architectures: tuple[str, ...]

    @classmethod
    def find(cls) -> Cuda | None:
        """The toolkit of CUDA_HOME, else the nvcc on the PATH; None where kernels are not wanted
        or cannot be built."""
        wish = os.environ.get("COGVIEW_KERNELS_CUDA", "auto").lower()
        if wish not in ("auto", "0", "1"):
            raise BuildError(f"COGVIEW_KERNELS_CUDA: expected auto, 0 or 1, got {wish!r}")
        if wish == "0":
            return None
        home, nvcc = find_nvcc()
        if nvcc is None:
            if wish == "1":
                where = f"under CUDA_HOME={home}" if home else "on the PATH"
                raise BuildError(
                    f"COGVIEW_KERNELS_CUDA=1 but there is no nvcc {where}: install a CUDA "
                    "toolkit (12.4 or later) and set CUDA_HOME to it"
                )
            return None
        # nvcc may be a wrapper script: it says itself where its toolkit lies.
        dryrun = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True).stderr
        match = re.search(r"^#\$ TOP=(.*)$", dryrun, re.MULTILINE)
        root = Path(match.group(1)).resolve() if match else Path(nvcc).resolve().parents[1]
        return cls(nvcc, root, cls._architectures(nvcc))

    @staticmethod
    def _architectures(nvcc: str) -> tuple[str, ...]:
        known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout
        # Variants of an architecture (9.0a) are not always listed; their base is.
        supported = set(re.findall(r"sm_(\d+)", known))
        asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
        chosen = []
        for architecture in dict.fromkeys(asked or DEFAULT_ARCHITECTURES):
            match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", architecture)
            if match is None:
                raise BuildError(
                    "TORCH_CUDA_ARCH_LIST: expected entries such as 8.0, 9.0a or 12.0+PTX, "
                    f"got {architecture!r}"
                )
            if match.group(1) + match.group(2) in supported:
                chosen.append(architecture)
            elif asked:
                raise BuildError(f"TORCH_CUDA_ARCH_LIST: {nvcc} does not support {architecture}")
        if not chosen:
            raise BuildError(f"{nvcc} supports none of {', '.join(DEFAULT_ARCHITECTURES)}")
        if not asked and not any(architecture.endswith("+PTX") for architecture in chosen):
            # An older nvcc: GPUs that it does not know get PTX of the newest plain architecture.
            plain = [name for name in chosen if name[-1].isdigit()]
            if plain:
                chosen[chosen.index(max(plain, key=float))] += "+PTX"
        return tuple(chosen)

    def flags(self, debug: bool) -> list[str]:
        flags = ["-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden"]
        flags += ["-O0", "-G"] if debug else ["-O3", "-lineinfo", "-Xptxas=-v"]
        for architecture in self.architectures:
            number = architecture.removesuffix("+PTX").replace(".", "")
            flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
            if architecture.endswith("+PTX"):
                flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
        return flags


class NinjaBuild(build_ext):
    """Writes one build.ninja and runs it."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.force = True  # ninja knows what is new; copying by age would keep an older module

    def build_extension(self, extension: Extension) -> None:
        compiler = shlex.split(os.environ.get("CXX") or "c++")
        if extension.name.endswith("._host_model"):
            self._build_host_model(extension, compiler)
            return
        cuda = Cuda.find()
        debug = os.environ.get("DEBUG", "0") == "1"
        if shutil.which(compiler[0]) is None:
            if cuda is not None:
                raise BuildError(f"no C++ compiler: {compiler[0]!r} is not on the PATH (set CXX)")
            print("cogview_kernels: no C++ compiler; installing pure Python, portable path only")
            extension.optional = True  # nothing to copy
            return
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        objects = self._write_ninja(build, target, cuda, compiler, debug)
        # Kernels first: hooks.cpp embeds what ptxas reports of them.
        kernels = [name for name in objects if name.endswith(".cu.o")]
        self._run_ninja(build, kernels)
        logs = [build / f"{name}.log" for name in kernels] if not debug else []
        resources = kernel_resources(logs)
        check_resources(logs, resources)
        _write_if_changed(build / "kernel_resources.inc", f'R"json({json.dumps(resources)})json"\n')
        self._run_ninja(build, [str(target)])
        if cuda is None:
            print("cogview_kernels: built without CUDA kernels (no nvcc, or not wanted)")
        else:
            print(f"cogview_kernels: built CUDA kernels for {', '.join(cuda.architectures)}")

    def _write_ninja(
        self, build: Path, target: Path, cuda: Cuda | None, compiler: list[str], debug: bool
    ) -> list[str]:
        """Describe the build to ninja; the names of the object files."""
        sources = [ROOT / "csrc" / "hooks.cpp"]
        includes = [build, _pybind11(), sysconfig.get_path("include")]
        defines, link, torch = [], [], "none"
        if cuda is not None:
            torch_folder, torch = _torch()
            sources += [
                ROOT / "csrc" / "operators" / "operators.cpp",
                *sorted((ROOT / "csrc").rglob("*.cu")),
            ]
            includes += [torch_folder / "include", cuda.root / "include"]
            names = ",".join(cuda.architectures)
            defines = [
                "-DCOGVIEW_KERNELS_CUDA",
                f'-DCOGVIEW_KERNELS_ARCHITECTURES="{names}"',
                *STABLE_ONLY,
            ]
            found = [*cuda.root.glob("lib*"), *cuda.root.glob("targets/*/lib")]
            found = [folder for folder in found if (folder / "libcudart_static.a").is_file()]
            if not found:
                raise BuildError(f"there is no libcudart_static.a under {cuda.root}")
            libraries = found[0]
            # libtorch must be named as needed: weak symbols are looked up in it.
            link = [f"-L{libraries}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
            link += _link_torch(torch_folder)
        defines.append(f'-DCOGVIEW_KERNELS_TORCH="{torch}"')

        host = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", OWN_PATHS]
        host += ["-O0", "-g"] if debug else ["-O2"]
        host += [*defines, *(f"-isystem{folder}" for folder in includes)]
        lines = [
            "ninja_required_version = 1.5",
            "rule cxx",
            f"  command = {_command(compiler, host)} -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = {_command(compiler, ['-shared'])} $in -o $out {_command(link)}",
        ]
        if cuda is not None:
            nvcc = _command([cuda.nvcc], cuda.flags(debug))
            lines += [
                "rule nvcc",
                f"  command = {nvcc} -MD -MF $out.d -c $in -o $out > $out.log 2>&1 "
                "|| { cat $out.log; exit 1; }",
                "  depfile = $out.d",
                "  deps = gcc",
            ]
        objects = []
        for source in sources:
            name = f"{source.relative_to(ROOT).as_posix().replace('/', '.')}.o"
            rule = "nvcc" if source.suffix == ".cu" else "cxx"
            # hooks.cpp embeds the table that is written between the two runs.
            also = " | kernel_resources.inc" if source.stem == "hooks" else ""
            lines.append(f"build {name}: {rule} {_escape(source)}{also}")
            objects.append(name)
        lines.append(f"build {_escape(target)}: link {' '.join(objects)}")
        _write_if_changed(build / "build.ninja", "\n".join(lines) + "\n")
        return objects

    def _build_host_model(self, extension: Extension, compiler: list[str]) -> None:
        torch_folder, _ = _torch()
        sanitize = os.environ.get("COGVIEW_KERNELS_SANITIZE", "0") == "1"
        build = Path(self.build_temp).resolve() / (
            "host_model_sanitize" if sanitize else "host_model"
        )
        build.mkdir(parents=True, exist_ok=True)
        includes = [torch_folder / "include", _pybind11(), sysconfig.get_path("include")]
        flags = [
            *HOST_MODEL,
            OWN_PATHS,
            *STABLE_ONLY,
            *(f"-isystem{folder}" for folder in includes),
        ]
        instrumented = HOST_MODEL_SANITIZE if sanitize else HOST_MODEL_HOOKS
        link = [*(HOST_MODEL_SANITIZE if sanitize else []), "-lpthread", *_link_torch(torch_folder)]
        lines = ["ninja_required_version = 1.5"]
        rules = {
            "kernel": [*instrumented, "-x", "c++"],
            "cxx": HOST_MODEL_SANITIZE if sanitize else ["-O3"],
        }
        for rule, more in rules.items():
            lines += [
                f"rule {rule}",
                f"  command = {_command(compiler, flags, more)} -MMD -MF $out.d -c $in -o $out",
                "  depfile = $out.d",
                "  deps = gcc",
            ]
        lines += [
            "rule link",
            f"  command = {_command(compiler, ['-shared'])} $in -o $out {_command(link)}",
        ]
        csrc = ROOT / "csrc"
        objects = []
        for source in [
            csrc / "operators" / "operators.cpp",
            *csrc.glob("host_model/*.cpp"),
            *csrc.rglob("*.cu"),
        ]:
            name = f"{source.relative_to(csrc).as_posix().replace('/', '.')}.o"
            rule = "kernel" if source.suffix == ".cu" else "cxx"
            lines.append(f"build {name}: {rule} {_escape(source)}")
            objects.append(name)
        lines.append(f"build _host_model.so: link {' '.join(sorted(objects))}")
        _write_if_changed(build / "build.ninja", "\n".join(lines) + "\n")
        self._run_ninja(build, ["_host_model.so"])
        # Copied, since the two ways of building share the target.
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(".partial")
        shutil.copyfile(build / "_host_model.so", partial)
        partial.replace(target)
        print(f"cogview_kernels: built the host model{' with sanitizers' if sanitize else ''}")

    def _run_ninja(self, build: Path, targets: list[str]) -> None:
        if not targets:
            return
        try:
            from ninja import BIN_DIR

            ninja = str(Path(BIN_DIR) / "ninja")
        except ImportError:
            ninja = "ninja"
        command = [ninja, "-C", str(build), *targets]
        if os.environ.get("MAX_JOBS"):
            command += ["-j", os.environ["MAX_JOBS"]]
        try:
            subprocess.run(command, check=True)
        except FileNotFoundError:
            raise BuildError("ninja is not installed: pip install ninja") from None
        except subprocess.CalledProcessError:
            raise BuildError("compilation failed; the compiler's words stand above") from None


def kernel_resources(logs: list[Path]) -> list[dict[str, str | int]]:
    """What ptxas reported, one row per kernel and architecture."""
    rows: list[dict[str, str | int]] = []
    for log in logs:
        row: dict[str, str | int] = {}
        for line in log.read_text().splitlines():
            if match := re.search(r"Compiling entry function '(\w+)' for 'sm_(\w+)'", line):
                row = {"kernel": match.group(1), "architecture": f"sm_{match.group(2)}"}
            elif match := re.search(r"(\d+) bytes stack frame, (\d+) .* (\d+) bytes spill", line):
                stack, stores, loads = (int(number) for number in match.groups())
                row |= {"stack_bytes": stack, "spill_store_bytes": stores}
                row |= {"spill_load_bytes": loads}
            elif row and (match := re.search(r"Used (\d+) registers", line)):
                smem = re.search(r"(\d+) bytes smem", line)
                row |= {"registers": int(match.group(1))}
                row |= {"static_smem_bytes": int(smem.group(1)) if smem else 0}
                rows.append(row)
                row = {}
    if shutil.which("c++filt"):
        names = "\n".join(str(row["kernel"]) for row in rows)
        plain = subprocess.run(["c++filt"], input=names, capture_output=True, text=True, check=True)
        for row, name in zip(rows, plain.stdout.splitlines(), strict=True):
            name = name.replace("(anonymous namespace)::", "").removeprefix("void ")
            row["kernel"] = name.replace("cogview::", "").partition("(")[0]
    return rows


def check_resources(logs: list[Path], rows: list[dict[str, str | int]]) -> None:
    """Fail on register spills and on launch bounds that ptxas ignored."""
    for row in rows:
        if row["spill_store_bytes"] or row["spill_load_bytes"]:
            raise BuildError(f"{row['kernel']} spills registers on {row['architecture']}: {row}")
    for log in logs:
        for line in log.read_text().splitlines():
            if "C7508" in line:
                raise BuildError(f"{log.stem}: {line}")
            if "warning" in line:
                print(line)


def _torch() -> tuple[Path, str]:
    """The folder and the version of the torch to build against."""
    folder = find_torch()
    if folder is None:
        raise BuildError(
            "torch is not installed in this environment: install torch>=2.10 first, or "
            "build with isolation, or build neither the kernels nor the host model "
            "(COGVIEW_KERNELS_CUDA=0, COGVIEW_KERNELS_HOST_MODEL=0)"
        )
    version = torch_version(folder)
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < (2, 10):
        raise BuildError(f"expected torch 2.10 or later, got {version}")
    return folder, version


def _pybind11() -> str:
    """The folder of pybind11's headers; torch ships them too."""
    try:
        import pybind11
    except ImportError:
        folder = find_torch()
        if folder is None or not (folder / "include" / "pybind11").is_dir():
            raise BuildError("pybind11 is not installed: pip install pybind11") from None
        return str(folder / "include")
    return str(pybind11.get_include())


def _link_torch(folder: Path) -> list[str]:
    return [f"-L{folder / 'lib'}", "-Wl,--no-as-needed", "-ltorch"]


def _write_if_changed(path: Path, text: str) -> None:
    """Leave the file's time alone where nothing changed, so that ninja does not rebuild."""
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)


def _command(*parts: list[str]) -> str:
    words = [word for part in parts for word in part]
    return " ".join(shlex.quote(str(word)) for word in words).replace("$", "$$")


def _escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


if __name__ == "__main__":
    modules = ["_C"]
    if os.environ.get("COGVIEW_KERNELS_HOST_MODEL", "0") == "1":
        modules.append("_host_model")
    setup(
        ext_modules=[Extension(f"cogview_kernels.{module}", sources=[]) for module in modules],
        cmdclass={"build_ext": NinjaBuild},
    )

"""Builds `cogview_kernels._C` with ninja: kernels (nvcc, no torch header), operators (torch's
stable ABI) and hooks (pybind11). For tests also `cogview_kernels._host_model`: the same kernels and
operators, compiled for the CPU (csrc/host_model/).

Environment: COGVIEW_KERNELS_CUDA=auto|0|1 (auto: kernels where nvcc is found; 1: fail where it is
not), TORCH_CUDA_ARCH_LIST (entries and names as torch reads them; those below 8.0 are dropped),
MAX_JOBS, DEBUG=1, CUDA_HOME, CXX; COGVIEW_KERNELS_HOST_MODEL=1 (build `_host_model` too),
COGVIEW_KERNELS_SANITIZE=1 (with AddressSanitizer and UBSan in place of its own checks of plain
accesses; `make sanitize` shows how to load it).

Sources are found by name: every `.cu` and `.cpp` below csrc/, without csrc/host_model/ for `_C` and
without csrc/hooks.cpp for `_host_model`.
"""

from __future__ import annotations

import hashlib
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
CSRC = ROOT / "csrc"
DEFAULT_ARCHITECTURES = ("8.0", "9.0a", "10.0", "12.0+PTX")
OLDEST_ARCHITECTURE = (8, 0)  # cp.async, bfloat16 mma
# Folders below csrc/ whose kernels use instructions of these architectures only. Kernels of all
# other folders are compiled for every chosen architecture.
FOLDER_ARCHITECTURES = {"three_region_attention/sm90": ("9.0a",)}
# The names that TORCH_CUDA_ARCH_LIST may hold, as torch.utils.cpp_extension replaces them.
NAMED_ARCHITECTURES = {
    "Kepler+Tesla": "3.7",
    "Kepler": "3.5+PTX",
    "Maxwell+Tegra": "5.3",
    "Maxwell": "5.0;5.2+PTX",
    "Pascal": "6.0;6.1+PTX",
    "Volta+Tegra": "7.2",
    "Volta": "7.0+PTX",
    "Turing": "7.5+PTX",
    "Ampere+Tegra": "8.7",
    "Ampere": "8.0;8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell+Tegra": "11.0",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
}
STABLE_ONLY = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY"]  # torch 2.10
# Error messages name csrc/... and not the folder of the build.
OWN_PATHS = f"-ffile-prefix-map={ROOT}/="

# The host model. Each memory access in a kernel source calls one hook, so optimizations that merge
# or drop accesses are off. Aliasing is allowed, as nvcc allows it. The model has no hooks itself.
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
    """The CUDA toolkit that compiles the kernels, and the architectures it compiles them for."""

    nvcc: str
    root: Path
    architectures: tuple[str, ...]

    @classmethod
    def find(cls) -> Cuda | None:
        """The toolkit of CUDA_HOME, else that of the nvcc on the PATH; None where kernels are not
        wanted or cannot be built."""
        setting = os.environ.get("COGVIEW_KERNELS_CUDA", "auto").lower()
        if setting not in ("auto", "0", "1"):
            raise BuildError(f"COGVIEW_KERNELS_CUDA: expected auto, 0 or 1, got {setting!r}")
        if setting == "0":
            return None
        home, nvcc = find_nvcc()
        if nvcc is None:
            if setting == "1":
                where = f"under CUDA_HOME={home}" if home else "on the PATH"
                raise BuildError(
                    f"COGVIEW_KERNELS_CUDA=1 but there is no nvcc {where}: install a CUDA "
                    "toolkit (12.4 or later) and set CUDA_HOME to it"
                )
            return None
        # nvcc may be a wrapper script; its own output names the toolkit's folder.
        dryrun = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True).stderr
        match = re.search(r"^#\$ TOP=(.*)$", dryrun, re.MULTILINE)
        root = Path(match.group(1)).resolve() if match else Path(nvcc).resolve().parents[1]
        return cls(nvcc, root, cls._architectures(nvcc))

    @staticmethod
    def _architectures(nvcc: str) -> tuple[str, ...]:
        listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout
        # Variants of an architecture (9.0a) are not always listed; their base is.
        supported = set(re.findall(r"sm_(\d+)", listed))
        requested = requested_architectures(os.environ.get("TORCH_CUDA_ARCH_LIST", ""))
        chosen = []
        for architecture in requested or DEFAULT_ARCHITECTURES:
            if base_of(architecture).replace(".", "") in supported:
                chosen.append(architecture)
            elif requested:
                raise BuildError(f"TORCH_CUDA_ARCH_LIST: {nvcc} does not support {architecture}")
        if not chosen:
            raise BuildError(f"{nvcc} supports none of {', '.join(DEFAULT_ARCHITECTURES)}")
        if not requested and not any(architecture.endswith("+PTX") for architecture in chosen):
            # An older nvcc: GPUs that it does not know get PTX of the newest plain architecture.
            plain = [name for name in chosen if name[-1].isdigit()]
            if plain:
                chosen[chosen.index(max(plain, key=float))] += "+PTX"
        return tuple(chosen)

    def architectures_of(self, source: Path) -> tuple[str, ...]:
        """What a kernel file, named relative to csrc/, is compiled for; may be nothing."""
        for folder, architectures in FOLDER_ARCHITECTURES.items():
            if source.is_relative_to(folder):
                chosen = {base_of(architecture) for architecture in self.architectures}
                return tuple(name for name in architectures if base_of(name) in chosen)
        return self.architectures

    @staticmethod
    def flags(debug: bool) -> list[str]:
        flags = ["-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden"]
        # nvcc compresses PTX only; -compress-all compresses machine code too, in the toolkit's
        # default mode, which every driver that runs the toolkit's programs can read.
        # --compress-mode=size would need a driver of CUDA 12.4 or later and minutes more.
        flags.append("-Xfatbin=-compress-all")
        return flags + (["-O0", "-G"] if debug else ["-O3", "-lineinfo", "-Xptxas=-v"])


def requested_architectures(setting: str) -> list[str]:
    """The entries of TORCH_CUDA_ARCH_LIST that kernels can be compiled for, each once."""
    entries: list[str] = []
    for entry in setting.replace(";", " ").split():
        entries += NAMED_ARCHITECTURES.get(entry, entry).split(";")
    kept: list[str] = []
    dropped: list[str] = []
    for entry in dict.fromkeys(entries):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if match is None:
            names = ", ".join(name for name in NAMED_ARCHITECTURES if "+" not in name)
            raise BuildError(
                "TORCH_CUDA_ARCH_LIST: expected entries such as 8.0, 9.0a or 12.0+PTX, or names "
                f"({names}), got {entry!r}"
            )
        too_old = (int(match.group(1)), int(match.group(2))) < OLDEST_ARCHITECTURE
        (dropped if too_old else kept).append(entry)
    if dropped:
        notice = f"TORCH_CUDA_ARCH_LIST: dropped {', '.join(dropped)}: kernels need 8.0 or later"
        if not kept:
            raise BuildError(f"{notice}; nothing is left")
        print(f"cogview_kernels: {notice}")
    return kept


def base_of(architecture: str) -> str:
    """9.0 of 9.0a, 12.0 of 12.0+PTX."""
    return architecture.removesuffix("+PTX").rstrip("af")


def gencode(architectures: tuple[str, ...]) -> list[str]:
    flags = []
    for architecture in architectures:
        number = architecture.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if architecture.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def kernel_sources(csrc: Path) -> list[Path]:
    """The largest first: ninja starts jobs in this order, and a long job should not start last."""
    return sorted(csrc.rglob("*.cu"), key=lambda path: (-path.stat().st_size, path))


def kernel_digest(csrc: Path) -> str:
    """A digest of what determines the operators' results: all sources but the host model's. The
    record of a GPU check names it, and vouches for every build of the same sources."""
    digest = hashlib.sha256()
    for path in sorted(csrc.rglob("*")):
        is_source = path.suffix in (".cu", ".cuh", ".h", ".cpp")
        if is_source and not path.is_relative_to(csrc / "host_model"):
            digest.update(f"{path.relative_to(csrc).as_posix()}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def cpp_sources(csrc: Path, *, without: str) -> list[Path]:
    """All but those in the file or folder ``without``."""
    return [path for path in sorted(csrc.rglob("*.cpp")) if not path.is_relative_to(csrc / without)]


class NinjaBuild(build_ext):
    """Writes one build.ninja and runs it."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.force = True  # ninja finds what changed; setuptools would compare ages only

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
        kernels, others = self._write_ninja(build, target, cuda, compiler, debug)
        self._run_ninja(build, [*kernels, *others])
        # ptxas has reported only now; the report is a constant of the module.
        logs = [build / f"{name}.log" for name in kernels] if not debug else []
        resources = kernel_resources(logs)
        check_resources(logs, resources)
        table = f'R"json({json.dumps(resources)})json"'
        facts = {"kKernelResources": table, "kKernelSources": f'"{kernel_digest(CSRC)}"'}
        text = "".join(
            f"extern const char* const {name} = {fact};\n" for name, fact in facts.items()
        )
        _write_if_changed(build / "kernel_facts.cpp", text)
        self._run_ninja(build, [str(target)])
        if cuda is None:
            print("cogview_kernels: built without CUDA kernels (no nvcc, or not wanted)")
        else:
            print(f"cogview_kernels: built CUDA kernels for {', '.join(cuda.architectures)}")

    def _write_ninja(
        self, build: Path, target: Path, cuda: Cuda | None, compiler: list[str], debug: bool
    ) -> tuple[list[str], list[str]]:
        """Describe the build to ninja; the object files of kernels, and of the other sources."""
        includes = [Path(_pybind11()), Path(sysconfig.get_path("include"))]
        kernels: list[Path] = []
        others = [CSRC / "hooks.cpp"]
        defines, link, torch = [], [], "none"
        if cuda is not None:
            torch_folder, torch = _torch()
            kernels = [
                source
                for source in kernel_sources(CSRC)
                if cuda.architectures_of(source.relative_to(CSRC))
            ]
            others = cpp_sources(CSRC, without="host_model")
            includes += [torch_folder / "include", cuda.root / "include"]
            names = ",".join(cuda.architectures)
            defines = ["-DCOGVIEW_KERNELS_CUDA", f'-DCOGVIEW_KERNELS_ARCHITECTURES="{names}"']
            defines += [*family_defines(CSRC, kernels), *STABLE_ONLY]
            found = [*cuda.root.glob("lib*"), *cuda.root.glob("targets/*/lib")]
            found = [folder for folder in found if (folder / "libcudart_static.a").is_file()]
            if not found:
                raise BuildError(f"there is no libcudart_static.a under {cuda.root}")
            # libtorch must be named as needed: weak symbols are looked up in it.
            link = [f"-L{found[0]}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
            link += _link_torch(torch_folder)
        defines.append(f'-DCOGVIEW_KERNELS_TORCH="{torch}"')

        host = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", OWN_PATHS]
        host += ["-O0", "-g"] if debug else ["-O2"]
        host += [*defines, *(f"-isystem{folder}" for folder in includes)]
        shared = ["-shared"] if debug else ["-shared", "-s"]
        lines = ["ninja_required_version = 1.5", *_compile_rule("cxx", compiler, host)]
        lines += _link_rule([*compiler, *shared], link)
        if cuda is not None:
            nvcc = _command([cuda.nvcc], cuda.flags(debug))
            lines += [
                "rule nvcc",
                f"  command = {nvcc} $gencode -MD -MF $out.d -c $in -o $out > $out.log 2>&1 "
                "|| { cat $out.log; exit 1; }",
                "  depfile = $out.d",
                "  deps = gcc",
            ]
        for source in kernels:
            architectures = cuda.architectures_of(source.relative_to(CSRC)) if cuda else ()
            lines.append(f"build {_object(source)}: nvcc {_escape(source)}")
            lines.append(f"  gencode = {_command(gencode(architectures))}")
        lines += [f"build {_object(source)}: cxx {_escape(source)}" for source in others]
        lines.append("build kernel_facts.o: cxx kernel_facts.cpp")
        objects = [[_object(source) for source in sources] for sources in (kernels, others)]
        every = " ".join([*objects[0], *objects[1], "kernel_facts.o"])
        lines.append(f"build {_escape(target)}: link {every}")
        _write_if_changed(build / "build.ninja", "\n".join(lines) + "\n")
        return objects[0], objects[1]

    def _build_host_model(self, extension: Extension, compiler: list[str]) -> None:
        torch_folder, _ = _torch()
        sanitize = os.environ.get("COGVIEW_KERNELS_SANITIZE", "0") == "1"
        build = Path(self.build_temp).resolve() / (
            "host_model_sanitize" if sanitize else "host_model"
        )
        build.mkdir(parents=True, exist_ok=True)
        includes = [torch_folder / "include", _pybind11(), sysconfig.get_path("include")]
        kernels = kernel_sources(CSRC)
        flags = [*HOST_MODEL, OWN_PATHS, *STABLE_ONLY, *family_defines(CSRC, kernels)]
        flags += [f"-isystem{folder}" for folder in includes]
        instrumented = HOST_MODEL_SANITIZE if sanitize else HOST_MODEL_HOOKS
        link = [*(HOST_MODEL_SANITIZE if sanitize else []), "-lpthread", *_link_torch(torch_folder)]
        optimize = HOST_MODEL_SANITIZE if sanitize else ["-O3"]
        lines = ["ninja_required_version = 1.5"]
        lines += _compile_rule("kernel", compiler, [*flags, *instrumented, "-x", "c++"])
        lines += _compile_rule("cxx", compiler, [*flags, *optimize])
        lines += _link_rule([*compiler, "-shared"], link)
        # bindings.cpp takes longest: pybind11 is slow to compile.
        sources = [*cpp_sources(CSRC, without="hooks.cpp"), *kernels]
        for source in sources:
            rule = "kernel" if source.suffix == ".cu" else "cxx"
            lines.append(f"build {_object(source)}: {rule} {_escape(source)}")
        lines.append(f"build _host_model.so: link {' '.join(map(_object, sources))}")
        _write_if_changed(build / "build.ninja", "\n".join(lines) + "\n")
        self._run_ninja(build, ["_host_model.so"])
        # Copied: the builds with and without sanitizers share the target.
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
            raise BuildError("compilation failed; see the compiler's output above") from None


def family_defines(csrc: Path, kernels: list[Path]) -> list[str]:
    """COGVIEW_KERNELS_SM90 tells the C++ sources that kernels of three_region_attention/sm90 are
    compiled in."""
    families = [
        folder
        for folder in FOLDER_ARCHITECTURES
        if any(source.is_relative_to(csrc / folder) for source in kernels)
    ]
    return [f"-DCOGVIEW_KERNELS_{Path(folder).name.upper()}" for folder in families]


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
    """Keep the file's time where nothing changed, so that ninja does not rebuild."""
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)


def _compile_rule(name: str, compiler: list[str], flags: list[str]) -> list[str]:
    return [
        f"rule {name}",
        f"  command = {_command(compiler, flags)} -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
    ]


def _link_rule(linker: list[str], libraries: list[str]) -> list[str]:
    return ["rule link", f"  command = {_command(linker)} $in -o $out {_command(libraries)}"]


def _object(source: Path) -> str:
    return _escape(source.relative_to(CSRC)) + ".o"


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

"""The build: what it compiles, what it refuses, and what it linked."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from setuptools import Distribution
from torch.utils import cpp_extension

import cogview_kernels
from cogview_kernels import extension

ROOT = Path(__file__).resolve().parents[1]

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on the PATH")
needs_kernels = pytest.mark.skipif(
    not extension.architectures(), reason="the extension was built without CUDA kernels"
)
needs_table = pytest.mark.skipif(
    not extension.kernel_resources(), reason="built without kernels, or with DEBUG=1"
)


@pytest.fixture(scope="module")
def setup_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("project_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["project_setup"] = module
    spec.loader.exec_module(module)
    return module


def build(folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", f"--build-lib={folder}/lib"]
        + [f"--build-temp={folder}/temp"],
        cwd=ROOT,
        env=os.environ | variables,
        capture_output=True,
        text=True,
    )


def test_with_nvcc_there_are_kernels(setup_module: ModuleType) -> None:
    """A skip of the tests below must not hide a build that lost its kernels."""
    assert bool(extension.architectures()) == (setup_module.Cuda.find() is not None)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"COGVIEW_KERNELS_CUDA": "yes"}, "COGVIEW_KERNELS_CUDA: expected auto, 0 or 1, got 'yes'"),
        (
            {"COGVIEW_KERNELS_CUDA": "1", "CUDA_HOME": "/nowhere"},
            "no nvcc under CUDA_HOME=/nowhere",
        ),
        ({"CXX": "no-such-compiler", "COGVIEW_KERNELS_CUDA": "0"}, "installing pure Python"),
    ],
)
def test_messages_of_the_build(tmp_path: Path, variables: dict[str, str], message: str) -> None:
    result = build(tmp_path, **variables)
    assert message in result.stdout + result.stderr
    assert (result.returncode == 0) == ("CXX" in variables)


@needs_nvcc
@pytest.mark.parametrize(
    ("architectures", "message"),
    [
        ("hopper", "got 'hopper'"),
        ("9.0a;8.5", "does not support 8.5"),
        ("7.0 Turing", "dropped 7.0, 7.5+PTX: kernels need 8.0 or later; nothing is left"),
    ],
)
def test_refused_architectures(tmp_path: Path, architectures: str, message: str) -> None:
    result = build(tmp_path, TORCH_CUDA_ARCH_LIST=architectures, COGVIEW_KERNELS_CUDA="1")
    assert result.returncode != 0
    assert message in result.stderr


def test_older_architectures_are_dropped(
    setup_module: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert setup_module.requested_architectures("Volta;7.5 8.0;9.0a 8.0") == ["8.0", "9.0a"]
    assert "dropped 7.0+PTX, 7.5: kernels need 8.0 or later" in capsys.readouterr().out
    assert setup_module.requested_architectures("8.0;12.0+PTX") == ["8.0", "12.0+PTX"]
    assert setup_module.requested_architectures("") == []
    assert capsys.readouterr().out == ""


def test_named_architectures_are_those_of_torch(
    setup_module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, entries in setup_module.NAMED_ARCHITECTURES.items():
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", f"{name};9.0a")
        assert sorted(
            {*setup_module.gencode(entries.split(";")), *setup_module.gencode(["9.0a"])}
        ) == (cpp_extension._get_cuda_arch_flags())


def test_an_older_nvcc_gets_ptx(setup_module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = "\n".join(f"sm_{number}" for number in (75, 80, 86, 89, 90))
    process = subprocess.CompletedProcess([], 0, stdout=listed)
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: process)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert setup_module.Cuda._architectures("nvcc") == ("8.0+PTX", "9.0a")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6;8.6")
    assert setup_module.Cuda._architectures("nvcc") == ("8.6",)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Turing;Ampere")
    assert setup_module.Cuda._architectures("nvcc") == ("8.0", "8.6+PTX")


@pytest.fixture
def csrc(setup_module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Source files in folders of several depths, one folder of them for sm_90a only."""
    folder = tmp_path / "csrc"
    for name, size in {
        "hooks.cpp": 1,
        "host_model/fibers.cpp": 1,
        "operators/norms.cpp": 1,
        "family/dispatch.cpp": 1,
        "family/far_keys.cu": 2,
        "family/sm80/forward.cu": 9,
        "family/sm80/tile.cuh": 9,
        "family/sm90/forward.cu": 5,
        "family/sm90/instantiations/forward.cu": 1,
    }.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x" * size)
    monkeypatch.setattr(setup_module, "CSRC", folder)
    monkeypatch.setattr(setup_module, "FOLDER_ARCHITECTURES", {"family/sm90": ("9.0a",)})
    return folder


def test_sources_of_both_modules(setup_module: ModuleType, csrc: Path) -> None:
    def names(paths: list[Path]) -> list[str]:
        return [path.relative_to(csrc).as_posix() for path in paths]

    largest_first = ["family/sm80/forward.cu", "family/sm90/forward.cu", "family/far_keys.cu"]
    largest_first += ["family/sm90/instantiations/forward.cu"]
    assert names(setup_module.kernel_sources(csrc)) == largest_first
    both = ["family/dispatch.cpp", "operators/norms.cpp"]
    assert names(setup_module.cpp_sources(csrc, without="host_model")) == sorted(
        [*both, "hooks.cpp"]
    )
    assert names(setup_module.cpp_sources(csrc, without="hooks.cpp")) == sorted(
        [*both, "host_model/fibers.cpp"]
    )


def test_digest_of_the_sources(setup_module: ModuleType, csrc: Path) -> None:
    """Whatever can change a result on a GPU changes it; the place of the checkout does not."""
    digest = setup_module.kernel_digest(csrc)
    assert setup_module.kernel_digest(csrc.rename(csrc.with_name("moved"))) == digest
    csrc.with_name("moved").rename(csrc)
    for name in ("family/sm80/forward.cu", "family/sm80/tile.cuh", "operators/norms.cpp"):
        before = (csrc / name).read_text()
        (csrc / name).write_text(before + "y")
        assert setup_module.kernel_digest(csrc) != digest, name
        (csrc / name).write_text(before)
    (csrc / "family" / "far_keys.cu").rename(csrc / "family" / "pack.cu")
    assert setup_module.kernel_digest(csrc) != digest
    (csrc / "family" / "pack.cu").rename(csrc / "family" / "far_keys.cu")
    (csrc / "host_model" / "fibers.cpp").write_text("y")
    assert setup_module.kernel_digest(csrc) == digest


@pytest.mark.parametrize(
    ("architectures", "of_sm90"),
    [
        (("8.0", "9.0a", "12.0+PTX"), ["-gencode=arch=compute_90a,code=sm_90a"]),
        (("9.0",), ["-gencode=arch=compute_90a,code=sm_90a"]),
        (("8.0", "12.0+PTX"), None),
    ],
)
def test_architectures_per_folder(
    setup_module: ModuleType,
    csrc: Path,
    tmp_path: Path,
    architectures: tuple[str, ...],
    of_sm90: list[str] | None,
) -> None:
    """Files of a folder that no chosen architecture can run are left out, and C++ is told."""
    toolkit, target = tmp_path / "toolkit", tmp_path / "_C.so"
    (toolkit / "lib64").mkdir(parents=True)
    (toolkit / "lib64" / "libcudart_static.a").touch()
    cuda = setup_module.Cuda("nvcc", toolkit, architectures)
    ninja = setup_module.NinjaBuild(Distribution())
    kernels, others = ninja._write_ninja(tmp_path, target, cuda, ["c++"], False)
    text = (tmp_path / "build.ninja").read_text()
    found = dict(re.findall(r"build (\S+): nvcc .*\n  gencode = (.*)", text))
    expected = {"family/sm80/forward.cu.o": setup_module.gencode(architectures)}
    expected["family/far_keys.cu.o"] = expected["family/sm80/forward.cu.o"]
    if of_sm90 is not None:
        expected["family/sm90/forward.cu.o"] = of_sm90
        expected["family/sm90/instantiations/forward.cu.o"] = of_sm90
    assert found == {name: " ".join(flags) for name, flags in expected.items()}
    assert ("-DCOGVIEW_KERNELS_SM90" in text) == (of_sm90 is not None)
    assert sorted(kernels) == sorted(found)
    assert others == ["family/dispatch.cpp.o", "hooks.cpp.o", "operators/norms.cpp.o"]
    linked = re.search(r": link (.*)", text)
    assert linked is not None
    assert linked.group(1).split() == [*kernels, *others, "kernel_facts.o"]


def test_no_object_of_two_sources(setup_module: ModuleType) -> None:
    """Nor a `.cpp` and a `.cu` of one name in one folder."""
    sources = [path for path in setup_module.CSRC.rglob("*") if path.suffix in (".cpp", ".cu")]
    assert len({path.with_suffix("") for path in sources}) == len(sources) > 10


PTXAS = """\
ptxas info    : Compiling entry function '_ZN7cogview4workEv' for 'sm_90a'
ptxas info    : Function properties for _ZN7cogview4workEv
    {stack} bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 512 bytes smem, 400 bytes cmem[0]
"""


def test_spills_fail_the_build(setup_module: ModuleType, tmp_path: Path) -> None:
    log = tmp_path / "work.cu.o.log"
    log.write_text(PTXAS.format(stack=0, stores=0, loads=0))
    rows = setup_module.kernel_resources([log])
    assert rows[0]["registers"] == 64
    assert rows[0]["static_smem_bytes"] == 512
    assert rows[0]["architecture"] == "sm_90a"
    setup_module.check_resources([log], rows)
    log.write_text(PTXAS.format(stack=8, stores=4, loads=0))
    with pytest.raises(SystemExit, match="work.* spills registers on sm_90a"):
        setup_module.check_resources([log], setup_module.kernel_resources([log]))
    log.write_text("ptxas warning : (C7508) Ignoring setmaxnreg\n")
    with pytest.raises(SystemExit, match="C7508"):
        setup_module.check_resources([log], setup_module.kernel_resources([log]))


@needs_table
def test_every_kernel_on_every_architecture_without_spills() -> None:
    rows = extension.kernel_resources()
    machine_code = {
        "sm_" + name.removesuffix("+PTX").replace(".", "") for name in extension.architectures()
    }
    by_kernel: dict[str, set[str]] = {}
    for row in rows:
        by_kernel.setdefault(row["kernel"], set()).add(row["architecture"])
        assert row["spill_store_bytes"] == row["spill_load_bytes"] == row["stack_bytes"] == 0, row
    assert all(found == machine_code for found in by_kernel.values()), by_kernel
    names = " ".join(by_kernel)
    for operator in ("pb_relax_layer_norm", "sandwich_residual", "three_region_attention"):
        assert f"{operator}_forward_kernel" in names
    for kernel in ("forward_wide_kernel", "backward_kernel", "partial_sums_kernel"):
        assert f"pb_relax_layer_norm_{kernel}" in names


@needs_table
def test_size(setup_module: ModuleType) -> None:
    if extension.architectures() != setup_module.DEFAULT_ARCHITECTURES:
        pytest.skip("the kernels were not built for the default architectures")
    assert Path(extension._C.__file__).stat().st_size < 25e6


@needs_kernels
def test_links_to_any_torch() -> None:
    """The stream's symbol is weak, for CPU builds of torch have no such library, and libtorch.so
    is needed, for otherwise the weak symbol is never looked up."""
    module = Path(extension._C.__file__)
    needed = subprocess.run(["readelf", "-d", module], capture_output=True, text=True, check=True)
    assert "Shared library: [libtorch.so]" in needed.stdout
    assert "libtorch_cuda" not in needed.stdout
    assert "libcuda.so" not in needed.stdout
    symbols = subprocess.run(["nm", "-D", module], capture_output=True, text=True, check=True)
    assert " w aoti_torch_get_current_cuda_stream" in symbols.stdout
    undefined = [line for line in symbols.stdout.splitlines() if " U " in line]
    assert not any("c10" in line or "2at" in line for line in undefined), "not the stable ABI"


@needs_kernels
def test_cuda_operators_refuse_cpu_tensors() -> None:
    """In a process of its own: the host model, once loaded, takes CPU tensors."""
    program = """
import torch, cogview_kernels
x, statistics = torch.randn(2, 8), torch.empty(2, 4)
torch.ops.cogview_kernels.pb_relax_layer_norm_forward_out(
    x, None, None, 1e-5, 1, 2, None, torch.empty_like(x), statistics)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 1
    assert "NotImplementedError" in result.stderr and "layer_norm_forward_out" in result.stderr


@needs_kernels
def test_errors_do_not_name_the_folder_of_the_build() -> None:
    spec = importlib.util.find_spec("cogview_kernels._C")
    assert spec is not None
    assert spec.origin is not None
    module = Path(spec.origin).read_bytes()
    assert b"csrc/operators/" in module
    assert f"{ROOT}/csrc/operators/".encode() not in module


def test_kernels_do_not_see_torch() -> None:
    """A torch header costs a minute of compilation for each `.cu` file."""
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix in (".cu", ".cuh", ".h") and path.parent.name != "operators":
            assert "#include <torch" not in path.read_text(), path


def test_report() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "cogview_kernels"], capture_output=True, text=True, check=True
    )
    facts = [cogview_kernels.__version__, torch.__version__, *extension.architectures()]
    for fact in (*facts, "kernels built for", "CUDA kernels here"):
        assert fact in result.stdout
    reason = extension.why_not_usable()
    assert (f"not usable: {reason}" in result.stdout) == (reason is not None)


def test_mutations_are_current() -> None:
    """Each still finds the text that it changes."""
    mutations = Path(__file__).with_name("mutations.py")
    result = subprocess.run([sys.executable, mutations, "--list"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr

"""The host model finds planted bugs, does what the PTX manual says, and counts exactly."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
MODEL = [
    str(ROOT / "csrc" / "host_model" / f"{name}.cpp")
    for name in ("fibers", "memory", "counters", "instructions")
]
OBJECTS = [f"{Path(source).stem}.o" for source in MODEL]
PLANTED = ROOT / "tests" / "host_model" / "planted.cu"
COUNTS = ("mma", "barriers", "shared_accesses", "bank_conflicts")
COUNTS += ("a_loaded", "out_stored", "a_unique", "out_unique")


def _setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("host_model_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def planted(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """planted.cu with a host model of its own, compiled as setup.py compiles them."""
    compiler = shlex.split(os.environ.get("CXX") or "c++")
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"no C++ compiler: {compiler[0]!r} is not on the PATH")
    setup, folder = _setup(), tmp_path_factory.mktemp("planted")
    common = [*compiler, *setup.HOST_MODEL, f"-I{ROOT / 'csrc'}", f"-I{ROOT}", "-c"]
    for command in (
        [*common, "-O1", *MODEL],
        [*common, *setup.HOST_MODEL_HOOKS, "-x", "c++", str(PLANTED), "-o", "planted.o"],
        [*compiler, "-shared", *OBJECTS, "planted.o", "-lpthread", "-o", "planted.so"],
    ):
        subprocess.run(command, cwd=folder, check=True)
    library = ctypes.CDLL(str(folder / "planted.so"))
    library.run.restype = ctypes.c_char_p
    return library


class Run:
    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library

    def __call__(
        self,
        name: str,
        a: np.ndarray | None = None,
        b: np.ndarray | None = None,
        out: np.ndarray | None = None,
    ) -> str:
        """The error's text, or an empty string; ``self.out`` is what the kernel wrote."""
        a = np.arange(64, dtype=np.float32) if a is None else a
        b = np.zeros(1, dtype=np.float32) if b is None else b
        self.out = np.zeros(64, dtype=np.float32) if out is None else out
        arguments: list[object] = [name.encode()]
        for array in (a, b, self.out):
            arguments += [array.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(array.nbytes)]
        return self.library.run(*arguments).decode()

    def counts(self) -> dict[str, int]:
        numbers = (ctypes.c_int64 * len(COUNTS))()
        self.library.counts(numbers)
        return dict(zip(COUNTS, numbers, strict=True))

    def convert(self, kind: str, values: np.ndarray, dtype: type) -> np.ndarray:
        out = np.empty(values.shape, dtype=dtype)
        self.library.convert(
            kind.encode(),
            values.ctypes.data_as(ctypes.c_void_p),
            out.ctypes.data_as(ctypes.c_void_p),
            ctypes.c_int64(values.size),
        )
        return out


@pytest.fixture
def run(planted: ctypes.CDLL) -> Run:
    return Run(planted)


BUGS = {
    "race_read": "race: read of 4 bytes at shared_array+0, which thread 0 wrote",
    "race_write": "race: write of 4 bytes at shared_array+0, which thread 0 wrote",
    "race_write_after_read": "race: write of 4 bytes at shared_array+0, which thread 32 read",
    "race_write_after_reads_of_warps": "shared_array+0, which threads of several warps read",
    "race_write_after_reads_of_a_warp": "shared_array+4, which several threads of warp 1 read",
    "race_in_warp": "race: read of 4 bytes at shared_array+",
    "race_between_warps": "race: read of 4 bytes at shared_array+124, which thread 31 wrote",
    "race_between_groups": "race: read of 4 bytes at shared_array+128, which thread 32 wrote",
    "race_in_group": "race: read of 4 bytes at shared_array+128, which thread 32 wrote",
    "race_write_after_reads_of_groups": "shared_array+0, which threads of several warps read",
    "race_after_other_group": "race: read of 4 bytes at shared_array+256, which thread 64 wrote",
    "barrier_at_two_places": "divergent barrier: bar_sync (planted.cu:",
    "barrier_after_return": "divergent barrier: bar_sync (planted.cu:",
    "barrier_in_loop": "but thread 0 has returned",
    "barrier_for_half_a_warp": "divergent warp: waits at shfl_bfly (planted.cu:",
    "group_of_half_a_warp": "thread 16: divergent warp: at shfl_bfly (planted.cu:",
    "group_of_lanes_that_return": "returned, and thread 0 waits for the whole warp at bar_sync",
    "group_of_odd_lanes": "thread 1: divergent warp: bar_sync (planted.cu:",
    "group_at_two_places": "for 64 threads at barrier 1, but thread 0 waits at bar_sync",
    "group_of_two_counts": "for 96 threads at barrier 1, but thread 0 waits at bar_sync",
    "group_of_half_warps": "48 threads cannot be whole warps of the block, which has 64 threads",
    "group_larger_than_the_block": "96 threads cannot be whole warps of the block",
    "group_at_the_barrier_of_the_block": "there is no barrier 0 for warps",
    "group_at_barrier_16": "there is no barrier 16 for warps",
    "groups_at_one_barrier": "warp 0 and others met at barrier 1, with no barrier between",
    "group_without_a_warp": "32 of 64 threads wait at barrier 3, but thread 32 has returned",
    "group_with_a_warp_elsewhere": "wait at barrier 3, but thread 32 waits at bar_sync",
    "group_with_a_warp_in_another": "wait at barrier 3, but thread 32 waits at bar_sync",
    "shuffle_after_return": "shfl_bfly (planted.cu:",
    "return_before_shuffle": "returned, and thread 0 waits for the whole warp at shfl_bfly",
    "shuffle_at_two_places": "divergent warp: at shfl_bfly (planted.cu:",
    "shuffle_from_nowhere": "there is no lane 32",
    "global_read_out_of_bounds": "thread 63: out of bounds: read of 4 bytes at a+256, which ends",
    "global_write_out_of_bounds": "thread 0: out of bounds: write of 4 bytes, 4 bytes before the b",
    "global_vector_out_of_bounds": "thread 16: out of bounds: ld_global_v4 (common.cuh:",
    "input_written": "write of 4 bytes at a+0, which is an input",
    "cp_async_out_of_bounds": "thread 63: out of bounds: cp_async (planted.cu:",
    "shared_out_of_bounds": "thread 63: out of bounds: write of 4 bytes at shared_array+256, which",
    "dynamic_shared_out_of_bounds": "write of 4 bytes at dynamic_shared+256, which ends at 256",
    "shared_straddled": "thread 63: out of bounds: write of 4 bytes at shared_array+256, which",
    "shared_never_written": "thread 7: read of 4 bytes at shared_array+28, which nobody has writt",
    "shared_of_the_block_before": "block (1, 0), thread 63: read of 4 bytes at shared_array+252, ",
    "output_never_written": "out+36 was never written",
    "output_read_before_written": "thread 0: read of 4 bytes at out+0, which nobody has written",
    "two_blocks_write": "of 4 bytes at out+20, which block (",
    "two_blocks_share": "of 4 bytes at out+12, which block (",
    "copy_not_waited_for": "at shared_array+0 before the cp.async of thread 0 was waited for",
    "copy_not_committed": "at shared_array+0 before the cp.async of thread 0 was waited for",
    "copy_of_another_thread": "at shared_array+120 before the cp.async of thread 30 was waited for",
    "copy_without_barrier": "race: read of 4 bytes at shared_array+0, which thread 0 wrote",
    "copy_over_a_read": "race: cp_async (planted.cu:",
    "write_over_a_copy": "write of 4 bytes at shared_array+0 before the cp.async of thread 0",
    "misaligned_load": "misaligned: ld_global_v4 (common.cuh:",
    "misaligned_store": "misaligned: st_global_v4 (planted.cu:",
    "misaligned_copy_source": "misaligned: cp_async (planted.cu:",
    "misaligned_copy_target": "misaligned: cp_async (planted.cu:",
    "misaligned_row": "misaligned: ldmatrix_x4 (planted.cu:",
    "misaligned_plain": "misaligned: read of 4 bytes",
    "early_read_before_wait": "thread 0: read of 4 bytes at a+0 before griddepcontrol_wait",
    "early_write_before_wait": "thread 0: write of 4 bytes at out+0 before griddepcontrol_wait",
    "early_vector_before_wait": "at a+0 before griddepcontrol_wait",
    "early_return_before_wait": "thread 5: returned without griddepcontrol_wait",
    "too_much_shared": "barriers: cannot launch 1 x 1 blocks of 64 threads with 233472 bytes",
}


@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_is_found(run: Run, name: str) -> None:
    assert BUGS[name] in run(name)


def test_access_half_inside_a_tensor(run: Run) -> None:
    text = run("copies", a=np.zeros(127, dtype=np.uint16))
    assert "read at a+252, which ends at 254" in text


def test_errors_say_where(run: Run) -> None:
    text = run("global_read_out_of_bounds")
    assert text.startswith("global_read_out_of_bounds, block (0, 0), thread 63: ")
    command = text[text.index("[") + 1 : -1]
    if shutil.which("addr2line") is None:
        pytest.skip("addr2line is not on the PATH")
    line = subprocess.run(shlex.split(command), capture_output=True, text=True).stdout
    source, number = line.split()[0].rsplit(":", 1)
    assert source.endswith("planted.cu")
    assert "KERNEL(global_read_out_of_bounds)" in PLANTED.read_text().splitlines()[int(number) - 1]


def test_kernels_keep_the_name_of_their_family(run: Run) -> None:
    text = run("kernel_of_a_family")
    assert text.startswith("sm80::kernel_of_a_family<Params>, block (0, 0), thread 0: ")


def test_a_kernel_that_starts_early(run: Run) -> None:
    """Once it has waited it may do anything; launched in order, it need not wait."""
    for _ in range(2):
        assert run("early") == ""
        np.testing.assert_array_equal(run.out, np.arange(64) + 1)
        assert run("early_but_launched_in_order") == ""
    assert run("early_return_before_wait").startswith("early_return_before_wait, block (0, 0), ")


def test_an_error_leaves_the_model_usable(run: Run) -> None:
    for _ in range(3):
        assert run("race_read") != ""
        assert run("barriers") == ""


@pytest.mark.parametrize(
    "name, conflicts, accesses",
    [
        ("shared_stride_1", 0, 1),
        ("shared_stride_2", 1, 1),
        ("shared_stride_32", 31, 1),
        ("shared_broadcast", 0, 2),
        ("shared_rows", 4 * 7, 6),
        ("shared_rows_swizzled", 0, 6),
    ],
)
def test_bank_conflicts(run: Run, name: str, conflicts: int, accesses: int) -> None:
    assert run(name) == ""
    counts = run.counts()
    assert (counts["bank_conflicts"], counts["shared_accesses"]) == (conflicts, accesses)


def test_barriers(run: Run) -> None:
    assert run("barriers") == ""
    np.testing.assert_array_equal(
        run.out, (np.arange(64) ^ 1) + 3 - 64 * ((np.arange(64) ^ 1) > 60)
    )
    assert run.counts()["barriers"] == 6


def test_barriers_of_groups(run: Run) -> None:
    out = np.zeros(192, dtype=np.float32)
    assert run("barriers_of_groups", out=out) == ""
    values = np.arange(192, dtype=np.float32).reshape(3, 64)
    for group, turns in enumerate((7, 4, 1)):
        for _ in range(turns):
            values[group] = np.roll(values[group], -33) + values[group, 0]
    np.testing.assert_array_equal(out, values.ravel()[::-1])
    assert run.counts()["barriers"] == 7 + 4 + 1 + 2


def test_groups_that_return(run: Run) -> None:
    assert run("groups_that_return") == ""
    np.testing.assert_array_equal(run.out, np.arange(64)[::-1])
    assert run.counts()["barriers"] == 2 + 4


def test_groups_in_a_chain(run: Run) -> None:
    assert run("groups_in_a_chain") == ""
    np.testing.assert_array_equal(run.out[:32], 131 - np.arange(32))


def test_collectives(run: Run) -> None:
    assert run("collectives") == ""
    assert run.out.all()


def test_copies(run: Run) -> None:
    assert run("copies") == ""
    np.testing.assert_array_equal(run.out, np.arange(64))
    counts = run.counts()
    assert (counts["a_loaded"], counts["out_stored"]) == (256, 256)


def test_atomic_max(run: Run) -> None:
    assert run("atomic_max") == ""
    assert (run.out.view(np.uint32) == 21).all()


def _sectors(array: np.ndarray) -> int:
    """Bytes of the 32-byte sectors that the array touches."""
    begin, end = array.ctypes.data, array.ctypes.data + array.nbytes
    return ((end - 1) // 32 - begin // 32 + 1) * 32


@pytest.mark.parametrize("dtype", ["half", "bfloat16"])
@pytest.mark.parametrize("load", ["columns", "rows", "by_hand"])
def test_matrix_product(run: Run, dtype: str, load: str) -> None:
    generator = torch.Generator().manual_seed(0)
    torch_dtype = getattr(torch, dtype)
    a = torch.randn(16, 16, generator=generator).to(torch_dtype)
    b = torch.randn(16, 8, generator=generator).to(torch_dtype)
    stored_b = b.T.contiguous() if load == "rows" else b
    buffers = [_aligned(tensor.view(torch.int16).numpy()) for tensor in (a, stored_b)]
    out = np.full((16, 8), np.nan, dtype=np.float32)
    assert run(f"product_{dtype}_{load}", *buffers, out) == ""
    exact = 2 * (a.double() @ b.double()).numpy()
    # Products of 16-bit floats are exact in float32; 32 sums round.
    bound = 2 * 32 * 2.0**-24 * (a.double().abs() @ b.double().abs()).numpy()
    assert (np.abs(out - exact) <= bound).all()
    counts = run.counts()
    assert (counts["mma"], counts["a_loaded"], counts["out_stored"]) == (2, 512, 512)
    assert (counts["a_unique"], counts["out_unique"]) == (512, _sectors(out))


def _aligned(array: np.ndarray) -> np.ndarray:
    """A copy at a multiple of 64 bytes."""
    memory = np.empty(array.nbytes + 64, dtype=np.uint8)
    begin = -memory.ctypes.data % 64
    copy = memory[begin : begin + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def _bits(kind: str, run: Run, values: torch.Tensor) -> np.ndarray:
    return run.convert(kind, values.numpy(), np.uint16)


@pytest.mark.parametrize("dtype", ["half", "bfloat16"])
def test_conversions(run: Run, dtype: str) -> None:
    torch_dtype = getattr(torch, dtype)
    bits = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    exact = bits.view(torch_dtype).float()
    numbers = torch.from_numpy(run.convert(f"{dtype}_to_float", bits.numpy(), np.float32))
    assert torch.equal(
        numbers.view(torch.int32)[~exact.isnan()], exact.view(torch.int32)[~exact.isnan()]
    )
    assert numbers[exact.isnan()].isnan().all()

    # Every number of the type, every tie between neighbours, and the float32 numbers beside it.
    finite = exact[exact.isfinite()].sort().values
    ties = (finite[1:].double() + finite[:-1].double()).div(2).float()
    sides = [torch.nextafter(ties, torch.tensor(limit)) for limit in (torch.inf, -torch.inf)]
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(-(2**31), 2**31, (100_000,), generator=generator)
    values = torch.cat([exact, ties, *sides, patterns.to(torch.int32).view(torch.float32)])
    expected = values.to(torch_dtype).view(torch.int16).numpy().view(np.uint16)
    rounded = _bits(f"float_to_{dtype}", run, values)
    number = ~values.isnan().numpy()
    np.testing.assert_array_equal(rounded[number], expected[number])
    assert (rounded[~number] == 0x7FFF).all()  # the NaN that cvt gives


def test_ex2(run: Run) -> None:
    x = np.concatenate([np.linspace(-160, 130, 20_001), [np.inf, -np.inf, 0.0]]).astype(np.float32)
    with np.errstate(over="ignore"):
        exact = np.exp2(x.astype(np.float64))
    y = run.convert("ex2", x, np.float32)
    normal = (exact >= 2.0**-126) & (exact < 2.0**128)
    assert (np.abs(y[normal] / exact[normal] - 1) <= 2 * 2.0**-23).all()
    assert (y[exact < 2.0**-126] == 0).all()
    assert np.isinf(y[exact >= 2.0**128]).all()
    assert np.isnan(run.convert("ex2", np.array([np.nan], np.float32), np.float32)).all()

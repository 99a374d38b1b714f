"""The instructions of csrc/instructions, one by one, on a GPU and in the host model: both do what
the PTX manual says, bit for bit where the manual defines the bits.

The expected results are computed here with numpy from the manual's text and fragment tables,
independently of the model. primitives.cu is compiled unchanged for both.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
PRIMITIVES = Path(__file__).with_name("primitives.cu")
TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
NO_ARRAY = np.empty(0, np.uint32)


def _module(path: Path) -> ModuleType:
    sys.path.insert(0, str(ROOT))  # setup.py imports build_backend
    spec = importlib.util.spec_from_file_location(f"{path.stem}_of_primitives", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def compile_for_host(folder: Path) -> Path:
    """As setup.py compiles the host model and kernels for it."""
    compiler = shlex.split(os.environ.get("CXX") or "c++")
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"no C++ compiler: {compiler[0]!r} is not on the PATH")
    setup = _module(ROOT / "setup.py")
    common = [*compiler, *setup.HOST_MODEL, f"-I{ROOT / 'csrc'}", f"-I{ROOT}", "-c"]
    objects = [f"{name}.o" for name in ("fibers", "memory", "counters", "instructions")]
    sources = [str(ROOT / "csrc" / "host_model" / name.replace(".o", ".cpp")) for name in objects]
    for command in (
        [*common, "-O1", *sources],
        [*common, *setup.HOST_MODEL_HOOKS, "-x", "c++", str(PRIMITIVES), "-o", "primitives.o"],
        [*compiler, "-shared", *objects, "primitives.o", "-lpthread", "-o", "host.so"],
    ):
        subprocess.run(command, cwd=folder, check=True)
    return folder / "host.so"


def compile_for_device(folder: Path) -> Path:
    """For the GPU of this machine, else for Hopper."""
    nvcc = _module(ROOT / "build_backend.py").find_nvcc()[1]
    if nvcc is None:
        pytest.skip("no nvcc on the PATH or under CUDA_HOME")
    here = torch.cuda.is_available()
    major, minor = torch.cuda.get_device_capability() if here else (9, 0)
    number = f"{major}{minor}" + ("a" if major == 9 else "")
    command = [nvcc, "-std=c++17", "-O3", f"-gencode=arch=compute_{number},code=sm_{number}"]
    command += ["-Xcompiler=-fPIC,-fvisibility=hidden", "-shared", f"-I{ROOT / 'csrc'}"]
    subprocess.run([*command, str(PRIMITIVES), "-o", "device.so"], cwd=folder, check=True)
    return folder / "device.so"


def aligned(array: np.ndarray) -> np.ndarray:
    """A copy at a multiple of 64 bytes."""
    memory = np.empty(array.nbytes + 64, dtype=np.uint8)
    begin = -memory.ctypes.data % 64
    copy = memory[begin : begin + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


class Primitives:
    """One of the two compiled libraries."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.library.run.restype = ctypes.c_char_p

    def __call__(
        self,
        name: str,
        num_blocks: int,
        out: np.ndarray,
        a: np.ndarray,
        b: np.ndarray = NO_ARRAY,
        c: np.ndarray = NO_ARRAY,
    ) -> np.ndarray:
        """``out`` as the primitive leaves it, on ``num_blocks`` blocks."""
        arrays = [aligned(array) for array in (a, b, c, out)]
        data = (ctypes.c_void_p * 4)(*(array.ctypes.data for array in arrays))
        sizes = (ctypes.c_int64 * 4)(*(array.nbytes for array in arrays))
        error = self.library.run(name.encode(), num_blocks, data, sizes).decode()
        assert error == "", error
        return arrays[3]


GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device can be used")
COMPILE = {"host_model": compile_for_host, "cuda": compile_for_device}


@pytest.fixture(scope="module", params=["host_model", pytest.param("cuda", marks=GPU)])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Primitives:
    return Primitives(COMPILE[request.param](tmp_path_factory.mktemp(request.param)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="compiled for the tests on the GPU")
def test_device_side_compiles(tmp_path: Path) -> None:
    assert compile_for_device(tmp_path).is_file()


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def words(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Random bits: as floats, NaN and denormals too."""
    return rng.integers(0, 2**32, shape, dtype=np.uint32)


# Warps and blocks


def test_shfl_bfly(run: Primitives, rng: np.random.Generator) -> None:
    value, mask = words(rng, 64, 32), np.arange(64, dtype=np.int32) % 32
    out = run("shfl_bfly", 64, np.zeros_like(value), value, mask)
    lanes = np.arange(32) ^ mask[:, None]
    np.testing.assert_array_equal(out, np.take_along_axis(value, lanes, 1))


def test_shfl_idx(run: Primitives, rng: np.random.Generator) -> None:
    value, lanes = words(rng, 64, 32), rng.integers(0, 32, (64, 32), dtype=np.int32)
    out = run("shfl_idx", 64, np.zeros_like(value), value, lanes)
    np.testing.assert_array_equal(out, np.take_along_axis(value, lanes.astype(int), 1))


def test_vote_ballot(run: Primitives, rng: np.random.Generator) -> None:
    holds = rng.integers(0, 2, (64, 32), dtype=np.int32) * 6
    holds[0], holds[1] = 0, 1
    out = run("vote_ballot", 64, np.zeros((64, 32), np.uint32), holds)
    bits = ((holds != 0).astype(np.uint64) << np.arange(32, dtype=np.uint64)).sum(1)
    np.testing.assert_array_equal(out, np.repeat(bits.astype(np.uint32), 32).reshape(64, 32))


def test_redux_max(run: Primitives, rng: np.random.Generator) -> None:
    value = words(rng, 64, 32)
    value[0] = 7
    out = run("redux_max", 64, np.zeros_like(value), value)
    np.testing.assert_array_equal(out, np.broadcast_to(value.max(1, keepdims=True), (64, 32)))


def test_popc(run: Primitives, rng: np.random.Generator) -> None:
    bits = words(rng, 64, 32)
    bits[0, :2] = 0, 2**32 - 1
    out = run("popc", 64, np.zeros_like(bits), bits)
    expected = [bin(number).count("1") for number in bits.ravel().tolist()]
    np.testing.assert_array_equal(out.ravel(), expected)


def test_shl(run: Primitives, rng: np.random.Generator) -> None:
    bits, count = words(rng, 64, 32), np.arange(64 * 32, dtype=np.uint32).reshape(64, 32) % 70
    count[0, :2] = 2**31, 2**32 - 1
    out = run("shl", 64, np.zeros_like(bits), bits, count)
    expected = bits.astype(np.uint64) << np.minimum(count, 32).astype(np.uint64)
    np.testing.assert_array_equal(out, expected.astype(np.uint32))


def test_bar_sync_of_groups(run: Primitives, rng: np.random.Generator) -> None:
    """Fifteen groups of two warps, of which each ends when it likes."""
    value, turns = words(rng, 16, 15, 64), rng.integers(0, 200, (16, 15, 1), dtype=np.int32)
    out = run("bar_sync_of_groups", 16, np.zeros_like(value), value, turns)
    for turn in range(200):
        value = np.where(turn < turns, 3 * np.roll(value, -33, 2) + np.uint32(turn), value)
    np.testing.assert_array_equal(out, value)


# Memory


def test_copy_v4(run: Primitives, rng: np.random.Generator) -> None:
    """ld_global_nc_v4 and st_global_v4."""
    bits = words(rng, 64, 32, 4)
    np.testing.assert_array_equal(run("copy_v4", 64, np.zeros_like(bits), bits), bits)


def test_shared_v4(run: Primitives, rng: np.random.Generator) -> None:
    """st_shared_v4 and ld_shared_v4."""
    bits = words(rng, 64, 32, 4)
    neighbour = bits[:, np.arange(32) ^ 1]
    np.testing.assert_array_equal(run("shared_v4", 64, np.zeros_like(bits), bits), neighbour)


def test_griddepcontrol(run: Primitives, rng: np.random.Generator) -> None:
    """A kernel that starts while the one before it runs waits for all of it; ld_global_v4."""
    for _ in range(20):
        bits = words(rng, 16, 32, 4)
        out = run("griddepcontrol", 16, words(rng, 2, 16, 32, 4), bits)
        np.testing.assert_array_equal(out, [bits, bits[::-1, ::-1]])


def test_red_global_max(run: Primitives, rng: np.random.Generator) -> None:
    """Many threads of many blocks write few numbers, which are unsigned."""
    value, place = words(rng, 64, 32), rng.integers(0, 40, (64, 32), dtype=np.int32)
    before = words(rng, 48) >> np.arange(48, dtype=np.uint32) % 16
    expected = before.copy()
    np.maximum.at(expected, place, value)
    np.testing.assert_array_equal(run("red_global_max", 64, before, value, place), expected)


@pytest.mark.parametrize("num_bytes", [4, 16])
def test_cp_async(run: Primitives, rng: np.random.Generator, num_bytes: int) -> None:
    source, size = words(rng, 300, num_bytes // 4), (64, 32)
    row, valid = (rng.integers(0, limit, size, dtype=np.int32) for limit in (300, 2))
    out = np.full((*size, num_bytes // 4), 7, np.uint32)
    out = run(f"cp_async_{num_bytes}", 64, out, source, row, valid)
    np.testing.assert_array_equal(out, np.where(valid[..., None], source[row], 0))


@pytest.mark.parametrize("num_bytes", [4, 16])
def test_cp_async_reads_nothing_where_not_valid(run: Primitives, num_bytes: int) -> None:
    """The address lies far outside the source, where a read would fail."""
    row, valid = np.full((1, 32), 2**31 // num_bytes - 1, np.int32), np.zeros((1, 32), np.int32)
    out = np.full((1, 32, num_bytes // 4), 7, np.uint32)
    out = run(f"cp_async_{num_bytes}", 1, out, np.zeros(4, np.uint32), row, valid)
    assert not out.any()


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(run: Primitives, rng: np.random.Generator, transposed: bool) -> None:
    memory, row = words(rng, 64, 64, 4), rng.integers(0, 64, (64, 32), dtype=np.int32)
    name = "ldmatrix_x4_trans" if transposed else "ldmatrix_x4"
    out = run(name, 64, np.zeros((64, 32, 4), np.uint32), memory, row)
    # (block, matrix, row, column): lanes 8i..8i+7 name the rows of matrix i
    rows = np.take_along_axis(memory, row[..., None].astype(int), 1)
    matrices = rows.view(np.uint16).reshape(64, 4, 8, 8)
    if transposed:
        matrices = matrices.swapaxes(2, 3)
    # Lane l gets elements 2 (l % 4), + 1 of row l / 4.
    expected = np.ascontiguousarray(matrices).view(np.uint32).reshape(64, 4, 32).swapaxes(1, 2)
    np.testing.assert_array_equal(out, expected)


# Matrices


def fragments(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, ...]:
    """The registers of all lanes, for A (n, 16, 16), B (n, 16, 8) as 16-bit patterns and C
    (n, 16, 8) float32, after the tables of mma.m16n8k16 in the PTX manual: group g = lane / 4,
    t = lane % 4."""
    lane, i = np.arange(32)[:, None], np.arange(8)[None]
    g, t = lane // 4, lane % 4
    a_row = np.where((i < 2) | ((4 <= i) & (i < 6)), g, g + 8)
    a_column = t * 2 + (i & 1) + np.where(i >= 4, 8, 0)
    ra = a[:, a_row, a_column]
    i = np.arange(4)[None]
    rb = b[:, t * 2 + (i & 1) + np.where(i >= 2, 8, 0), np.broadcast_to(g, (32, 4))]
    rc = c[:, np.where(i < 2, g, g + 8), t * 2 + (i & 1)]
    registers = [np.ascontiguousarray(r).view(np.uint32) for r in (ra, rb)]
    return (*registers, np.ascontiguousarray(rc))


def mma(
    run: Primitives, dtype: str, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor
) -> torch.Tensor:
    """A B + C in the instruction's arithmetic, (n, 16, 8)."""
    patterns = (t.contiguous().view(torch.int16).numpy().view(np.uint16) for t in (a, b))
    ra, rb, rc = fragments(*patterns, c.numpy())
    count = a.shape[0]
    out = run(f"mma_{dtype}", count, np.full((count, 32, 4), 7, np.float32), ra, rb, rc)
    result = np.empty((count, 16, 8), np.float32)
    lane, i = np.arange(32)[:, None], np.arange(4)[None]
    result[:, np.where(i < 2, lane // 4, lane // 4 + 8), lane % 4 * 2 + (i & 1)] = out
    return torch.from_numpy(result)


def exact(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    return a.double() @ b.double() + c.double()


def same_numbers(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Bit for bit, apart from the sign of zero and the bits of a NaN."""
    torch.testing.assert_close(actual, expected.float(), rtol=0, atol=0, equal_nan=True)


Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def mma_operands(rng: np.random.Generator, draw: Callable[..., Any], count: int = 200) -> Operands:
    a, b, c = (torch.from_numpy(draw(rng, (count, 16, n))) for n in (16, 8, 8))
    return a.double(), b.double(), c.double()


def integers(limit: int) -> Callable[..., Any]:
    return lambda rng, shape: rng.integers(-limit, limit + 1, shape)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("limit", [1, 200])
def test_mma_of_integers(run: Primitives, rng: np.random.Generator, dtype: str, limit: int) -> None:
    """Sums of 17 integers below 2^20 are exact in whatever order they are added."""
    a, b, c = mma_operands(rng, integers(limit))
    a, b, c = a.to(TYPES[dtype]), b.to(TYPES[dtype]), c.float()
    same_numbers(mma(run, dtype, a, b, c), exact(a, b, c))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("spread", [0.0, 4.0])
def test_mma_of_numbers(
    run: Primitives,
    rng: np.random.Generator,
    dtype: str,
    spread: float,
    record: Callable[[str, object], None],
) -> None:
    """Products are exact. The manual leaves the order and the rounding of the sum open. In any
    order, aligned to the largest term or not, each of 17 terms loses at most one float32 step
    (2^-23) of the sum of all magnitudes, truncation included."""

    def draw(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        return rng.standard_normal(shape) * np.exp(spread * rng.standard_normal(shape))

    a, b, c = mma_operands(rng, draw)
    a, b = (t.clamp(-60000, 60000).to(TYPES[dtype]) for t in (a, b))
    c = c.float()
    error = (mma(run, dtype, a, b, c).double() - exact(a, b, c)).abs()
    bound = 17 * 2.0**-23 * exact(a.abs(), b.abs(), c.abs())
    record("error_ratio", (error / bound).max().item())
    assert (error <= bound).all()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("what", ["a", "b", "c", "product"])
def test_mma_of_denormals(run: Primitives, rng: np.random.Generator, dtype: str, what: str) -> None:
    """Denormal inputs and results are numbers. Results are exact: all are few steps of one size."""
    a, b, c = mma_operands(rng, integers(3))
    exponent = {"float16": -24, "bfloat16": -133}[dtype]  # of the smallest number
    if what == "a":
        a, b, c = a * 2.0**exponent, b * 2.0**8, c * 2.0 ** (exponent + 8)
    elif what == "b":
        a, b, c = a * 2.0**8, b * 2.0**exponent, c * 2.0 ** (exponent + 8)
    elif what == "c":
        a, b, c = a * 0, b, c * 2.0**-149
    elif dtype == "float16":
        a, b, c = a * 2.0**exponent, b * 2.0**exponent, c * 2.0 ** (2 * exponent)
    else:  # a denormal float32 of normal factors
        a, b, c = a * 2.0**-70, b * 2.0**-75, c * 2.0**-145
    a, b, c = a.to(TYPES[dtype]), b.to(TYPES[dtype]), c.float()
    same_numbers(mma(run, dtype, a, b, c), exact(a, b, c))


@pytest.mark.parametrize("dtype", TYPES)
def test_mma_of_infinities_and_nan(run: Primitives, rng: np.random.Generator, dtype: str) -> None:
    """With a few of them in each matrix, each result is NaN, an infinity or a number as in exact
    arithmetic with infinities."""
    a, b, c = mma_operands(rng, integers(3), 1000)
    odd = torch.tensor([torch.inf, -torch.inf, torch.nan], dtype=torch.float64)
    for matrix, one_in in ((a, 100), (b, 100), (c, 20)):
        where = torch.from_numpy(rng.integers(0, one_in, matrix.shape) == 0)
        matrix[where] = odd[torch.from_numpy(rng.integers(0, 3, int(where.sum())))]
    a, b, c = a.to(TYPES[dtype]), b.to(TYPES[dtype]), c.float()
    expected = c.double()
    for k in range(16):  # a sum of its own for each k: a library's product may skip zeros
        expected = expected + a[:, :, k, None].double() * b[:, None, k].double()
    assert expected.isnan().any() and expected.isposinf().any() and expected.isneginf().any()
    same_numbers(mma(run, dtype, a, b, c), expected)


def test_mma_beyond_float32(run: Primitives) -> None:
    """bfloat16 products beyond float32 become infinite and keep their sign."""
    a, b, c = torch.zeros(1, 16, 16), torch.zeros(1, 16, 8), torch.ones(1, 16, 8)
    a[0, :, 3] = torch.tensor([1e30, -1e30]).repeat(8)
    b[0, 3] = 2e30
    result = mma(run, "bfloat16", a.bfloat16(), b.bfloat16(), c)
    same_numbers(result, a.sum(2, keepdim=True).sign().expand(1, 16, 8) * torch.inf)


# Numbers


def rounding_cases(dtype: str, rng: np.random.Generator) -> torch.Tensor:
    """Every number of the type, every tie between neighbours and the float32 numbers beside it,
    numbers that overflow, and random bits; a multiple of 32 of them."""
    numbers = torch.arange(65536).to(torch.int16).view(TYPES[dtype]).float()
    finite = numbers[numbers.isfinite()].sort().values
    ties = (finite[1:].double() + finite[:-1].double()).div(2).float()
    beyond = finite[-1] + (finite[-1] - finite[-2]) / 2  # rounds to infinity
    ties = torch.cat([ties, beyond[None], -beyond[None]])
    sides = [torch.nextafter(ties, torch.tensor(limit)) for limit in (torch.inf, -torch.inf)]
    random = torch.from_numpy(words(rng, 100_000).view(np.float32))
    values = torch.cat([numbers, ties, *sides, random])
    return torch.cat([values, values[: -len(values) % 32]])


def bits_of(values: torch.Tensor, dtype: str) -> np.ndarray:
    """The bits of torch's rounding to nearest even; NaN becomes the one that cvt gives."""
    rounded = values.to(TYPES[dtype])
    bits = rounded.view(torch.int16).numpy().view(np.uint16).copy()
    bits[rounded.isnan().numpy()] = 0x7FFF
    return bits


@pytest.mark.parametrize("dtype", TYPES)
def test_from_float(run: Primitives, rng: np.random.Generator, dtype: str) -> None:
    values = rounding_cases(dtype, rng)
    out = np.zeros(len(values), np.uint16)
    out = run(f"from_float_{dtype}", len(values) // 32, out, values.numpy())
    np.testing.assert_array_equal(out, bits_of(values, dtype))


@pytest.mark.parametrize("dtype", TYPES)
def test_cvt_rn_x2(run: Primitives, rng: np.random.Generator, dtype: str) -> None:
    low = rounding_cases(dtype, rng)
    high = low.flip(0)
    out = np.zeros(len(low), np.uint32)
    out = run(f"cvt_rn_x2_{dtype}", len(low) // 32, out, low.numpy(), high.numpy())
    halves = out.view(np.uint16).reshape(-1, 2)  # little endian: the low half first
    np.testing.assert_array_equal(halves[:, 0], bits_of(low, dtype))
    np.testing.assert_array_equal(halves[:, 1], bits_of(high, dtype))


@pytest.mark.parametrize("dtype", TYPES)
def test_to_float(run: Primitives, dtype: str) -> None:
    patterns = np.arange(65536, dtype=np.uint16)
    out = run(f"to_float_{dtype}", 2048, np.zeros(65536, np.float32), patterns)
    expected = torch.from_numpy(patterns.view(np.int16)).view(TYPES[dtype]).float().numpy()
    number = ~np.isnan(expected)
    np.testing.assert_array_equal(out.view(np.uint32)[number], expected.view(np.uint32)[number])
    assert np.isnan(out[~number]).all()


def test_float_as_uint(run: Primitives, rng: np.random.Generator) -> None:
    bits = words(rng, 2048)
    out = run("float_as_uint", 64, np.zeros_like(bits), bits)
    np.testing.assert_array_equal(out, bits)


def test_uint_as_float(run: Primitives, rng: np.random.Generator) -> None:
    bits = words(rng, 2048)
    out = run("uint_as_float", 64, np.zeros_like(bits), bits)
    np.testing.assert_array_equal(out, bits)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("which", ["max", "min"])
def test_extremes_of_pairs(
    run: Primitives, rng: np.random.Generator, which: str, dtype: str
) -> None:
    """Of a number and a NaN the number, of two NaN a NaN."""
    a, b = words(rng, 4096), words(rng, 4096)
    b[:64] = a[:64] ^ 0x80008000
    a[64:96], b[80:112] = 0x7FFF7FFF, 0xFFC0FFC0
    out = run(f"{which}_x2_{dtype}", 128, np.zeros_like(a), a, b)
    x, y, found = (
        torch.from_numpy(words.view(np.int16)).view(TYPES[dtype]).double() for words in (a, b, out)
    )
    expected = torch.fmax(x, y) if which == "max" else torch.fmin(x, y)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_rsqrt_approx(run: Primitives, rng: np.random.Generator) -> None:
    x = np.exp2(rng.uniform(-126, 127.9, 32 * 1000)).astype(np.float32)
    x[:3] = np.inf, np.nan, 1.0
    y = run("rsqrt_approx", 1000, np.zeros_like(x), x).astype(np.float64)
    assert y[0] == 0 and np.isnan(y[1]) and y[2] == 1
    error = np.abs(y[2:] * np.sqrt(x[2:].astype(np.float64)) - 1)
    assert error.max() <= 2**-22.9


def test_ex2_approx(run: Primitives, record: Callable[[str, object], None]) -> None:
    """Within 2 ulp of 2^x, and 1 for 0; denormal results become zero."""
    x = np.concatenate([np.linspace(-160, 130, 100_000), np.linspace(-1, 1, 100_000)])
    special = [np.inf, -np.inf, np.nan, 0.0, -0.0, 2.0**-140, -(2.0**-140)]
    x = np.concatenate([x, np.arange(-160, 130), special]).astype(np.float32)
    x = np.concatenate([x, x[: -len(x) % 32]])
    with np.errstate(over="ignore", invalid="ignore"):
        truth = np.exp2(x.astype(np.float64))
    y = run("ex2_approx", len(x) // 32, np.zeros_like(x), x).astype(np.float64)
    # A result between the last denormal and the first normal number may be taken for either.
    normal = (truth >= 2.0**-126 * (1 + 2.0**-21)) & (truth < 2.0**128 * (1 - 2.0**-21))
    ulp = 2.0 ** (np.floor(np.log2(truth[normal])) - 23)
    error = np.abs(y[normal] - truth[normal]) / ulp
    record("error_ratio", float(error.max() / 2))
    assert error.max() <= 2
    assert (y[truth < 2.0**-126 * (1 - 2.0**-21)] == 0).all()
    assert np.isposinf(y[truth >= 2.0**128]).all()
    np.testing.assert_array_equal(np.isnan(y), np.isnan(x))
    assert (y[x == 0] == 1).all()


# Device against model


def test_device_equals_model(
    tmp_path: Path, rng: np.random.Generator, record: Callable[[str, object], None]
) -> None:
    """How far device and model differ where the manual leaves bits open."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device can be used")
    model, device = (Primitives(build(tmp_path)) for build in COMPILE.values())
    x = rng.uniform(-126, 127, 320_000).astype(np.float32)
    y = [run("ex2_approx", 10_000, np.zeros_like(x), x) for run in (model, device)]
    steps = np.abs(y[0].view(np.int32).astype(np.int64) - y[1].view(np.int32))
    record("ex2_ulp", int(steps.max()))
    assert steps.max() <= 3  # two of the instruction's, one of the model's
    for dtype, torch_dtype in TYPES.items():
        a, b, c = mma_operands(rng, lambda rng, shape: rng.standard_normal(shape), 1000)
        a, b, c = a.to(torch_dtype), b.to(torch_dtype), c.float()
        sums = [mma(run, dtype, a, b, c).double() for run in (model, device)]
        apart = (sums[0] - sums[1]).abs() / exact(a.abs(), b.abs(), c.abs())
        record(f"mma_{dtype}_apart", apart.max().item() * 2.0**23)
        assert apart.max() <= 2 * 17 * 2.0**-23

"""What a call of the attention launches, and the machine code of what is launched."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from benchmarks.kernels.counting import host_model
from benchmarks.kernels.cycles import machine, sass
from benchmarks.kernels.table import _demangle, cuobjdump, source_name
from benchmarks.suite.cases import AttentionCase
from cogview_kernels import extension
from cogview_kernels.attention import operators

CSRC = machine.ROOT / "csrc"
SAMPLED_SMS = 4  # of machine.NUM_SMS
CASES = {
    "A": AttentionCase(1088, 64, 4, 192, batch=16),
    "B": AttentionCase(4224, 128, 2, 256, batch=4),
    "C": AttentionCase(4224, 128, 6, 704, batch=4),
    "D": AttentionCase(16448, 128, 2, 512),
}


class Kernel(NamedTuple):
    code: list[sass.Instruction]
    registers: int
    static_shared: int


@dataclasses.dataclass
class Launch:
    kernel: str
    params: bytes
    blocks: int
    threads: int
    dynamic_shared: int
    ranges: list[tuple[int, int]]  # of the memory that it may touch
    tensors: list[Tensor]  # own that memory


def digest(csrc: Path = CSRC) -> str:
    """Of everything that determines the kernels' machine code and their launches."""
    content = hashlib.sha256()
    for path in [*_headers(csrc), *sorted((csrc / "three_region_attention").rglob("*.c*"))]:
        content.update(path.relative_to(csrc).as_posix().encode() + path.read_bytes())
    return content.hexdigest()[:16]


def _headers(csrc: Path) -> list[Path]:
    folders = (csrc / name for name in ("instructions", "three_region_attention"))
    nested = [path for folder in folders for path in folder.rglob("*.*h") if path.suffix != ".sh"]
    return sorted([*nested, *csrc.glob("launch.*")])


def compiled(source: Path) -> Path:
    """The machine code of a kernel file, kept until the file or a header changes."""
    content = hashlib.sha256(source.name.encode())
    for path in [source, *_headers(CSRC)]:
        content.update(path.read_bytes())
    target = machine.CACHE / f"{source.stem}-{content.hexdigest()[:16]}.cubin"
    if not target.is_file():
        machine.CACHE.mkdir(parents=True, exist_ok=True)
        command = ["nvcc", "-gencode=arch=compute_90a,code=sm_90a", "-std=c++17", "-O3"]
        subprocess.run([*command, "-cubin", source, "-o", f"{target}.new"], check=True)
        Path(f"{target}.new").replace(target)
    return target


def kernels_of(binary: Path) -> dict[str, Kernel]:
    """The kernels of a cubin, by the names that the host model has for them."""
    program = cuobjdump()
    if program is None:
        raise SystemExit("cuobjdump is not installed: pip install -e '.[dev]'")

    def dump(what: str) -> list[str]:
        done = subprocess.run([program, what, binary], capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    used: dict[str, tuple[int, int]] = {}
    mangled = ""
    for line in dump("-res-usage"):
        if match := re.match(r" Function (\w+):", line):
            mangled = match.group(1)
        elif match := re.match(r"  REG:(\d+) .*SHARED:(\d+)", line):
            # The 1024 bytes that the system takes of each block are counted along.
            used[mangled] = int(match.group(1)), max(int(match.group(2)) - 1024, 0)
    found = dict(sass.functions(dump("-sass")))
    names = dict(zip(found, _demangle(list(found)), strict=True))
    return {names[name]: Kernel(code, *used[name]) for name, code in found.items()}


@functools.cache
def kernels(file: str = "*") -> dict[str, Kernel]:
    """Of the attention's source files whose name matches."""
    found: dict[str, Kernel] = {}
    for source in sorted((CSRC / "three_region_attention").rglob(f"{file}.cu")):
        found |= kernels_of(compiled(source))
    return found


def short(kernel: str) -> str:
    """backward_dq of sm80::three_region_attention_backward_dq_kernel<...>"""
    name = kernel.partition("<")[0].rpartition("::")[2]
    return name.removeprefix("three_region_attention_").removesuffix("_kernel")


def recorded(case: AttentionCase) -> list[Launch]:
    """The launches of a forward and, but for decoding, of a backward. All heads of q, k, v and dout
    share the memory of one; the statistics of the rows are made up, near those of a softmax."""
    host_model()  # registers the operators
    generator = torch.Generator().manual_seed(0)

    def heads(number: int, rows: int) -> Tensor:
        one = torch.randn(1, 1, rows, case.head_dim, generator=generator).to(case.torch_dtype)
        return one.expand(case.batch, number, rows, case.head_dim)

    layout = case.layout("cpu")
    text_len, pivots = layout.text_len, layout.pivot_idx
    assert isinstance(text_len, Tensor) and pivots is not None
    q, dout = heads(case.num_heads, case.queries), heads(case.num_heads, case.queries)
    k, v = heads(case.kv_heads, case.seqlen), heads(case.kv_heads, case.seqlen)
    rows = torch.zeros(q.shape[:3])
    far_keys = operators._pack_far_keys(text_len, pivots, case.seqlen)
    scalars = case.query_window, case.key_window_times, 0.0, 0.0, case.head_dim**-0.5

    def calls() -> None:
        operators._pack_far_keys(text_len, pivots, case.seqlen)
        out, *_ = operators._forward(q, k, v, far_keys, *scalars)
        if case.q_len == 0:
            statistics = rows, torch.full_like(rows, 8.0)
            operators._backward(dout, None, q, k, v, out, *statistics, far_keys, *scalars)

    return record(calls)


def record(calls: Any) -> list[Launch]:
    """The launches of ``calls()``, which are not run. Workspaces are set to zero."""
    model = host_model()
    names = ("_far_keys_out", "_forward_out", "_backward_out")
    kept: list[Any] = []

    def keeping(operator: Any) -> Any:
        def call(*arguments: Any) -> None:
            kept.extend(arguments)
            operator(*arguments)

        return call

    new = {name: keeping(getattr(operators, name)) for name in names}
    model.record_launches(True)
    try:
        with (
            mock.patch.multiple(operators, **new),
            mock.patch.object(extension, "host_model_num_sms", machine.NUM_SMS),
        ):
            calls()
    finally:
        model.record_launches(False)
    tensors = [argument for argument in kept if isinstance(argument, Tensor)]
    for tensor in tensors:
        if tensor.dtype == torch.float32:
            tensor.nan_to_num_(0.0, 0.0, 0.0)
    ranges = sorted({(tensor.data_ptr(), tensor.data_ptr() + _extent(tensor)) for tensor in tensors})
    return [
        Launch(
            source_name(launch["kernel"]),
            launch["params"],
            launch["grid"][0],
            launch["threads"],
            launch["dynamic_shared"],
            ranges,
            tensors,
        )
        for launch in model.take_recorded_launches()
    ]


def _extent(tensor: Tensor) -> int:
    """Bytes from the first element to behind the last."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return (sum((size - 1) * stride for size, stride in steps) + 1) * tensor.element_size()


def sampled_blocks(number: int) -> list[int]:
    """One of each 33 blocks, in the order of their launch, at a place that moves evenly through the
    33: blocks that follow each other in a head take turns."""
    size = max(round(number * SAMPLED_SMS / machine.NUM_SMS), 1)
    golden = (5**0.5 - 1) / 2
    return [int((i + (i * golden) % 1) * number / size) for i in range(size)]

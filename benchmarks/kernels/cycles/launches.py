"""What a call of an operator launches, and the machine code of what is launched."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from benchmarks.kernels.cycles import machine, sass
from benchmarks.kernels.table import SHARED_RESERVED, _output, cuobjdump, source_name
from benchmarks.suite.cases import AttentionCase
from cogview_kernels import extension
from cogview_kernels.attention import operators
from cogview_kernels.norm import operators as norm_operators

CSRC = machine.ROOT / "csrc"
ATTENTION = ("three_region_attention",)  # folders of CSRC
NORMS = "pb_relax_layer_norm", "sandwich_residual"
FAMILIES = ATTENTION, NORMS
SAMPLED_SMS = 4  # of machine.NUM_SMS
CASES = {
    "A": AttentionCase(1088, 64, 4, 192, batch=16),
    "B": AttentionCase(4224, 128, 2, 256, batch=4),
    "C": AttentionCase(4224, 128, 6, 704, batch=4),
    "D": AttentionCase(16448, 128, 2, 512),
    # Decoding: printed where it is asked for.
    "E": AttentionCase(4224, 128, 2, 256, batch=16, q_len=1),
    "F": AttentionCase(4224, 128, 2, 256, batch=16, q_len=1, num_kv_heads=5),
    "G": AttentionCase(4224, 128, 2, 256, batch=1, q_len=1),
    "H": AttentionCase(4224, 128, 2, 256, batch=16, q_len=8, num_kv_heads=5),
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
    grid_y: int = 1  # blocks = x * y


def digest(csrc: Path = CSRC, families: Sequence[Sequence[str]] = FAMILIES) -> str:
    """Of everything that determines the kernels' machine code and their launches."""
    content = hashlib.sha256()
    for family in families:
        sources = (path for folder in family for path in (csrc / folder).rglob("*.c*"))
        for path in [*_headers(csrc, family), *sorted(sources)]:
            content.update(path.relative_to(csrc).as_posix().encode() + path.read_bytes())
    return content.hexdigest()[:16]


def _headers(csrc: Path, family: Sequence[str]) -> list[Path]:
    """What the sources in these folders may include."""
    nested = [path for name in ("instructions", *family) for path in (csrc / name).rglob("*.h")]
    nested += [path for name in ("instructions", *family) for path in (csrc / name).rglob("*.cuh")]
    return sorted([*nested, *csrc.glob("launch.*")])


def compiled(source: Path) -> Path:
    """The machine code of a kernel file, kept until the file or a header changes."""
    content = hashlib.sha256(source.name.encode())
    (family,) = (family for family in FAMILIES if set(family) & set(source.parts))
    for path in [source, *_headers(CSRC, family)]:
        content.update(path.read_bytes())
    target = machine.CACHE / f"{source.stem}-{content.hexdigest()[:16]}.cubin"
    if not target.is_file():
        machine.CACHE.mkdir(parents=True, exist_ok=True)
        command = ["nvcc", "-gencode=arch=compute_90a,code=sm_90a", "-std=c++17", "-O3"]
        subprocess.run([*command, "-cubin", source, "-o", f"{target}.new"], check=True)
        Path(f"{target}.new").replace(target)
    return target


@functools.cache
def kernels_of(binary: Path) -> dict[str, tuple[str, int, int]]:
    """Of each kernel of a cubin, by the name that the host model has for it: its mangled name,
    registers, bytes of static shared memory."""
    usage = _output([_cuobjdump(), "-res-usage", str(binary)])
    found = re.findall(r" Function (\w+):\s+REG:(\d+) .*SHARED:(\d+)", usage)
    names = _output(["c++filt"], "\n".join(mangled for mangled, *_ in found)).splitlines()
    return {
        source_name(name): (mangled, int(registers), max(int(shared) - SHARED_RESERVED, 0))
        for name, (mangled, registers, shared) in zip(names, found, strict=True)
    }


def kernel_of(binary: Path, name: str) -> Kernel:
    mangled, registers, static_shared = kernels_of(binary)[name]
    dump = _output([_cuobjdump(), "-sass", "-fun", mangled, str(binary)])
    ((_, code),) = sass.functions(dump.splitlines())
    return Kernel(code, registers, static_shared)


def _cuobjdump() -> str:
    program = cuobjdump()
    if program is None:
        raise SystemExit("cuobjdump is not installed: pip install -e '.[dev]'")
    return program


@functools.cache
def machine_code(name: str) -> Kernel:
    """Of a kernel, compiled from its source."""
    return kernel_of(compiled(source_of(name)), name)


def source_of(name: str) -> Path:
    if "three_region_attention" in name:
        file = re.sub("(backward|decode)_(row|partial|merge)", r"\1", short(name))
        (source,) = (CSRC / "three_region_attention").rglob(f"{file}.cu")
        return source
    definition = re.compile(rf"\b{name.partition('<')[0].rpartition('::')[2]}\(")
    sources = (path for folder in NORMS for path in sorted((CSRC / folder).rglob("*.cu")))
    (source,) = (path for path in sources if definition.search(path.read_text()))
    return source


def short(kernel: str) -> str:
    """backward_dq of sm80::three_region_attention_backward_dq_kernel<...>"""
    name = kernel.partition("<")[0].rpartition("::")[2]
    return name.removeprefix("three_region_attention_").removesuffix("_kernel")


def recorded(case: AttentionCase) -> list[Launch]:
    """The launches of a forward and, but for decoding, of a backward. All heads of q, k, v and dout
    share the memory of one; the statistics of the rows are made up, near those of a softmax."""
    _host_model()  # registers the operators
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
    window = case.query_window, case.key_window_times
    biases_and_scale = 0.0, 0.0, case.head_dim**-0.5

    def calls() -> None:
        operators._pack_far_keys(text_len, pivots, case.seqlen)
        out, *_ = operators._forward(q, k, v, far_keys, *window, *biases_and_scale)
        out.zero_()  # it holds what memory held
        if case.q_len == 0:
            statistics = rows, torch.full_like(rows, 8.0)
            operators._backward(
                dout, None, q, k, v, out, *statistics, far_keys, *window, *biases_and_scale
            )

    return record(calls, bound=32.0)


def _host_model() -> Any:
    if reason := extension.why_not_host_model():
        raise SystemExit(reason)
    return importlib.import_module("cogview_kernels._host_model")


def record(
    calls: Callable[[], Any], bound: float = 0.0, num_sms: int = machine.NUM_SMS
) -> list[Launch]:
    """The launches of ``calls()``, which are not run. What the row kernel of the attention's
    backward leaves for the others is made up, in case that not all its blocks will run: delta is
    zero, the bounds of float16 gradients are ``bound``."""
    model = _host_model()
    kept: list[Any] = []

    def keeping(module: ModuleType, name: str) -> Any:
        operator = getattr(module, name)

        def call(*arguments: Any) -> None:
            kept.extend(arguments)
            if name == "_backward_out":
                *_, delta, bounds, _, _ = arguments
                delta.zero_()
                if bounds is not None:
                    bounds.view(torch.float32).fill_(bound)
            operator(*arguments)

        return call

    model.record_launches(True)
    try:
        with contextlib.ExitStack() as stack:
            for module in (operators, norm_operators):
                names = [name for name in vars(module) if re.fullmatch(r"_\w+_out", name)]
                wrapped = {name: keeping(module, name) for name in names}
                stack.enter_context(mock.patch.multiple(module, **wrapped))
            stack.enter_context(extension.modelled_device(num_sms))
            calls()
    finally:
        model.record_launches(False)
    tensors = [argument for argument in kept if isinstance(argument, Tensor)]
    sizes = {tensor.data_ptr(): _extent(tensor) for tensor in tensors}
    ranges = [(start, start + size) for start, size in sorted(sizes.items())]
    return [
        Launch(
            source_name(launch["kernel"]),
            launch["params"],
            launch["grid"][0] * launch["grid"][1],
            launch["threads"],
            launch["dynamic_shared"],
            ranges,
            tensors,
            launch["grid"][1],
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

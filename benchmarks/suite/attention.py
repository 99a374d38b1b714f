"""Attention: ours, other ways to compute the same function, and what people use in its place.

FlexAttention gets what its experts would give it: compiled for each case's static shapes, block
masks with full blocks apart and ready before the clock starts, tables in place of searches in its
masks, and tiles of 128 positions, which its configurations for Ampere and Hopper divide. At their
defaults are ``ROWS_GUARANTEED_SAFE`` (where windows begin inside of tiles, a row's first tile may
be hidden from it), ``PRESCALE_QK`` (less accurate) and ``USE_TMA`` (experimental). The row
"autotuned" has torch search tiles, warps and stages, timed on block masks of its own making.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import (
    AuxRequest,
    BlockMask,
    FlexKernelOptions,
    create_block_mask,
    flex_attention,
)

import cogview_kernels as ck
from benchmarks.suite.cases import AttentionCase
from benchmarks.suite.methods import Method, Prepare, compiled
from cogview_kernels import extension
from cogview_kernels.attention.layout import window_start

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]  # (B, H, Sq, D), 2x (B, G, Sk, D)
WhyNot = Callable[[AttentionCase, torch.device], str | None]
Mod = Callable[..., Tensor]

RIVAL = "FlexAttention, gathered pivots"
BLOCK = 128  # positions on each side of FlexAttention's tiles
MAX_MASK_BYTES = 2 << 30


def _first_reason(*reasons: WhyNot) -> WhyNot:
    """The first of these that speaks up."""

    def why_not(case: AttentionCase, device: torch.device) -> str | None:
        return next(filter(None, (reason(case, device) for reason in reasons)), None)

    return why_not


def _not_on_cuda(case: AttentionCase, device: torch.device) -> str | None:
    if device.type == "cuda":
        return "on a GPU each of its kernels has a row of its own"
    return None


def _only_on_cuda(case: AttentionCase, device: torch.device) -> str | None:
    return None if device.type == "cuda" else f"it has no kernel for {device.type.upper()}"


def _only_halves(case: AttentionCase, device: torch.device) -> str | None:
    if case.dtype in ("float16", "bfloat16"):
        return None
    return f"it takes float16 and bfloat16, not {case.dtype}"


def _installed(module: str, package: str) -> WhyNot:
    def why_not(case: AttentionCase, device: torch.device) -> str | None:
        try:
            found = importlib.util.find_spec(module) is not None
        except ImportError:  # a package around it is missing
            found = False
        return None if found else f"{package} is not installed"

    return why_not


def _repeated(x: Tensor, num_heads: int) -> Tensor:
    """Key/value heads, one for each query head: a copy where heads are grouped."""
    return x if x.shape[1] == num_heads else x.repeat_interleave(num_heads // x.shape[1], 1)


# Ours


def _ours(backend_on_cuda: str) -> Prepare:
    def prepare(
        case: AttentionCase, layout: ck.ThreeRegionLayout, device: torch.device
    ) -> Attention:
        backend = backend_on_cuda if device.type == "cuda" else "portable"

        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return ck.three_region_attention(q, k, v, layout, backend=backend)

        return attention

    return prepare


def _why_no_kernel(case: AttentionCase, device: torch.device) -> str | None:
    """On a CPU the portable path has this row."""
    if device.type != "cuda":
        return None
    return _only_halves(case, device) or extension.why_no_attention_kernel(
        case.torch_dtype, case.head_dim, device, "cuda"
    )


def _why_not_portable(case: AttentionCase, device: torch.device) -> str | None:
    return None if device.type == "cuda" else "on a CPU it is what cogview_kernels runs"


# scaled_dot_product_attention


def _sdpa(backend: SDPBackend | None) -> Prepare:
    """Dense causal, by one of its kernels; ``None``: its own choice."""

    def prepare(
        case: AttentionCase, layout: ck.ThreeRegionLayout, device: torch.device
    ) -> Attention:
        # is_causal aligns the first query with the first key; here the last ones are aligned, and
        # a single query sees every key.
        lower_right = 1 < case.queries < case.seqlen
        mask: Any = causal_lower_right(case.queries, case.seqlen) if lower_right else None
        is_causal = case.queries == case.seqlen

        def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if backend is SDPBackend.EFFICIENT_ATTENTION:  # the one that knows no grouped heads
                k, v = _repeated(k, q.shape[1]), _repeated(v, q.shape[1])
            grouped = k.shape[1] != q.shape[1]
            return F.scaled_dot_product_attention(
                q, k, v, mask, is_causal=is_causal, enable_gqa=grouped
            )

        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            assert backend is not None
            with sdpa_kernel(backend):
                return dense(q, k, v)

        return dense if backend is None else attention

    return prepare


def _sdpa_dense_mask(
    case: AttentionCase, layout: ck.ThreeRegionLayout, device: torch.device
) -> Attention:
    """Three regions as a mask of every query and key, by the kernel that torch chooses."""
    window, text, pivot = layout.regions(case.batch, case.queries, case.seqlen)
    mask = window | text | pivot
    if layout.text_bias or layout.pivot_bias:
        bias = torch.zeros(mask.shape, dtype=case.torch_dtype, device=device)
        bias = bias.masked_fill(text, layout.text_bias).masked_fill(pivot, layout.pivot_bias)
        mask = bias.masked_fill(~mask, -torch.inf)
    mask = mask[:, None]

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = _repeated(k, q.shape[1]), _repeated(v, q.shape[1])
        return F.scaled_dot_product_attention(q, k, v, mask)

    return attention


def _mask_is_huge(case: AttentionCase, device: torch.device) -> str | None:
    # torch makes logits' biases of it.
    mask_bytes = case.batch * case.queries * case.seqlen * case.torch_dtype.itemsize
    if mask_bytes <= MAX_MASK_BYTES:
        return None
    return f"its mask of every query and key would take {mask_bytes / 2**30:.1f} GiB"


# Text and pivots, gathered


@dataclasses.dataclass(frozen=True)
class FarKeys:
    """Text and pivots of each sample in one ascending list, of which each query sees a prefix."""

    index: Tensor  # (B, L) int64, their positions; behind a sample's last one any position
    place: Tensor  # (B, Sk) int64, where in the list a position stands; -1: nowhere
    num_text: Tensor  # (B,) int64, entries of the list that are text
    count: Tensor  # (B, Sq) int32, entries that a query sees


def far_keys(layout: ck.ThreeRegionLayout, case: AttentionCase, multiple: int = 1) -> FarKeys:
    """The keys that the last query sees outside its window: earlier queries see fewer of them.
    ``L`` is rounded up to a multiple, at least one of it."""
    _, text, pivot = (region[:, 0] for region in layout.regions(case.batch, 1, case.seqlen))
    number = (text | pivot).cumsum(1)  # of entries up to a position
    place = torch.where(text | pivot, number - 1, -1)
    length = max(1, -(-int(number[:, -1].max()) // multiple)) * multiple
    index = place.new_zeros(case.batch, length + 1)
    positions = torch.arange(case.seqlen, device=place.device).expand_as(place)
    index.scatter_(1, torch.where(place < 0, length, place), positions)

    query = positions[0, case.seqlen - case.queries :]
    start = window_start(query, layout.query_window, layout.key_window_times)
    count = F.pad(number, (1, 0))[:, start].int()
    return FarKeys(index[:, :length], place, text.sum(1), count)


class _Gather(torch.autograd.Function):
    """Rows of ``x (B, G, S, D)``; the gradient is gathered, too, not added up by atomics."""

    @staticmethod
    def forward(x: Tensor, index: Tensor, place: Tensor) -> Tensor:
        rows = index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
        return x.gather(2, rows)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        place = ctx.saved_tensors[0][:, None, :, None]
        rows = place.clamp(min=0).expand(-1, grad.shape[1], -1, grad.shape[3])
        return grad.gather(2, rows).masked_fill(place < 0, 0.0), None, None


def _gather(x: Tensor, far: FarKeys) -> Tensor:
    gathered: Tensor = _Gather.apply(x, far.index, far.place)
    return gathered


# FlexAttention


def _seen_blocks(
    layout: ck.ThreeRegionLayout, case: AttentionCase, far: FarKeys, first_key: int
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Which blocks of keys some query of a block sees, and which all of them see wholly: of the
    list, bool ``(B, 1, Nq, L / BLOCK)``, and of the windows, ``(1, 1, Nq, .)``, whose blocks are
    counted from ``first_key``. From each block's first and last query, between which counts and
    windows only move on."""
    device = far.count.device
    first = torch.arange(0, case.queries, BLOCK, device=device)
    last = (first + BLOCK - 1).clamp(max=case.queries - 1)

    edge = torch.arange(0, far.index.shape[1], BLOCK, device=device)
    count = far.count[:, None, :, None]
    in_list = count[:, :, last] > edge, count[:, :, first] >= edge + BLOCK

    edge = torch.arange(first_key, case.seqlen, BLOCK, device=device)
    query = torch.arange(case.seqlen - case.queries, case.seqlen, device=device)[
        None, None, :, None
    ]
    start = window_start(query, layout.query_window, layout.key_window_times)
    end = edge + BLOCK - 1
    in_window = (
        (start[:, :, first] <= end) & (edge <= query[:, :, last]),
        (start[:, :, last] <= edge) & (end <= query[:, :, first]),
    )
    return in_list, in_window


def _block_mask(seen: Tensor, full: Tensor, mask_mod: Mod, lengths: tuple[int, int]) -> BlockMask:
    """Of blocks ``(B or 1, 1, Nq, Nk)`` that are seen, and those of them that need no mask."""

    def listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
        order = blocks.int().argsort(dim=-1, descending=True, stable=True)
        return blocks.sum(-1, dtype=torch.int32), order.int()

    return BlockMask.from_kv_blocks(
        *listed(seen & ~full),
        *listed(full),
        BLOCK_SIZE=BLOCK,
        mask_mod=mask_mod,
        seq_lengths=lengths,
    )


def _list_bias(layout: ck.ThreeRegionLayout, far: FarKeys) -> Mod | None:
    """Added to the logits of the list, which other keys may follow."""
    text_bias, pivot_bias, length = layout.text_bias, layout.pivot_bias, far.index.shape[1]
    if text_bias == pivot_bias == 0:
        return None

    def score_mod(score: Tensor, b: Tensor, h: Tensor, r: Tensor, j: Tensor) -> Tensor:
        biased = torch.where(j < far.num_text[b], score + text_bias, score + pivot_bias)
        return torch.where(j < length, biased, score)

    return score_mod


def _first_key(layout: ck.ThreeRegionLayout, case: AttentionCase) -> int:
    """The first key of the first query's window: what lies before is read from the list alone."""
    query = torch.tensor(case.seqlen - case.queries)
    return int(window_start(query, layout.query_window, layout.key_window_times))


def _grouped(case: AttentionCase) -> bool:
    return case.kv_heads != case.num_heads


@functools.lru_cache(maxsize=2)
def _block_mask_builder(case: AttentionCase) -> Any:
    """Compiled, it needs no mask of every query and key. Kept: building is timed, not compiling."""
    return compiled(create_block_mask)


def _flex_plain(
    case: AttentionCase, layout: ck.ThreeRegionLayout, device: torch.device
) -> Attention:
    """The definition as FlexAttention's mask; text and pivots in one bitmap."""
    w, n, offset = layout.query_window, layout.key_window_times, case.seqlen - case.queries
    text_bias, pivot_bias = layout.text_bias, layout.pivot_bias
    far = far_keys(layout, case)
    is_far, num_text = far.place >= 0, far.num_text

    def mask_mod(b: Tensor, h: Tensor, r: Tensor, j: Tensor) -> Tensor:
        i = r + offset
        return torch.where(j < window_start(i, w, n), is_far[b, j], j <= i)

    def score_mod(score: Tensor, b: Tensor, h: Tensor, r: Tensor, j: Tensor) -> Tensor:
        biased = torch.where(j < num_text[b], score + text_bias, score + pivot_bias)
        return torch.where(j < window_start(r + offset, w, n), biased, score)

    mod = score_mod if text_bias or pivot_bias else None
    block_mask = _block_mask_builder(case)(
        mask_mod, case.batch, None, case.queries, case.seqlen, device, BLOCK
    )

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention(q, k, v, mod, block_mask, enable_gqa=_grouped(case))

    return compiled(attention)


def _flex_gathered(
    mode: str | None = None, kernel_options: FlexKernelOptions | None = None
) -> Prepare:
    """One FlexAttention over ``far keys ++ keys``: of the list each query sees a prefix, of the
    keys its window. Nothing but the end of that prefix and the window's edges needs a mask."""

    def prepare(
        case: AttentionCase, layout: ck.ThreeRegionLayout, device: torch.device
    ) -> Attention:
        w, n, offset = layout.query_window, layout.key_window_times, case.seqlen - case.queries
        far, first_key = far_keys(layout, case, BLOCK), _first_key(layout, case)
        count, length = far.count, far.index.shape[1]

        def mask_mod(b: Tensor, h: Tensor, r: Tensor, c: Tensor) -> Tensor:
            i, j = r + offset, c - length + first_key
            in_window = (window_start(i, w, n) <= j) & (j <= i)
            return torch.where(c < length, c < count[b, r], in_window)

        score_mod = _list_bias(layout, far)
        in_list, in_window = _seen_blocks(layout, case, far, first_key)
        seen, full = (
            torch.cat([a, b.expand(case.batch, -1, -1, -1)], 3)
            for a, b in zip(in_list, in_window, strict=True)
        )
        lengths = case.queries, length + case.seqlen - first_key
        block_mask = _block_mask(seen, full, mask_mod, lengths)

        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            k, v = (torch.cat([_gather(x, far), x[:, :, first_key:]], 2) for x in (k, v))
            return flex_attention(
                q,
                k,
                v,
                score_mod,
                block_mask,
                enable_gqa=_grouped(case),
                kernel_options=kernel_options,
            )

        return compiled(attention, mode)

    return prepare


def _flex_merged(
    case: AttentionCase, layout: ck.ThreeRegionLayout, device: torch.device
) -> Attention:
    """Window and far keys, each an attention with its log-sum-exp, then their weighted mean: no
    copy of the keys, but the results are rounded before they are added."""
    w, n, offset = layout.query_window, layout.key_window_times, case.seqlen - case.queries
    far, first_key = far_keys(layout, case, BLOCK), _first_key(layout, case)
    count, length = far.count, far.index.shape[1]

    def list_mod(b: Tensor, h: Tensor, r: Tensor, c: Tensor) -> Tensor:
        return c < count[b, r]

    def window_mod(b: Tensor, h: Tensor, r: Tensor, c: Tensor) -> Tensor:
        i, j = r + offset, c + first_key
        return (window_start(i, w, n) <= j) & (j <= i)

    in_list, in_window = _seen_blocks(layout, case, far, first_key)
    list_mask = _block_mask(*in_list, list_mod, (case.queries, length))
    window_mask = _block_mask(*in_window, window_mod, (case.queries, case.seqlen - first_key))
    score_mod = _list_bias(layout, far)
    attend = functools.partial(
        flex_attention, enable_gqa=_grouped(case), return_aux=AuxRequest(lse=True)
    )

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        window, of_window = attend(q, k[:, :, first_key:], v[:, :, first_key:], None, window_mask)
        listed, of_list = attend(q, _gather(k, far), _gather(v, far), score_mod, list_mask)
        # exp(window lse) / (exp(window lse) + exp(list lse)); a row without far keys has -inf.
        share = torch.sigmoid(of_window.lse - of_list.lse)[..., None]
        return (share * window + (1 - share) * listed).to(q.dtype)

    return compiled(attention)


def _flex_on_cpu(case: AttentionCase, device: torch.device) -> str | None:
    if device.type == "cuda" or case.op == "decode":
        return None
    return "FlexAttention has no backward on a CPU"


# As CogView computes it


def _cogview(case: AttentionCase, layout: ck.ThreeRegionLayout, device: torch.device) -> Attention:
    """Plain PyTorch: scores of gathered far keys and of overlapping chunks of keys, blocks of
    queries by windows, side by side for one softmax."""
    seqlen, w = case.seqlen, layout.query_window
    num_blocks = -(-seqlen // w)
    n = min(layout.key_window_times, num_blocks)
    first_block = (seqlen - case.queries) // w
    front = seqlen - case.queries - first_block * w  # rows to fill the first block of queries
    back = num_blocks * w - seqlen  # and the last
    first_key = max(0, (first_block - n + 1) * w)
    before = max(0, (n - 1 - first_block) * w)  # the first windows begin before the first key

    far = far_keys(layout, case)
    num_far = far.index.shape[1]
    column = torch.arange(num_far, device=device)
    # (B, 1, blocks, 1, L): of each block's first query that is there
    first_rows = torch.arange(-front, case.queries, w, device=device).clamp(min=0)
    far_hidden = (column >= far.count[:, first_rows, None])[:, None, :, None]
    bias: Tensor | None = None
    if layout.text_bias or layout.pivot_bias:
        bias = torch.full((case.batch, 1, 1, 1, num_far), layout.pivot_bias, dtype=case.torch_dtype)
        is_text = column < far.num_text[:, None, None, None, None]
        bias = bias.to(device).masked_fill(is_text, layout.text_bias)
    # (blocks, w, n w)
    row = torch.arange(w, device=device)[:, None] + (n - 1) * w
    key = torch.arange(n * w, device=device)
    block = torch.arange(first_block, num_blocks, device=device)[:, None, None]
    window_hidden = (key > row) | (key < (n - 1 - block) * w)

    def chunks(x: Tensor) -> Tensor:  # (B, H, blocks, D, n w), a view of the padded keys
        return F.pad(x[:, :, first_key:], (0, 0, before, back)).unfold(2, n * w, w)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = _repeated(k, q.shape[1]), _repeated(v, q.shape[1])
        q = F.pad(q * case.head_dim**-0.5, (0, 0, front, back))
        far_scores = (q @ _gather(k, far).mT).unflatten(2, (-1, w))
        if bias is not None:
            far_scores = far_scores + bias
        window_scores = q.unflatten(2, (-1, w)) @ chunks(k)
        far_scores = far_scores.masked_fill(far_hidden, -torch.inf)
        window_scores = window_scores.masked_fill(window_hidden, -torch.inf)
        p = torch.cat([far_scores, window_scores], -1).softmax(-1)
        out = p[..., :num_far].flatten(2, 3) @ _gather(v, far)
        out = out + (p[..., num_far:] @ chunks(v).mT).flatten(2, 3)
        return out[:, :, front : front + case.queries]

    return attention


# Other packages: tokens outside of heads, (B, S, H, D)


def _tokens_first(load: Callable[[AttentionCase], Attention]) -> Prepare:
    """``load`` imports the package; its attention sees the same memory, transposed."""

    def prepare(
        case: AttentionCase, layout: ck.ThreeRegionLayout, device: torch.device
    ) -> Attention:
        function = load(case)

        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return function(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)

        return attention

    return prepare


def _flash_attention(module: str) -> Prepare:
    """``flash_attn_func`` of versions 2, 3 and 4: grouped heads are its own business, and causal
    aligns the last query with the last key."""

    def load(case: AttentionCase) -> Attention:
        flash_attn_func = importlib.import_module(module).flash_attn_func

        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            result = flash_attn_func(q, k, v, causal=True)
            out: Tensor = result[0] if isinstance(result, tuple) else result  # some return lse, too
            return out

        return attention

    return _tokens_first(load)


def _xformers(case: AttentionCase) -> Attention:
    ops = importlib.import_module("xformers.ops")
    bias = importlib.import_module("xformers.ops.fmha.attn_bias")
    mask = bias.LowerTriangularMask()
    if case.queries < case.seqlen:
        mask = bias.LowerTriangularFromBottomRightMask()
    return functools.partial(ops.memory_efficient_attention, attn_bias=mask)


def _natten(case: AttentionCase) -> Attention:
    """A stride of ``query_window`` makes windows begin where CogView's do."""
    return functools.partial(
        importlib.import_module("natten").na1d,
        kernel_size=case.key_window_times * case.query_window,
        stride=case.query_window,
        is_causal=True,
    )


def _no_grouped_heads(case: AttentionCase, device: torch.device) -> str | None:
    return "its grouped heads have no backward" if _grouped(case) else None


def _not_as_natten_strides(case: AttentionCase, device: torch.device) -> str | None:
    if case.op == "decode":
        return "it takes as many queries as keys"
    if case.seqlen % case.query_window:
        return "its last window begins elsewhere where the sequence is not whole blocks"
    if case.key_window_times * case.query_window > case.seqlen:
        return "its window may not be longer than the sequence"
    return None


_FLASH_KERNEL = _first_reason(_only_on_cuda, _only_halves)
_FLEX_LSE = _first_reason(_only_on_cuda)  # on a CPU it returns none

ATTENTION_METHODS: tuple[Method, ...] = (
    Method("cogview_kernels", "three-region", _ours("cuda"), _why_no_kernel),
    Method("portable", "three-region", _ours("portable"), _why_not_portable),
    Method("SDPA", "dense causal", _sdpa(None), _not_on_cuda),
    Method("SDPA flash", "dense causal", _sdpa(SDPBackend.FLASH_ATTENTION), _FLASH_KERNEL),
    Method("SDPA cuDNN", "dense causal", _sdpa(SDPBackend.CUDNN_ATTENTION), _FLASH_KERNEL),
    Method("SDPA efficient", "dense causal", _sdpa(SDPBackend.EFFICIENT_ATTENTION), _only_on_cuda),
    Method("SDPA math", "dense causal", _sdpa(SDPBackend.MATH), _only_on_cuda),
    Method("SDPA, dense mask", "three-region", _sdpa_dense_mask, _mask_is_huge),
    Method("CogView's formulation", "three-region", _cogview),
    Method(
        RIVAL,
        "three-region",
        _flex_gathered(),
        _flex_on_cpu,
        compiles=True,
    ),
    Method("FlexAttention, plain mask", "three-region", _flex_plain, _flex_on_cpu, compiles=True),
    Method(
        "window + pivots, merged by lse", "three-region", _flex_merged, _FLEX_LSE, compiles=True
    ),
    Method(
        "FlexAttention, gathered pivots, autotuned",
        "three-region",
        _flex_gathered("max-autotune-no-cudagraphs"),
        _only_on_cuda,
        compiles=True,
    ),
    Method(
        "FlexAttention on FlashAttention-4, gathered pivots",
        "three-region",
        _flex_gathered(kernel_options={"BACKEND": "FLASH"}),
        _first_reason(_FLASH_KERNEL, _installed("flash_attn.cute", "flash-attn-4")),
        compiles=True,
    ),
    Method(
        "FlashAttention-4",
        "dense causal",
        _flash_attention("flash_attn.cute"),
        _first_reason(_FLASH_KERNEL, _installed("flash_attn.cute", "flash-attn-4")),
        compiles=True,
    ),
    Method(
        "FlashAttention-3",
        "dense causal",
        _flash_attention("flash_attn_interface"),
        _first_reason(_FLASH_KERNEL, _installed("flash_attn_interface", "flash-attn-3")),
    ),
    Method(
        "FlashAttention-2",
        "dense causal",
        _flash_attention("flash_attn.flash_attn_interface"),
        _first_reason(_FLASH_KERNEL, _installed("flash_attn.flash_attn_interface", "flash-attn")),
    ),
    Method(
        "xformers",
        "dense causal",
        _tokens_first(_xformers),
        _first_reason(_only_on_cuda, _installed("xformers.ops", "xformers"), _no_grouped_heads),
    ),
    Method(
        "NATTEN",
        "local window",
        _tokens_first(_natten),
        _first_reason(_only_on_cuda, _installed("natten", "natten"), _not_as_natten_strides),
    ),
)

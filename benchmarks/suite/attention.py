"""Attention: ours, other ways to compute the same function, and what people use in its place.

The rival is FlexAttention over ``far keys ++ keys`` (text and pivots gathered into one list, then
all keys): exact, differentiable and block-sparse. It gets what its experts would give it: compiled
for each case's static shapes, block masks ready before the clock starts, tables in place of
searches in its masks, and blocks of three sizes with tiles to match. At their defaults are
``ROWS_GUARANTEED_SAFE`` (where windows begin inside of blocks, a row's first block may be hidden
from it) and ``PRESCALE_QK`` (less accurate). The row "TMA" loads by TMA, where torch takes the
tensors; for "autotuned" torch searches tiles, warps and stages, timed on block masks of its own.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import (
    BlockMask,
    FlexKernelOptions,
    create_block_mask,
    flex_attention,
)

import cogview_kernels as ck
from benchmarks.suite.cases import AttentionCase
from benchmarks.suite.methods import (
    Method,
    Prepare,
    WhyNot,
    anywhere,
    compiled,
    first_reason,
    installed,
    kernels_on,
    only_on_cuda,
    replayed,
)
from cogview_kernels import extension
from cogview_kernels.attention.layout import window_start

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]  # (B, H, Sq, D), 2x (B, G, Sk, D)
Layout = ck.ThreeRegionLayout

RIVAL = "FlexAttention, gathered pivots"
OF_SWEEPS = f"{RIVAL}, 128x64"  # the rival where one size of blocks must do
ON_FA4, AUTOTUNED = f"{RIVAL} on FA4", f"{RIVAL}, autotuned"


def not_on_cuda(case: AttentionCase, device: torch.device) -> str | None:
    if device.type == "cuda":
        return "on a GPU each of its kernels has a row of its own"
    return None


def only_halves(case: AttentionCase, device: torch.device) -> str | None:
    if case.dtype in ("float16", "bfloat16"):
        return None
    return f"it takes float16 and bfloat16, not {case.dtype}"


FLASH_KERNEL = first_reason(only_on_cuda, only_halves)


# Ours, and dense causal attention


def ours(case: AttentionCase, layout: Layout, device: torch.device) -> Attention:
    attention = ck.three_region_attention
    return functools.partial(attention, layout=layout, backend=kernels_on(device))


def why_no_kernel(case: AttentionCase, device: torch.device) -> str | None:
    """On a CPU the portable path has this row."""
    if device.type != "cuda":
        return None
    return only_halves(case, device) or extension.why_no_attention_kernel(
        case.torch_dtype, case.head_dim, device, "cuda"
    )


def sdpa(backend: SDPBackend | None) -> Prepare:
    """By one of its kernels; ``None``: its own choice."""

    def prepare(case: AttentionCase, layout: Layout, device: torch.device) -> Attention:
        is_causal = not case.q_len  # a single query, the last one, sees every key
        grouped = case.kv_heads != case.num_heads

        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=grouped)

        return attention if backend is None else sdpa_kernel(backend)(attention)

    return prepare


def flash_attention(module: str) -> Prepare:
    """``flash_attn_func`` of versions 3 and 4: heads inside of tokens (the same memory, transposed)
    and grouped at will; causal aligns the last query with the last key."""

    def prepare(case: AttentionCase, layout: Layout, device: torch.device) -> Attention:
        flash_attn_func = importlib.import_module(module).flash_attn_func

        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            result = flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=True)
            out: Tensor = result[0] if isinstance(result, tuple) else result  # some return lse, too
            return out.transpose(1, 2)

        return attention

    return prepare


# Text and pivots, gathered


@dataclasses.dataclass(frozen=True)
class FarKeys:
    """Text and pivots of each sample in one ascending list, of which each query sees a prefix."""

    index: Tensor  # (B, L) int64, their positions; behind a sample's last one any position
    place: Tensor  # (B, Sk) int64, where in the list a position stands; -1: nowhere
    num_text: Tensor  # (B,) int64, entries of the list that are text
    count: Tensor  # (B, Sq) int32, entries that a query sees
    first_key: int  # keys before it are in no window

    def gather(self, x: Tensor) -> Tensor:
        gathered: Tensor = _Gather.apply(x, self.index, self.place)
        return gathered


def far_keys(layout: Layout, case: AttentionCase, multiple: int = 1) -> FarKeys:
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
    return FarKeys(index[:, :length], place, text.sum(1), count, int(start[0]))


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


# FlexAttention


def staircase(
    case: AttentionCase, layout: Layout, far: FarKeys, block: tuple[int, int]
) -> BlockMask:
    """Of the list each query sees a prefix, of the keys its window."""
    w, n, offset = layout.query_window, layout.key_window_times, case.seqlen - case.queries
    count, length, first_key = far.count, far.index.shape[1], far.first_key

    def mask_mod(b: Tensor, h: Tensor, r: Tensor, c: Tensor) -> Tensor:
        i, j = r + offset, c - length + first_key
        in_window = (window_start(i, w, n) <= j) & (j <= i)
        return torch.where(c < length, c < count[b, r], in_window)

    keys, device = length + case.seqlen - first_key, str(count.device)
    return create_block_mask(mask_mod, case.batch, None, case.queries, keys, device, block)


def issued_products(case: AttentionCase, layout: Layout, block: tuple[int, int]) -> float:
    """Products that FlexAttention computes over those that count: pairs of query and key in the
    blocks that it visits, and visible pairs."""
    mask = staircase(case, layout, far_keys(layout, case, block[1]), block)
    assert mask.full_kv_num_blocks is not None
    blocks = int(mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum())
    return blocks * block[0] * block[1] / case.pairs


def flex_gathered(
    name: str,
    block: tuple[int, int],
    options: FlexKernelOptions | None = None,
    why_not: WhyNot = anywhere,
    autotuned: bool = False,
    compile_s: float = 7.0,
) -> Method:
    """``block``: queries and keys of a block of the mask. Tiles are as large, unless torch searches
    them; those of the backward are narrower (see ``Choices``), and a single query's are torch's."""

    def prepare(case: AttentionCase, layout: Layout, device: torch.device) -> Attention:
        far = far_keys(layout, case, block[1])
        block_mask = staircase(case, layout, far, block)
        text_bias, pivot_bias, length = layout.text_bias, layout.pivot_bias, far.index.shape[1]

        def add_bias(score: Tensor, b: Tensor, h: Tensor, r: Tensor, c: Tensor) -> Tensor:
            biased = torch.where(c < far.num_text[b], score + text_bias, score + pivot_bias)
            return torch.where(c < length, biased, score)

        score_mod = add_bias if text_bias or pivot_bias else None
        kernel_options: Any = dict(options or {})
        if case.queries > 1 and not autotuned and "BACKEND" not in kernel_options:
            kernel_options |= {"fwd_BLOCK_M": block[0], "fwd_BLOCK_N": block[1]}

        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            k, v = (torch.cat([far.gather(x), x[:, :, far.first_key :]], 2) for x in (k, v))
            grouped = case.kv_heads != case.num_heads
            return flex_attention(
                q, k, v, score_mod, block_mask, None, grouped, kernel_options=kernel_options
            )

        return compiled(attention, autotuned)

    return Method(
        name,
        "three-region",
        prepare,
        first_reason(no_backward_on_cpu, why_not),
        "rival",
        compile_s,
        facts=lambda case, layout: {"issued_products": issued_products(case, layout, block)},
    )


def no_backward_on_cpu(case: AttentionCase, device: torch.device) -> str | None:
    if device.type == "cuda" or case.op == "decode":
        return None
    return "FlexAttention has no backward on a CPU"


# As CogView computes it


def cogview_formulation(case: AttentionCase, layout: Layout, device: torch.device) -> Attention:
    """Plain PyTorch: scores of gathered far keys and of overlapping chunks of keys, blocks of
    queries by windows, side by side for one softmax."""
    assert case.op == "attention" and not (layout.text_bias or layout.pivot_bias)
    w, num_blocks = layout.query_window, -(-case.seqlen // layout.query_window)
    n = min(layout.key_window_times, num_blocks)
    before, back = (n - 1) * w, num_blocks * w - case.seqlen  # the first window begins before keys
    far = far_keys(layout, case)
    num_far = far.index.shape[1]
    # (B, 1, blocks, 1, L) and (blocks, w, n w)
    far_hidden = torch.arange(num_far, device=device) >= far.count[:, None, ::w, None, None]
    row = torch.arange(w, device=device)[:, None] + before
    key = torch.arange(n * w, device=device)
    block = torch.arange(num_blocks, device=device)[:, None, None]
    window_hidden = (key > row) | (key < before - block * w)

    def chunks(x: Tensor) -> Tensor:  # (B, H, blocks, D, n w), a view of the padded keys
        return F.pad(x, (0, 0, before, back)).unfold(2, n * w, w)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if case.kv_heads != case.num_heads:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        q = F.pad(q * case.head_dim**-0.5, (0, 0, 0, back))
        far_scores = (q @ far.gather(k).mT).unflatten(2, (-1, w))
        window_scores = q.unflatten(2, (-1, w)) @ chunks(k)
        far_scores = far_scores.masked_fill(far_hidden, -torch.inf)
        window_scores = window_scores.masked_fill(window_hidden, -torch.inf)
        p = torch.cat([far_scores, window_scores], -1).softmax(-1)
        out = p[..., :num_far].flatten(2, 3) @ far.gather(v)
        out = out + (p[..., num_far:] @ chunks(v).mT).flatten(2, 3)
        return out[:, :, : case.seqlen]

    return attention


NO_FA3 = first_reason(FLASH_KERNEL, installed("flash_attn_interface", "flash-attn-3"))
NO_FA4 = first_reason(FLASH_KERNEL, installed("flash_attn.cute", "flash-attn-4"))
FLASH, CUDNN = sdpa(SDPBackend.FLASH_ATTENTION), sdpa(SDPBackend.CUDNN_ATTENTION)
FA3, FA4 = flash_attention("flash_attn_interface"), flash_attention("flash_attn.cute")

ATTENTION_METHODS: tuple[Method, ...] = (
    Method("cogview_kernels", "three-region", ours, why_no_kernel, "ours"),
    Method("SDPA", "dense causal", sdpa(None), not_on_cuda, "dense"),
    Method("SDPA flash", "dense causal", FLASH, FLASH_KERNEL, "dense"),
    Method("SDPA cuDNN", "dense causal", CUDNN, FLASH_KERNEL, "dense"),
    Method("FlashAttention-3", "dense causal", FA3, NO_FA3, "dense"),
    # It compiles for the first case alone: 12 s, divided among the four.
    Method("FlashAttention-4", "dense causal", FA4, NO_FA4, "dense", 3.0),
    *(flex_gathered(f"{RIVAL}, {m}x{n}", (m, n)) for m, n in ((128, 128), (128, 64), (64, 64))),
    flex_gathered(f"{RIVAL}, 128x64, TMA", (128, 64), {"USE_TMA": True}, only_on_cuda),
    flex_gathered(ON_FA4, (128, 128), {"BACKEND": "FLASH"}, NO_FA4),
    flex_gathered(AUTOTUNED, (128, 128), why_not=only_on_cuda, autotuned=True, compile_s=18.0),
    Method("CogView's formulation", "three-region", cogview_formulation),
)
# One query is a kernel of its own, for which 128x64 is as good as any; CogView's is for training.
DECODE_METHODS: tuple[Method, ...] = tuple(
    twin
    for method in ATTENTION_METHODS
    if method.role in ("ours", "dense") or method.name == OF_SWEEPS
    for twin in replayed(method)
)

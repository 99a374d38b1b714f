"""Attention: ours, other ways to compute the same function, and what people use in its place.

The rival is FlexAttention over ``far keys ++ keys`` (text and pivots gathered into one list, then
all keys): exact, differentiable and block-sparse. It gets what its experts would give it: compiled
for each case's static shapes, block masks ready before the clock starts, tables in place of
searches in its masks, and blocks of three sizes with tiles to match. ``ROWS_GUARANTEED_SAFE`` is
not set (a row's first block may be hidden from it), nor ``PRESCALE_QK`` (less accurate). "TMA"
loads by TMA, where torch takes the tensors; for "autotuned" torch searches tiles, warps and stages.
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
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

import cogview_kernels as ck
from benchmarks.suite.cases import AttentionCase
from benchmarks.suite.methods import Method, Prepare, compiled, kernels_on, with_replay
from cogview_kernels.attention.layout import window_start

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]  # (B, H, Sq, D), 2x (B, G, Sk, D)
Layout = ck.ThreeRegionLayout
Block = tuple[int, int]  # queries and keys of a block of a mask

RIVAL = "FlexAttention, gathered pivots"
OF_SWEEPS = f"{RIVAL}, 128x64"  # the rival where one size of blocks must do
ON_FA4, AUTOTUNED = f"{RIVAL} on FA4", f"{RIVAL}, autotuned"
FA3_MODULE, FA4_MODULE = "flash_attn_interface", "flash_attn.cute"


def ours(case: AttentionCase, layout: Layout, device: torch.device) -> Attention:
    attention = ck.three_region_attention
    return functools.partial(attention, layout=layout, backend=kernels_on(device))


def sdpa(backend: SDPBackend | None) -> Prepare:
    """By one of its kernels; ``None``: its own choice."""

    def prepare(case: AttentionCase, layout: Layout, device: torch.device) -> Attention:
        attention = functools.partial(
            F.scaled_dot_product_attention,
            is_causal=not case.q_len,  # a single query, the last one, sees every key
            enable_gqa=case.kv_heads != case.num_heads,
        )
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


@dataclasses.dataclass(frozen=True)
class FarKeys:
    """Text and pivots of each sample in one ascending list, of which each query sees a prefix."""

    index: Tensor  # (B, L) int64, their positions; behind a sample's last one any position
    place: Tensor  # (B, Sk) int64, where in the list a position stands; -1: nowhere
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
    return FarKeys(index[:, :length], place, count, int(start[0]))


class _Gather(torch.autograd.Function):
    """Rows of ``x (B, G, S, D)``; the gradient is gathered, too, not added up by atomics."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        place = ctx.saved_tensors[0][:, None, :, None]
        rows = place.clamp(min=0).expand(-1, grad.shape[1], -1, grad.shape[3])
        return grad.gather(2, rows).masked_fill(place < 0, 0.0), None, None


def staircase(case: AttentionCase, layout: Layout, far: FarKeys, block: Block) -> BlockMask:
    """Of the list each query sees a prefix, of the keys its window."""
    w, n, offset = layout.query_window, layout.key_window_times, case.seqlen - case.queries
    count, length, first_key = far.count, far.index.shape[1], far.first_key

    def mask_mod(b: Tensor, h: Tensor, r: Tensor, c: Tensor) -> Tensor:
        i, j = r + offset, c - length + first_key
        in_window = (window_start(i, w, n) <= j) & (j <= i)
        return torch.where(c < length, c < count[b, r], in_window)

    keys, device = length + case.seqlen - first_key, str(count.device)
    return create_block_mask(mask_mod, case.batch, None, case.queries, keys, device, block)


def flex_gathered(
    name: str,
    block: Block,
    compile_s: float = 7.0,
    module: str = "",
    autotuned: bool = False,
    **kernel_options: Any,
) -> Method:
    """Tiles are as large as blocks, unless torch searches them; those of the backward may be
    smaller (see ``Choices``), and a single query's are torch's. On a CPU there is no backward."""

    def prepare(case: AttentionCase, layout: Layout, device: torch.device) -> Attention:
        far = far_keys(layout, case, block[1])
        block_mask = staircase(case, layout, far, block)
        grouped = case.kv_heads != case.num_heads
        tiles = {"fwd_BLOCK_M": block[0], "fwd_BLOCK_N": block[1]}
        of_torch = case.queries == 1 or autotuned or "BACKEND" in kernel_options
        options: Any = kernel_options if of_torch else kernel_options | tiles

        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            k, v = (torch.cat([far.gather(x), x[:, :, far.first_key :]], 2) for x in (k, v))
            return flex_attention(
                q, k, v, None, block_mask, enable_gqa=grouped, kernel_options=options
            )

        return compiled(attention, autotuned)

    def issued_products(case: AttentionCase, layout: Layout) -> dict[str, float]:
        """Pairs of query and key in the blocks that are visited, over visible pairs. The tiles of a
        single query are not those of the mask."""
        if case.queries == 1:
            return {}
        mask = staircase(case, layout, far_keys(layout, case, block[1]), block)
        assert mask.full_kv_num_blocks is not None
        blocks = int(mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum())
        return {"issued_products": blocks * block[0] * block[1] / case.pairs}

    return Method(
        name, "three-region", prepare, "rival", compile_s, "cuda", module, facts=issued_products
    )


def cogview_formulation(case: AttentionCase, layout: Layout, device: torch.device) -> Attention:
    """Plain PyTorch: scores of gathered far keys and of overlapping chunks of keys, blocks of
    queries by windows, side by side for one softmax."""
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


def dense(
    name: str, prepare: Prepare, compile_s: float = 0.0, only_on: str = "cuda", module: str = ""
) -> Method:
    return Method(name, "dense causal", prepare, "dense", compile_s, only_on, module)


ATTENTION_METHODS: tuple[Method, ...] = (
    Method("cogview_kernels", "three-region", ours, "ours"),
    dense("SDPA", sdpa(None), only_on="cpu"),  # on a GPU each of its kernels has a row
    dense("SDPA flash", sdpa(SDPBackend.FLASH_ATTENTION)),
    dense("SDPA cuDNN", sdpa(SDPBackend.CUDNN_ATTENTION)),
    dense("FlashAttention-3", flash_attention(FA3_MODULE), module=FA3_MODULE),
    # It compiles for the first case alone: 12 s, divided among the four.
    dense("FlashAttention-4", flash_attention(FA4_MODULE), 3.0, module=FA4_MODULE),
    flex_gathered(f"{RIVAL}, 128x128", (128, 128)),
    flex_gathered(OF_SWEEPS, (128, 64)),
    flex_gathered(f"{RIVAL}, 64x64", (64, 64)),
    flex_gathered(f"{RIVAL}, 128x64, TMA", (128, 64), USE_TMA=True),
    flex_gathered(ON_FA4, (128, 128), module=FA4_MODULE, BACKEND="FLASH"),
    flex_gathered(AUTOTUNED, (128, 128), 18.0, autotuned=True),
    Method("CogView's formulation", "three-region", cogview_formulation),
)
# One query is a kernel of its own, for which 128x64 is as good as any; CogView's is for training.
_RIVAL_OF_DECODE = dataclasses.replace(flex_gathered(OF_SWEEPS, (128, 64)), only_on="")
DECODE_METHODS: tuple[Method, ...] = tuple(
    twin
    for method in (*ATTENTION_METHODS, _RIVAL_OF_DECODE)
    if method.role in ("ours", "dense") or method is _RIVAL_OF_DECODE
    for twin in with_replay(method)
)

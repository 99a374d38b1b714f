"""The operators behind ``three_region_attention``: schemas, allocation, launches, gradients.

Portable takes the layout's tensors. The kernels take ``far_keys``, packed from them, and exchange
lse as two numbers: the row's largest logit in bits, and log2 of the sum relative to it. One rounded
lse would not do: with logits of 1e6 the backward's weights would not sum to one.

Outputs and workspaces are allocated in Python, so that running out of memory stays
torch.OutOfMemoryError, and by shapes alone, so that a call can be captured in a CUDA graph.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cogview_kernels import extension
from cogview_kernels.attention import portable
from cogview_kernels.operators import Backward, Operator, define_operator, define_out_operator

_WINDOW_AND_SCALE = (
    "int query_window, int key_window_times, float text_bias, float pivot_bias, float softmax_scale"
)
_LAYOUT_AND_SCALE = f"Tensor text_len, Tensor pivot_idx, {_WINDOW_AND_SCALE}"

_far_keys_out = define_out_operator(
    "three_region_attention_far_keys_out(Tensor text_len, Tensor pivot_idx, int k_len, "
    "Tensor(a!) far_keys) -> ()"
)
_forward_out = define_out_operator(
    "three_region_attention_forward_out(Tensor q, Tensor k, Tensor v, Tensor far_keys, "
    f"{_WINDOW_AND_SCALE}, Tensor? kv_lens, Tensor(a!) out, Tensor(b!) row_max, "
    "Tensor(c!) row_log_sum, int num_splits, Tensor(d!)? partial) -> ()"
)
_backward_out = define_out_operator(
    "three_region_attention_backward_out(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, "
    "Tensor out, Tensor row_max, Tensor row_log_sum, Tensor far_keys, "
    f"{_WINDOW_AND_SCALE}, Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, Tensor(d!) delta, "
    "Tensor(e!)? bounds, int num_splits, Tensor(f!)? partial) -> ()"
)


def _allocate_far_keys(text_len: Tensor, pivot_idx: Tensor, k_len: int) -> Tensor:
    return pivot_idx.new_empty((*pivot_idx.shape[:-1], 2 + pivot_idx.shape[-1]))


def _allocate_forward(q: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    row_max = q.new_empty(q.shape[:3], dtype=torch.float32)
    return portable.empty_heads(q), row_max, torch.empty_like(row_max)


def _allocate_portable_forward(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return portable.empty_heads(q), q.new_empty(q.shape[:3], dtype=lse_dtype)


def _allocate_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return portable.empty_heads(q), portable.empty_heads(k), portable.empty_heads(v)


def _pack_far_keys(text_len: Tensor, pivot_idx: Tensor, k_len: int) -> Tensor:
    far_keys = _allocate_far_keys(text_len, pivot_idx, k_len)
    if far_keys.numel() > 0:
        _far_keys_out(text_len, pivot_idx, k_len, far_keys)
    return far_keys


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    far_keys: Tensor,
    query_window: int,
    key_window_times: int,
    text_bias: float,
    pivot_bias: float,
    softmax_scale: float,
    kv_lens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    outputs = _allocate_forward(q)
    if q.numel() == 0:
        return outputs
    batch, num_heads, q_len, head_dim = q.shape
    num_kv_heads, k_len = k.shape[1:3]
    num_splits = extension.attention_forward_splits(
        *(batch, num_heads, num_kv_heads, q_len, k_len, far_keys.shape[-1] - 2),
        min(query_window * key_window_times, k_len),
        has_kv_lens=kv_lens is not None,
        device=q.device,
    )
    partial = None
    if num_splits > 1:
        shape = num_splits, batch, num_heads, q_len, head_dim + 4
        partial = q.new_empty(shape, dtype=torch.float32)
    _forward_out(
        _aligned(q),
        _aligned(k),
        _aligned(v),
        far_keys.contiguous(),
        query_window,
        key_window_times,
        text_bias,
        pivot_bias,
        softmax_scale,
        None if kv_lens is None else kv_lens.contiguous(),
        *outputs,
        num_splits,
        partial,
    )
    return outputs


def _backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    row_max: Tensor,
    row_log_sum: Tensor,
    far_keys: Tensor,
    query_window: int,
    key_window_times: int,
    text_bias: float,
    pivot_bias: float,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = _allocate_backward(dout, dlse, q, k, v)
    if q.numel() == 0:
        return dq, dk.zero_(), dv.zero_()
    batch, num_heads, q_len, head_dim = q.shape
    num_kv_heads, k_len = k.shape[1:3]
    split_rows = extension.attention_split_rows(k_len, far_keys.shape[-1] - 2, q.device)
    num_splits = _num_splits(
        batch * num_kv_heads,
        num_heads // num_kv_heads,
        q_len,
        k_len,
        split_rows,
        min(query_window * key_window_times, k_len),
        extension.num_sms(q.device),
    )
    bounds = partial = None
    if q.dtype == torch.float16:
        bounds = q.new_zeros(batch * (2 * num_heads + num_kv_heads), dtype=torch.int32)
    if num_splits > 1:
        shape = num_splits, 2, batch, num_kv_heads, split_rows, head_dim
        partial = q.new_empty(shape, dtype=torch.float32)
    _backward_out(
        _aligned(dout),
        None if dlse is None else dlse.contiguous(),
        _aligned(q),
        _aligned(k),
        _aligned(v),
        _aligned(out),
        row_max.contiguous(),
        row_log_sum.contiguous(),
        far_keys.contiguous(),
        query_window,
        key_window_times,
        text_bias,
        pivot_bias,
        softmax_scale,
        dq,
        dk,
        dv,
        torch.empty_like(row_max, memory_format=torch.contiguous_format),
        bounds,
        num_splits,
        partial,
    )
    return dq, dk, dv


def _aligned(tensor: Tensor) -> Tensor:
    """``(B, H, S, D)`` of a 16-bit dtype with rows at multiples of 16 bytes: a copy where they are
    not."""
    by_batch, by_head, by_row, by_column = tensor.stride()
    if by_column == 1 and tensor.data_ptr() % 16 == 0:
        if not (by_batch | by_head | by_row) % 8:
            return tensor
        strides = zip(tensor.shape, (by_batch, by_head, by_row), strict=False)
        if all(stride % 8 == 0 for size, stride in strides if size > 1):
            return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


@functools.lru_cache(maxsize=256)
def _num_splits(
    num_samples: int,
    group_size: int,
    q_len: int,
    k_len: int,
    split_rows: int,
    window: int,
    num_sms: int,
) -> int:
    """How many blocks share the queries of a key tile that all of them may see.

    Counted in products of 64 queries with 64 keys, for ``num_samples`` key/value heads of all
    samples: the longest tile should not take longer than all the work spread over two blocks for
    each multiprocessor. ``split_rows``: keys that many queries see; ``window``: keys in a local
    window.
    """
    long = group_size * _ceil_div(q_len, 64)
    short = min(long, group_size * (_ceil_div(window, 64) + 1))
    work = num_samples * (split_rows // 64 * long + _ceil_div(k_len, 64) * short)
    return min(max(_ceil_div(long * 2 * num_sms, max(work, 2 * num_sms)), 1), 16)


def _ceil_div(number: int, divisor: int) -> int:
    return -(-number // divisor)


def _with_kv_lens(rest: tuple[Any, ...]) -> tuple[Any, ...]:
    """Window and scale, then kv_lens, which a call may leave out."""
    return rest if len(rest) == 6 else (*rest, None)


class _Saved(NamedTuple):
    """What the forward keeps for the backward."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    row_max: Tensor
    row_log_sum: Tensor
    far_keys: Tensor


def _save(
    ctx: Any,
    outputs: tuple[Tensor, Tensor, Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    far_keys: Tensor,
    *rest: Any,
) -> None:
    *ctx.window_and_scale, kv_lens = _with_kv_lens(rest)
    if kv_lens is not None:
        raise NotImplementedError("the kernels have no gradients with kv_lens")
    out, row_max, row_log_sum = outputs
    ctx.save_for_backward(*_Saved(q, k, v, out, row_max, row_log_sum, far_keys))
    # A shift, chosen freely: lse = (row_max + row_log_sum) ln 2 moves through row_log_sum.
    ctx.mark_non_differentiable(row_max)
    ctx.set_materialize_grads(False)


def _gradients(backward: Operator) -> Callable[..., dict[str, Tensor | None]]:
    def gradients(
        ctx: Any,
        wanted: frozenset[str],
        dout: Tensor | None,
        drow_max: None,
        drow_log_sum: Tensor | None,
    ) -> dict[str, Tensor | None]:
        saved = _Saved(*ctx.saved_tensors)
        dout = torch.zeros_like(saved.out) if dout is None else dout
        dlse = None if drow_log_sum is None else drow_log_sum / math.log(2)
        dq, dk, dv = backward(dout, dlse, *saved, *ctx.window_and_scale)
        return {"q": dq, "k": dk, "v": dv}

    return gradients


class _PortableSaved(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    text_len: Tensor
    pivot_idx: Tensor
    lse: Tensor
    kv_lens: Tensor | None


def _save_portable(
    ctx: Any,
    outputs: tuple[Tensor, Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    text_len: Tensor,
    pivot_idx: Tensor,
    *rest: Any,
) -> None:
    *ctx.window_and_scale, kv_lens = _with_kv_lens(rest)
    out, lse = outputs
    ctx.save_for_backward(*_PortableSaved(q, k, v, out, text_len, pivot_idx, lse, kv_lens))


def _portable_gradients(
    ctx: Any, wanted: frozenset[str], dout: Tensor, dlse: Tensor
) -> dict[str, Tensor | None]:
    *tensors, lse, kv_lens = _PortableSaved(*ctx.saved_tensors)
    dq, dk, dv = _PORTABLE_BACKWARD(dout, dlse, *tensors, *ctx.window_and_scale, lse, kv_lens)
    return {"q": dq, "k": dk, "v": dv}


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """An operator computes in the dtypes it states, whatever the caller's autocast."""

    @functools.wraps(function)
    def kernel(*args: Any) -> Any:
        with torch.autocast(args[0].device.type, enabled=False):
            return function(*args)

    return kernel


def _folded_into_batch(operator: Any) -> Any:
    """The operator under vmap: samples know nothing of each other, so the mapped dimension
    becomes part of the batch."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        def mapped(argument: Tensor, dim: int | None) -> Tensor:
            if dim is None:
                return argument.expand(info.batch_size, *argument.shape)
            return argument.movedim(dim, 0)

        def fold(argument: Any, dim: int | None) -> Any:
            return mapped(argument, dim).flatten(0, 1) if isinstance(argument, Tensor) else argument

        def unfold(result: Tensor) -> Tensor:
            return result.unflatten(0, mapped(args[0], in_dims[0]).shape[:2])

        results = operator(*map(fold, args, in_dims))
        if isinstance(results, Tensor):
            return unfold(results), 0
        return tuple(map(unfold, results)), (0,) * len(results)

    return rule


class _Kernels(NamedTuple):
    """The operators that call the kernels."""

    far_keys: Operator
    forward: Operator


def _define_kernels(name: str, device: str, on_the_cpu: bool) -> _Kernels:
    """``on_the_cpu``: portable computes the same on the CPU, where exported programs may run."""
    far_keys = define_operator(
        f"{name}_far_keys",
        "(Tensor text_len, Tensor pivot_idx, SymInt k_len) -> Tensor far_keys",
        _allocate_far_keys,
        _pack_far_keys,
        vmap=_folded_into_batch,
        device=device,
        cpu_kernel=portable.pack_far_keys if on_the_cpu else None,
    )
    backward = define_operator(
        f"{name}_backward",
        "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor row_max, "
        f"Tensor row_log_sum, Tensor far_keys, {_WINDOW_AND_SCALE})"
        " -> (Tensor dq, Tensor dk, Tensor dv)",
        _allocate_backward,
        _backward,
        vmap=_folded_into_batch,
        device=device,
        cpu_kernel=_without_autocast(portable.attention_backward_packed) if on_the_cpu else None,
    )
    forward = define_operator(
        name,
        f"(Tensor q, Tensor k, Tensor v, Tensor far_keys, {_WINDOW_AND_SCALE}, "
        "Tensor? kv_lens=None) -> (Tensor out, Tensor row_max, Tensor row_log_sum)",
        _allocate_forward,
        _forward,
        vmap=_folded_into_batch,
        backward=Backward(3, _save, _gradients(backward)),
        device=device,
        cpu_kernel=_without_autocast(portable.attention_forward_packed) if on_the_cpu else None,
    )
    return _Kernels(far_keys, forward)


CUDA = _define_kernels("three_region_attention", "cuda", on_the_cpu=True)
HOST_MODEL = _define_kernels("three_region_attention_host_model", "cpu", on_the_cpu=False)

_PORTABLE_BACKWARD = define_operator(
    "three_region_attention_portable_backward",
    "(Tensor dout, Tensor dlse, Tensor q, Tensor k, Tensor v, Tensor out, "
    f"{_LAYOUT_AND_SCALE}, Tensor? lse=None, Tensor? kv_lens=None)"
    " -> (Tensor dq, Tensor dk, Tensor dv)",
    _allocate_backward,
    _without_autocast(portable.attention_backward),
    vmap=_folded_into_batch,
)
PORTABLE = define_operator(
    "three_region_attention_portable",
    f"(Tensor q, Tensor k, Tensor v, {_LAYOUT_AND_SCALE}, Tensor? kv_lens=None)"
    " -> (Tensor out, Tensor lse)",
    _allocate_portable_forward,
    _without_autocast(portable.attention_forward),
    vmap=_folded_into_batch,
    backward=Backward(2, _save_portable, _portable_gradients),
)

"""The operators behind ``three_region_attention``: schemas, allocation, gradients."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from cogview_kernels import extension
from cogview_kernels.attention import portable

# Operators. Portable takes the layout's tensors; the kernels take far_keys, packed from them, and
# exchange lse as two numbers: the row's largest logit in bits, and log2 of the sum relative to it.
# One rounded lse would not do: with logits of 1e6 the backward's weights would not sum to one.
# Outputs and workspaces are allocated in Python, so that running out of memory stays
# torch.OutOfMemoryError, and by shapes alone, so that a call can be captured in a CUDA graph.

_WINDOW_AND_SCALE = (
    "int query_window, int key_window_times, float text_bias, float pivot_bias, float softmax_scale"
)
_LAYOUT_AND_SCALE = f"Tensor text_len, Tensor pivot_idx, {_WINDOW_AND_SCALE}"

extension.LIBRARY.define(
    "three_region_attention_far_keys_out(Tensor text_len, Tensor pivot_idx, int k_len, "
    "Tensor(a!) far_keys) -> ()"
)
extension.LIBRARY.define(
    "three_region_attention_forward_out(Tensor q, Tensor k, Tensor v, Tensor far_keys, "
    f"{_WINDOW_AND_SCALE}, Tensor(a!) out, Tensor(b!) row_max, Tensor(c!) row_log_sum) -> ()"
)
extension.LIBRARY.define(
    "three_region_attention_backward_out(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, "
    "Tensor out, Tensor row_max, Tensor row_log_sum, Tensor far_keys, "
    f"{_WINDOW_AND_SCALE}, Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, Tensor(d!) delta, "
    "Tensor(e!)? bounds, int num_splits, Tensor(f!)? partial) -> ()"
)


def _far_keys_fake(text_len: Tensor, pivot_idx: Tensor, k_len: int) -> Tensor:
    return pivot_idx.new_empty(pivot_idx.shape[0], 2 + pivot_idx.shape[1])


def _forward_fake(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    row_max = q.new_empty(q.shape[:3], dtype=torch.float32)
    return portable.empty_heads(q), row_max, torch.empty_like(row_max)


def _backward_fake(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return portable.empty_heads(q), portable.empty_heads(k), portable.empty_heads(v)


def _far_keys(text_len: Tensor, pivot_idx: Tensor, k_len: int) -> Tensor:
    far_keys = _far_keys_fake(text_len, pivot_idx, k_len)
    if far_keys.numel() > 0:
        torch.ops.cogview_kernels.three_region_attention_far_keys_out(
            text_len, pivot_idx, k_len, far_keys
        )
    return far_keys


def _forward(
    q: Tensor, k: Tensor, v: Tensor, far_keys: Tensor, *window_and_scale: Any
) -> tuple[Tensor, Tensor, Tensor]:
    outputs = _forward_fake(q)
    if q.numel() > 0:
        inputs = _aligned(q), _aligned(k), _aligned(v), far_keys.contiguous()
        torch.ops.cogview_kernels.three_region_attention_forward_out(
            *inputs, *window_and_scale, *outputs
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
    dq, dk, dv = _backward_fake(dout, dlse, q, k, v)
    if q.numel() == 0:
        return dq, dk.zero_(), dv.zero_()
    batch, num_heads = q.shape[:2]
    num_kv_heads, k_len, head_dim = k.shape[1:]
    num_pivots = far_keys.shape[1] - 2
    num_splits = _num_splits(
        batch * num_kv_heads,
        num_heads // num_kv_heads,
        q.shape[2],
        k_len,
        num_pivots,
        min(query_window * key_window_times, k_len),
        extension.num_sms(q.device),
    )
    bounds = partial = None
    if q.dtype == torch.float16:
        bounds = q.new_zeros(batch * (2 * num_heads + num_kv_heads), dtype=torch.int32)
    if num_splits > 1:
        rows = _split_rows(num_pivots, k_len)
        shape = num_splits, 2, batch, num_kv_heads, rows, head_dim
        partial = q.new_empty(shape, dtype=torch.float32)
    torch.ops.cogview_kernels.three_region_attention_backward_out(
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
    """``(B, H, S, D)`` with rows at multiples of 16 bytes: a copy where they are not."""
    strides = [s for size, s in zip(tensor.shape[:3], tensor.stride(), strict=False) if size > 1]
    offsets = [tensor.data_ptr(), *(stride * tensor.element_size() for stride in strides)]
    if tensor.stride(3) == 1 and all(offset % 16 == 0 for offset in offsets):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _split_rows(num_pivots: int, k_len: int) -> int:
    """Keys that many queries see: the pivots and the first of the text."""
    return _ceil_div(num_pivots, 64) * 64 + min(256, _ceil_div(k_len, 64) * 64)


def _num_splits(
    num_samples: int,
    group_size: int,
    q_len: int,
    k_len: int,
    num_pivots: int,
    window: int,
    num_sms: int,
) -> int:
    """How many blocks share the queries of a key tile that all of them may see.

    Counted in products of 64 queries with 64 keys, for ``num_samples`` key/value heads of all
    samples: the longest tile should not take longer than all the work spread over two blocks for
    each multiprocessor. ``window``: keys in a local window.
    """
    long = group_size * _ceil_div(q_len, 64)
    short = min(long, group_size * (_ceil_div(window, 64) + 1))
    num_long, num_short = _split_rows(num_pivots, k_len) // 64, _ceil_div(k_len, 64)
    work = num_samples * (num_long * long + num_short * short)
    return min(max(_ceil_div(long * 2 * num_sms, max(work, 2 * num_sms)), 1), 16)


def _ceil_div(number: int, divisor: int) -> int:
    return -(-number // divisor)


def _without_autocast(function: Any) -> Any:
    """An operator's kernel computes in the dtypes it states, whatever the caller's autocast."""

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


def _define_kernel_operators(name: str, device: str) -> tuple[Any, Any, Any]:
    """The functional operators that call the kernels on tensors of ``device``."""
    far_keys = torch.library.custom_op(
        f"{name}_far_keys",
        _far_keys,
        mutates_args=(),
        device_types=device,
        schema="(Tensor text_len, Tensor pivot_idx, SymInt k_len) -> Tensor far_keys",
    )
    forward = torch.library.custom_op(
        name,
        _forward,
        mutates_args=(),
        device_types=device,
        schema=f"(Tensor q, Tensor k, Tensor v, Tensor far_keys, {_WINDOW_AND_SCALE})"
        " -> (Tensor out, Tensor row_max, Tensor row_log_sum)",
    )
    backward = torch.library.custom_op(
        f"{name}_backward",
        _backward,
        mutates_args=(),
        device_types=device,
        schema="(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, "
        f"Tensor row_max, Tensor row_log_sum, Tensor far_keys, {_WINDOW_AND_SCALE})"
        " -> (Tensor dq, Tensor dk, Tensor dv)",
    )

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        q, k, v, far_keys, *ctx.window_and_scale = inputs
        _, row_max, _ = output
        ctx.save_for_backward(q, k, v, *output, far_keys)
        # A shift, chosen freely: lse = (row_max + row_log_sum) ln 2 moves through row_log_sum.
        ctx.mark_non_differentiable(row_max)
        ctx.set_materialize_grads(False)

    def gradients(
        ctx: Any, dout: Tensor | None, drow_max: None, drow_log_sum: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        dout = torch.zeros_like(ctx.saved_tensors[3]) if dout is None else dout
        dlse = None if drow_log_sum is None else drow_log_sum / math.log(2)
        results = backward(dout, dlse, *ctx.saved_tensors, *ctx.window_and_scale)
        return (*results, *[None] * 6)

    for operator, fake in (
        (far_keys, _far_keys_fake),
        (forward, _forward_fake),
        (backward, _backward_fake),
    ):
        operator.register_fake(fake)
        operator.register_vmap(_folded_into_batch(operator))
    forward.register_autograd(gradients, setup_context=setup_context)
    return far_keys, forward, backward


_define_kernel_operators("cogview_kernels::three_region_attention_host_model", "cpu")
for _operator, _cpu_kernel in zip(
    _define_kernel_operators("cogview_kernels::three_region_attention", "cuda"),
    (
        portable.pack_far_keys,
        _without_autocast(portable.attention_forward_packed),
        _without_autocast(portable.attention_backward_packed),
    ),
    strict=True,
):
    _operator.register_kernel("cpu")(_cpu_kernel)


_portable = torch.library.custom_op(
    "cogview_kernels::three_region_attention_portable",
    _without_autocast(portable.attention_forward),
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {_LAYOUT_AND_SCALE}) -> (Tensor out, Tensor lse)",
)
_portable_backward = torch.library.custom_op(
    "cogview_kernels::three_region_attention_portable_backward",
    _without_autocast(portable.attention_backward),
    mutates_args=(),
    schema="(Tensor dout, Tensor dlse, Tensor q, Tensor k, Tensor v, Tensor out, "
    f"{_LAYOUT_AND_SCALE}, Tensor? lse=None) -> (Tensor dq, Tensor dk, Tensor dv)",
)


@_portable.register_fake
def _portable_fake(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return portable.empty_heads(q), q.new_empty(q.shape[:3], dtype=lse_dtype)


def _portable_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, text_len, pivot_idx, *ctx.window_and_scale = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, text_len, pivot_idx, lse)


def _portable_gradients(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
    *saved, lse = ctx.saved_tensors
    gradients = _portable_backward(dout, dlse, *saved, *ctx.window_and_scale, lse)
    return (*gradients, *[None] * 7)


_portable.register_autograd(_portable_gradients, setup_context=_portable_setup)
_portable_backward.register_fake(_backward_fake)
for _operator in (_portable, _portable_backward):
    _operator.register_vmap(_folded_into_batch(_operator))

"""``three_region_attention``: the public function, its checks and its operators."""

from __future__ import annotations

import math
from typing import Any, Literal, overload

import torch
from torch import Tensor

from cogview_kernels import extension, portable, reference
from cogview_kernels._checks import (
    check_choice,
    check_float,
    check_last_dim_contiguous,
    check_like,
    check_no_tangent,
    check_tensor,
    describe,
    values_readable,
)
from cogview_kernels.backends import BACKENDS, kernels_usable, kernels_wanted
from cogview_kernels.layout import ThreeRegionLayout

HEAD_DIMS = (32, 64, 96, 128)  # of the kernels


@overload
def three_region_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: ThreeRegionLayout,
    softmax_scale: float | None = None,
    backend: str = "auto",
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def three_region_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: ThreeRegionLayout,
    softmax_scale: float | None = None,
    backend: str = "auto",
    *,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def three_region_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: ThreeRegionLayout,
    softmax_scale: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over text prefix, random pivots and local window with one joint softmax.

    Queries are the last ``Sq`` positions of the keys: ``Sq == Sk`` in training, one token or a
    chunk in generation, where only the text, pivot and window rows of the cache are read.

    Args:
        q: ``(B, H, Sq, D)``, any floating dtype, last dimension contiguous, other strides free.
        k, v: ``(B, G, Sk, D)`` with ``H % G == 0`` and ``Sk >= Sq``; dtype and device as ``q``.
            Query head ``h`` reads key/value head ``h // (H // G)``.
        layout: the regions; its tensors on the device of ``q``.
        softmax_scale: multiplies ``q k^T``; default ``1 / sqrt(D)``.
        backend: ``"auto"`` (the CUDA kernel where there is one for these inputs, else portable),
            ``"cuda"`` (the kernel or an error saying why not), ``"portable"`` (blocked PyTorch),
            ``"reference"`` (the dense definition in float64) or ``"host_model"`` (the kernel's
            source on the CPU, where built).
        return_lse: also return the log-sum-exp of each row's logits.

    Returns:
        ``out (B, H, Sq, D)`` in the dtype of ``q``; with ``return_lse`` also ``lse (B, H, Sq)``,
        natural logarithm, float32 (float64 for float64 inputs).

    The kernels take float16 and bfloat16, a head dimension of 32, 64, 96 or 128 and up to 2^30
    keys. Everything else is ``portable`` under ``"auto"``, with one warning that says why: float32
    too, for which ``torch.autocast`` (or a cast to bfloat16) is the way to the kernels.

    Differentiable in ``q``, ``k`` and ``v``, through ``out`` and ``lse``; ``reference`` any number
    of times and in forward mode, the others once and backward. Under autocast, inputs are cast as
    for ``scaled_dot_product_attention``.
    torch.func: ``vmap`` works, and copies tensors that are not mapped for every sample; ``grad``,
    ``vjp`` and ``jacrev`` take ``reference`` alone, the others ``torch.autograd.grad``.
    Precision: float32 logits, softmax and sums (float64 for float64), one rounding of each result.
    The kernels also round softmax weights, and in the backward the gradients of logits, to the
    dtype of ``q`` before they are multiplied; float16 gradients are scaled to its range first.
    float16 ``v`` at or below 2^-19, among the denormal numbers, costs ``dq`` and ``dk`` accuracy:
    delta is taken from the rounded ``out``.
    Deterministic: yes, forward and backward.
    Memory: results lie in memory as the tensor they belong to (``out`` as ``q``, ``(B, Sq, H, D)``
    for views of a projection). Kept for the backward: the inputs, ``out`` and two float32 numbers
    for each query row. An input whose rows do not begin at multiples of 16 bytes is copied. The
    kernels' backward takes ``4 B H Sq`` bytes of workspace, for float16 ``4 B (2 H + G)`` more, and
    where few heads have to fill a GPU ``8 n B G R D`` more, ``n`` in 2..16 and ``R = round_up(P,
    64) + min(256, round_up(Sk, 64))``.
    CUDA graphs: calls on CUDA tensors read nothing back, and allocate by shapes alone.

    Raises:
        TypeError, ValueError: the tensor, what was expected and what came.
        KernelUnavailable: ``backend`` cannot run here; the message says why.
        NotImplementedError: forward mode, but for ``reference``; the message names the tensor.

    Source: CogView, arXiv 2105.13290.
    """
    check_choice("backend", backend, BACKENDS)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, tensor)
    q, k, v = (_autocast(tensor) for tensor in (q, k, v))
    softmax_scale = _check_inputs(q, k, v, layout, softmax_scale)

    if backend == "reference":
        out, lse = reference.three_region_attention(q, k, v, layout, softmax_scale)
        return (out, lse) if return_lse else out
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_no_tangent(name, tensor)
    text_len, pivot_idx = layout.tensors(q.shape[0], q.device)
    window_and_scale = (
        layout.query_window,
        layout.key_window_times,
        layout.text_bias,
        layout.pivot_bias,
        softmax_scale,
    )
    ops = torch.ops.cogview_kernels
    if kernels_wanted(backend, q.device) and kernels_usable(
        "three_region_attention", backend, q.device, _unsupported(q, k)
    ):
        if backend == "host_model":
            pack, attend = (
                ops.three_region_attention_host_model_far_keys,
                ops.three_region_attention_host_model,
            )
        else:
            pack, attend = ops.three_region_attention_far_keys, ops.three_region_attention
        far_keys = pack(text_len, pivot_idx, k.shape[2])
        out, row_max, row_log_sum = attend(q, k, v, far_keys, *window_and_scale)
        return (out, (row_max + row_log_sum) * math.log(2)) if return_lse else out
    out, lse = ops.three_region_attention_portable(q, k, v, text_len, pivot_idx, *window_and_scale)
    return (out, lse) if return_lse else out


def _unsupported(q: Tensor, k: Tensor) -> str | None:
    """Why the kernels do not take these inputs, wherever they lie; ``None`` if they do."""
    if q.dtype not in (torch.float16, torch.bfloat16):
        cast = "; torch.autocast casts to them" if q.dtype == torch.float32 else ""
        return f"the kernels take float16 and bfloat16, got {q.dtype}{cast}"
    if q.shape[3] not in HEAD_DIMS:
        return f"the kernels take head dimensions of {HEAD_DIMS}, got {q.shape[3]}"
    if k.shape[2] > 2**30:
        return f"the kernels take up to 2^30 keys, got {k.shape[2]}"
    return None


def _autocast(tensor: Tensor) -> Tensor:
    """The tensor in the dtype of an enabled autocast, which leaves float64 alone."""
    device = tensor.device.type
    enabled = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if not enabled or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


def _check_inputs(
    q: Tensor, k: Tensor, v: Tensor, layout: Any, softmax_scale: float | None
) -> float:
    """Check everything before any work; the softmax scale to use."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.ndim != 4:
            shape = "(B, H, Sq, D)" if name == "q" else "(B, G, Sk, D)"
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
    if not isinstance(layout, ThreeRegionLayout):
        raise TypeError(f"layout: expected a ThreeRegionLayout, got {describe(layout)}")
    batch, num_heads, q_len, head_dim = q.shape
    num_kv_heads, k_len = k.shape[1:3]
    if head_dim == 0 or num_heads == 0:
        raise ValueError(f"q: expected heads and a head dimension, got {tuple(q.shape)}")
    if k.shape[0] != batch or k.shape[3] != head_dim:
        raise ValueError(
            f"k: expected ({batch}, G, Sk, {head_dim}) to match q, got {tuple(k.shape)}"
        )
    if v.shape != k.shape:
        raise ValueError(f"v: expected {tuple(k.shape)} as k, got {tuple(v.shape)}")
    if num_kv_heads == 0 or num_heads % num_kv_heads != 0:
        raise ValueError(
            f"k: expected a number of heads that divides the {num_heads} of q, got {num_kv_heads}"
        )
    if q_len > k_len:
        raise ValueError(
            f"q: expected at most as many queries as the {k_len} keys (they are the last "
            f"positions), got {q_len}"
        )
    for name, tensor in (("k", k), ("v", v)):
        check_like(name, tensor, "q", q)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_last_dim_contiguous(name, tensor)
    text_len, pivot_idx = layout.tensors(batch, q.device)
    if values_readable(text_len) and values_readable(pivot_idx):
        layout.validate(k_len)
    return head_dim**-0.5 if softmax_scale is None else check_float("softmax_scale", softmax_scale)


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
    f"{_LAYOUT_AND_SCALE}) -> (Tensor dq, Tensor dk, Tensor dv)",
)


@_portable.register_fake
def _portable_fake(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return portable.empty_heads(q), q.new_empty(q.shape[:3], dtype=lse_dtype)


def _portable_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, text_len, pivot_idx, *ctx.window_and_scale = inputs
    ctx.save_for_backward(q, k, v, output[0], text_len, pivot_idx)


def _portable_gradients(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
    gradients = _portable_backward(dout, dlse, *ctx.saved_tensors, *ctx.window_and_scale)
    return (*gradients, *[None] * 7)


_portable.register_autograd(_portable_gradients, setup_context=_portable_setup)
_portable_backward.register_fake(_backward_fake)
for _operator in (_portable, _portable_backward):
    _operator.register_vmap(_folded_into_batch(_operator))

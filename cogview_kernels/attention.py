"""``three_region_attention``: the public function, its checks and its operators."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from cogview_kernels import portable, reference
from cogview_kernels._checks import (
    check_choice,
    check_float,
    check_last_dim_contiguous,
    check_like,
    check_tensor,
    describe,
    values_readable,
)
from cogview_kernels.backends import BACKENDS, KernelUnavailable, warn_once
from cogview_kernels.layout import ThreeRegionLayout

_WHY_NO_KERNEL = (
    "three_region_attention has no CUDA kernel in this version of cogview_kernels; "
    "backend='portable' computes the same function on every device"
)


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

    Differentiable in ``q``, ``k`` and ``v``, through ``out`` and ``lse``; ``portable`` once,
    ``reference`` any number of times. Under autocast, inputs are cast as for
    ``scaled_dot_product_attention``.
    Precision: float32 logits, softmax and sums (float64 for float64), one rounding of each result.
    Deterministic: yes, forward and backward.

    Raises:
        TypeError, ValueError: the tensor, what was expected and what came.
        KernelUnavailable: ``backend`` cannot run here; the message says why.

    Source: CogView, arXiv 2105.13290.
    """
    check_choice("backend", backend, BACKENDS)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, tensor)
    q, k, v = (_autocast(tensor) for tensor in (q, k, v))
    softmax_scale = _check_inputs(q, k, v, layout, softmax_scale)

    if backend in ("cuda", "host_model"):
        raise KernelUnavailable(f"backend={backend!r}: {_WHY_NO_KERNEL}")
    if backend == "reference":
        out, lse = reference.three_region_attention(q, k, v, layout, softmax_scale)
    else:
        if backend == "auto" and q.device.type == "cuda":
            warn_once(f"using backend='portable': {_WHY_NO_KERNEL}")
        text_len, pivot_idx = layout.tensors(q.shape[0], q.device)
        out, lse = torch.ops.cogview_kernels.three_region_attention_portable(
            q,
            k,
            v,
            text_len,
            pivot_idx,
            layout.query_window,
            layout.key_window_times,
            layout.text_bias,
            layout.pivot_bias,
            softmax_scale,
        )
    return (out, lse) if return_lse else out


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


_LAYOUT_AND_SCALE = (
    "Tensor text_len, Tensor pivot_idx, int query_window, int key_window_times, "
    "float text_bias, float pivot_bias, float softmax_scale"
)


def _without_autocast(function: Any) -> Any:
    """An operator's kernel computes in the dtypes it states, whatever the caller's autocast."""

    def kernel(*args: Any) -> Any:
        with torch.autocast(args[0].device.type, enabled=False):
            return function(*args)

    return kernel


torch.library.custom_op(
    "cogview_kernels::three_region_attention_portable",
    _without_autocast(portable.attention_forward),
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {_LAYOUT_AND_SCALE}) -> (Tensor out, Tensor lse)",
)
torch.library.custom_op(
    "cogview_kernels::three_region_attention_portable_backward",
    _without_autocast(portable.attention_backward),
    mutates_args=(),
    schema="(Tensor dout, Tensor dlse, Tensor q, Tensor k, Tensor v, Tensor out, "
    f"{_LAYOUT_AND_SCALE}) -> (Tensor dq, Tensor dk, Tensor dv)",
)


@torch.library.register_fake("cogview_kernels::three_region_attention_portable")
def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=lse_dtype)


@torch.library.register_fake("cogview_kernels::three_region_attention_portable_backward")
def _backward_fake(
    dout: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.query_window, ctx.key_window_times, ctx.text_bias, ctx.pivot_bias, ctx.scale = (
        inputs
    )
    ctx.save_for_backward(*tensors, output[0])


def _backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, text_len, pivot_idx, out = ctx.saved_tensors
    gradients = torch.ops.cogview_kernels.three_region_attention_portable_backward(
        dout,
        dlse,
        q,
        k,
        v,
        out,
        text_len,
        pivot_idx,
        ctx.query_window,
        ctx.key_window_times,
        ctx.text_bias,
        ctx.pivot_bias,
        ctx.scale,
    )
    return (*gradients, *[None] * 7)


torch.library.register_autograd(
    "cogview_kernels::three_region_attention_portable", _backward, setup_context=_setup_context
)

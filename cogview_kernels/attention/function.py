"""``three_region_attention``: the public function and its checks."""

from __future__ import annotations

import math
from typing import Any, Literal, overload

import torch
from torch import Tensor

from cogview_kernels import extension
from cogview_kernels.attention import operators, reference
from cogview_kernels.attention.layout import ThreeRegionLayout, check_kv_lens
from cogview_kernels.backends import BACKENDS, kernels_usable, kernels_wanted
from cogview_kernels.checks import (
    check_choice,
    check_float,
    check_last_dim_contiguous,
    check_like,
    check_no_tangent,
    check_tensor,
    describe,
    needs_gradient,
)
from cogview_kernels.verify import why_not_trusted


@overload
def three_region_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: ThreeRegionLayout,
    softmax_scale: float | None = None,
    backend: str = "auto",
    return_lse: Literal[False] = False,
    kv_lens: Tensor | None = None,
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
    kv_lens: Tensor | None = None,
) -> tuple[Tensor, Tensor]: ...


def three_region_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: ThreeRegionLayout,
    softmax_scale: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
    kv_lens: Tensor | None = None,
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
            ``"cuda"`` (the kernel or an error saying why not), ``"portable"`` (plain PyTorch),
            ``"reference"`` (the dense definition in float64) or ``"host_model"`` (the kernel's
            source on the CPU, where built).
        return_lse: also return the log-sum-exp of each row's logits.
        kv_lens: int32 ``(B,)`` on the device of ``q``: sample ``b`` has the first ``kv_lens[b]``
            keys, at most ``Sk``, and its queries are the last ``Sq`` of their positions. What lies
            behind them, in a cache that is not full, is not read. Where a sample has fewer keys
            than queries, the first rows have no position: zeros and an lse of ``-inf``.

    Returns:
        ``out (B, H, Sq, D)`` in the dtype of ``q``; with ``return_lse`` also ``lse (B, H, Sq)``,
        natural logarithm, float32 (float64 for float64 inputs).

    The kernels take float16 and bfloat16, a head dimension of 32, 64, 96 or 128 and up to 2^30
    keys. Everything else is ``portable`` under ``"auto"``, with one warning that says why: float32
    too, for which ``torch.autocast`` (or a cast to bfloat16) is the way to the kernels. At a first
    call, ``"auto"`` compares kernels that no GPU record vouches for with ``portable``; see
    :mod:`cogview_kernels.verify`.

    With up to 8 queries, or ``kv_lens``, the kernels are those for decoding: queries and heads that
    share a key/value head read its text, pivot and window rows once, and blocks share long lists.
    They read ``kv_lens`` on the device, so that a captured CUDA graph replays while sequences grow.
    They have no gradients with ``kv_lens``: where one is needed, ``"auto"`` is ``portable``.

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
    check_tensor("q", q)
    check_tensor("k", k)
    check_tensor("v", v)
    autocast_dtype = _autocast_dtype(q)
    if autocast_dtype is not None:
        q, k, v = (_cast(tensor, autocast_dtype) for tensor in (q, k, v))
    softmax_scale = _check_inputs(q, k, v, layout, softmax_scale)
    if kv_lens is not None:
        check_kv_lens(kv_lens, q.shape[0], k.shape[2])
        if kv_lens.device != q.device:
            raise ValueError(f"kv_lens: expected device {q.device} as q, got {kv_lens.device}")
    regions = layout.of_call(q.shape[0], k.shape[1], k.shape[2], q.device)

    if backend == "reference":
        out, lse = reference.three_region_attention(q, k, v, layout, softmax_scale, kv_lens)
        return (out, lse) if return_lse else out
    check_no_tangent(q=q, k=k, v=v)
    window_and_scale = (
        layout.query_window,
        layout.key_window_times,
        layout.text_bias,
        layout.pivot_bias,
        softmax_scale,
    )
    if kernels_wanted(backend, q.device) and kernels_usable(
        "three_region_attention",
        backend,
        _why_no_gradients(kv_lens, q, k, v) or _unsupported(q, k, backend),
    ):
        kernels = operators.HOST_MODEL if backend == "host_model" else operators.CUDA
        far_keys = regions.far_keys(kernels.far_keys)
        inputs = q, k, v, far_keys, *window_and_scale
        out, row_max, row_log_sum = kernels.forward(*inputs, kv_lens)
        return (out, (row_max + row_log_sum) * math.log(2)) if return_lse else out
    tensors = regions.text_len, regions.pivot_idx
    out, lse = operators.PORTABLE(q, k, v, *tensors, *window_and_scale, kv_lens)
    # A copy, which the caller may change in place: the backward reads lse.
    return (out, lse.clone()) if return_lse else out


def _why_no_gradients(kv_lens: Tensor | None, *inputs: Tensor) -> str | None:
    """Why the kernels lack gradients that are needed; ``None`` if they do not."""
    if kv_lens is None or not torch.is_grad_enabled():
        return None
    if not any(map(needs_gradient, inputs)):
        return None
    return "the kernels have no gradients with kv_lens; torch.no_grad() does without"


def _unsupported(q: Tensor, k: Tensor, backend: str) -> str | None:
    """Why the kernels of ``backend`` do not take these inputs; ``None`` if they do."""
    if q.dtype not in (torch.float16, torch.bfloat16):
        cast = "; torch.autocast casts to them" if q.dtype == torch.float32 else ""
        return f"the kernels take float16 and bfloat16, got {q.dtype}{cast}"
    if k.shape[2] > 2**30:
        return f"the kernels take up to 2^30 keys, got {k.shape[2]}"
    head_dim = len(range(q.shape[3]))  # a number to torch.compile too, where shapes are dynamic
    reason = extension.why_no_attention_kernel(q.dtype, head_dim, q.device, backend)
    if reason is None and backend == "auto":
        reason = why_not_trusted("three_region_attention", q.dtype, head_dim, q.device)
    return reason


def _autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """What an enabled autocast casts to; ``None`` without one."""
    device = tensor.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """As autocast does, which leaves float64 alone."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)


def _check_inputs(
    q: Tensor, k: Tensor, v: Tensor, layout: Any, softmax_scale: float | None
) -> float:
    """Check everything but the layout before any work; the softmax scale to use."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.ndim != 4:
            shape = "(B, H, Sq, D)" if name == "q" else "(B, G, Sk, D)"
            raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")
    if not isinstance(layout, ThreeRegionLayout):
        raise TypeError(f"layout: expected a ThreeRegionLayout, got {describe(layout)}")
    batch, num_heads, q_len, head_dim = q.shape
    kv_batch, num_kv_heads, k_len, kv_head_dim = k.shape
    if head_dim == 0 or num_heads == 0:
        raise ValueError(f"q: expected heads and a head dimension, got {tuple(q.shape)}")
    if kv_batch != batch or kv_head_dim != head_dim:
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
    check_like("k", k, "q", q)
    check_like("v", v, "q", q)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_last_dim_contiguous(name, tensor)
    return head_dim**-0.5 if softmax_scale is None else check_float("softmax_scale", softmax_scale)

"""``pb_relax_layer_norm`` and ``sandwich_residual``: the public functions and their module."""

from __future__ import annotations

import torch
from torch import Tensor

from cogview_kernels import portable, reference
from cogview_kernels._checks import (
    check_choice,
    check_float,
    check_int,
    check_last_dim_contiguous,
    check_tensor,
    describe,
    values_readable,
)
from cogview_kernels.backends import BACKENDS, KernelUnavailable

RELAX = ("row", "tensor", None)


def pb_relax_layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
    relax: str | None = "row",
    backend: str = "auto",
) -> Tensor:
    """``(x - mean) / sqrt(var + eps c^2) * weight + bias`` with ``c = max|x| / 8`` detached.

    The LayerNorm of ``x / c``: no intermediate leaves float16's range however large ``x`` is.

    Args:
        x: ``(..., hidden)``, any floating dtype, last dimension contiguous.
        weight, bias: ``(hidden,)`` in the dtype of ``x`` or float32, or ``None``.
        eps: added to the variance of ``x / c``.
        relax: ``"row"`` takes the maximum over each row, ``"tensor"`` over all of ``x`` (the
            released CogView checkpoints), ``None`` is plain LayerNorm (``c = 1``).
        backend: as for :func:`three_region_attention`.

    Returns:
        ``(..., hidden)`` in the dtype of ``x``. A row of zeros gives ``bias``.

    Differentiable in ``x``, ``weight`` and ``bias``; no gradient flows through ``c``.
    Precision: statistics in float32 (float64 for float64), one rounding of the result.
    Under autocast: computed in the dtype of ``x``.

    Raises:
        TypeError, ValueError: the tensor, what was expected and what came. NaN in ``weight`` or
            ``bias`` is refused where they can be read without a synchronisation (on the CPU).
        KernelUnavailable: ``backend`` cannot run here; the message says why.

    Source: CogView, arXiv 2105.13290, "Precision Bottleneck Relaxation".
    """
    check_choice("backend", backend, BACKENDS)
    check_choice("relax", relax, RELAX)
    eps = _check_eps(eps)
    _check_input("x", x)
    _check_parameter("weight", weight, "x", x)
    _check_parameter("bias", bias, "x", x)
    return _normalise(x, weight, bias, eps, relax, backend)


def sandwich_residual(
    f: Tensor,
    residual: Tensor,
    post_weight: Tensor | None,
    post_bias: Tensor | None,
    pre_weight: Tensor | None,
    pre_bias: Tensor | None,
    eps: float = 1e-5,
    relax: str | None = "row",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The step between two sub-layers: ``h = residual + LN_post(f)``, ``z = LN_pre(h)``.

    Args:
        f: ``(..., hidden)``, output of the branch.
        residual: shape and device of ``f``; its dtype, or float32.
        post_weight, post_bias, pre_weight, pre_bias: as ``weight`` and ``bias`` of
            :func:`pb_relax_layer_norm`.
        eps, relax, backend: as there; both norms share them.

    Returns:
        ``(h, z)``, each with the shape and dtype of ``residual``; ``z`` is the norm of the rounded ``h``.

    Differentiable in all tensors. Raises as :func:`pb_relax_layer_norm`.
    Source: CogView, arXiv 2105.13290, "Sandwich LayerNorm".
    """
    check_choice("backend", backend, BACKENDS)
    check_choice("relax", relax, RELAX)
    eps = _check_eps(eps)
    _check_input("f", f)
    _check_input("residual", residual)
    if residual.shape != f.shape:
        raise ValueError(f"residual: expected {tuple(f.shape)} as f, got {tuple(residual.shape)}")
    for name, parameter in (
        ("post_weight", post_weight),
        ("post_bias", post_bias),
        ("pre_weight", pre_weight),
        ("pre_bias", pre_bias),
    ):
        _check_parameter(name, parameter, "f", f)
    if residual.dtype not in (f.dtype, torch.float32):
        raise TypeError(f"residual: expected dtype {f.dtype} or float32, got {residual.dtype}")
    if residual.device != f.device:
        raise ValueError(f"residual: expected device {f.device} as f, got {residual.device}")
    h = (residual + _normalise(f, post_weight, post_bias, eps, relax, backend)).to(residual.dtype)
    return h, _normalise(h, pre_weight, pre_bias, eps, relax, backend)


class PBRelaxLayerNorm(torch.nn.LayerNorm):
    """Module form of :func:`pb_relax_layer_norm`, with the state_dict of ``nn.LayerNorm``.

    Args:
        hidden: size of the last dimension.
        eps, relax: as in the function.
        elementwise_affine, bias, device, dtype: as in ``nn.LayerNorm``.
    """

    def __init__(
        self,
        hidden: int,
        eps: float = 1e-5,
        relax: str | None = "row",
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_int("hidden", hidden, minimum=1)
        check_choice("relax", relax, RELAX)
        super().__init__(hidden, _check_eps(eps), elementwise_affine, bias, device, dtype)
        self.relax = relax

    def forward(self, x: Tensor) -> Tensor:
        return pb_relax_layer_norm(x, self.weight, self.bias, self.eps, self.relax)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, relax={self.relax!r}"


def _normalise(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    relax: str | None,
    backend: str,
) -> Tensor:
    if backend == "reference":
        return reference.pb_relax_layer_norm(x, weight, bias, eps, relax)
    return portable.layer_norm(x, weight, bias, eps, relax)


def _check_eps(eps: float) -> float:
    if check_float("eps", eps) <= 0:
        raise ValueError(f"eps: expected a positive number, got {eps}")
    return float(eps)


def _check_input(name: str, tensor: Tensor) -> None:
    check_tensor(name, tensor)
    if tensor.ndim == 0 or tensor.shape[-1] == 0:
        raise ValueError(f"{name}: expected shape (..., hidden), got {tuple(tensor.shape)}")
    check_last_dim_contiguous(name, tensor)


def _check_parameter(name: str, parameter: Tensor | None, x_name: str, x: Tensor) -> None:
    if parameter is None:
        return
    if not isinstance(parameter, Tensor) or parameter.dtype not in (x.dtype, torch.float32):
        raise TypeError(
            f"{name}: expected a tensor of dtype {x.dtype} as {x_name}, or float32, "
            f"got {describe(parameter)}"
        )
    if parameter.shape != x.shape[-1:]:
        raise ValueError(
            f"{name}: expected {tuple(x.shape[-1:])} as the last dimension of {x_name}, "
            f"got {tuple(parameter.shape)}"
        )
    if parameter.device != x.device:
        raise ValueError(f"{name}: expected device {x.device} as {x_name}, got {parameter.device}")
    if values_readable(parameter) and bool(parameter.isnan().any()):
        raise ValueError(f"{name}: expected numbers, got NaN")

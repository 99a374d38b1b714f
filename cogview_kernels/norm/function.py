"""``pb_relax_layer_norm`` and ``sandwich_residual``, the module, and ``patch`` for models."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from cogview_kernels import extension
from cogview_kernels.backends import BACKENDS, kernels_usable, kernels_wanted
from cogview_kernels.checks import (
    check_choice,
    check_float,
    check_int,
    check_last_dim_contiguous,
    check_no_nan,
    check_no_tangent,
    check_tensor,
    describe,
)
from cogview_kernels.norm import operators, portable, reference
from cogview_kernels.norm.operators import RELAX
from cogview_kernels.verify import why_not_trusted


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
        NotImplementedError: forward mode through the kernels; the message names the tensor.

    Source: CogView, arXiv 2105.13290, "Precision Bottleneck Relaxation".
    """
    check_choice("backend", backend, BACKENDS)
    check_choice("relax", relax, RELAX)
    eps = _check_eps(eps)
    _check_input("x", x)
    _check_affine("x", x, "", weight, bias)
    if backend == "reference":
        return reference.pb_relax_layer_norm(x, weight, bias, eps, relax)
    kernels = _kernels("pb_relax_layer_norm", backend, x, x.dtype)
    if kernels is None:
        return portable.layer_norm(x, weight, bias, eps, relax)
    check_no_tangent(x=x, weight=weight, bias=bias)
    return kernels.pb_relax_layer_norm(x, weight, bias, eps, RELAX.index(relax))


@overload
def sandwich_residual(
    f: Tensor,
    residual: Tensor,
    post_weight: Tensor | None,
    post_bias: Tensor | None,
    pre_weight: Tensor | None,
    pre_bias: Tensor | None,
    eps: float = ...,
    relax: str | None = ...,
    backend: str = ...,
    *,
    dropout_p: float = ...,
    final_norm: Literal[True] = ...,
    generator: torch.Generator | None = ...,
) -> tuple[Tensor, Tensor]: ...


@overload
def sandwich_residual(
    f: Tensor,
    residual: Tensor,
    post_weight: Tensor | None,
    post_bias: Tensor | None,
    pre_weight: None,
    pre_bias: None,
    eps: float = ...,
    relax: str | None = ...,
    backend: str = ...,
    *,
    dropout_p: float = ...,
    final_norm: Literal[False],
    generator: torch.Generator | None = ...,
) -> tuple[Tensor, None]: ...


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
    *,
    dropout_p: float = 0.0,
    final_norm: bool = True,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The step between two sub-layers: ``h = residual + LN_post(dropout(f))``, ``z = LN_pre(h)``.

    Args:
        f: ``(..., hidden)``, output of the branch.
        residual: shape and device of ``f``; its dtype, or float32.
        post_weight, post_bias, pre_weight, pre_bias: as ``weight`` and ``bias`` of
            :func:`pb_relax_layer_norm`.
        eps, relax, backend: as there; both norms share them.
        dropout_p: probability in [0, 1] with which an element of ``f`` becomes zero, in steps of
            ``2^-16``; the others are divided by ``1 - dropout_p``. For training: 0 in evaluation.
        final_norm: ``False`` leaves out the norm of ``h`` (behind the last sub-layer);
            ``pre_weight`` and ``pre_bias`` are then ``None``.
        generator: seeds the dropout, on the device of ``f``; default: torch's. Activation
            checkpointing draws the same elements again from torch's alone.

    Returns:
        ``(h, z)``, each with the shape and dtype of ``residual``; ``z`` is the norm of the rounded
        ``h``, or ``None`` without ``final_norm``.

    Differentiable in all tensors. Which elements are dropped depends on the seed alone (an int64
    that each call with dropout draws on the device), not on the backend.
    Precision: as there; ``h`` is rounded once, the norm of ``f`` before it is not.
    Under autocast: computed in the dtypes that come. Raises as :func:`pb_relax_layer_norm`.
    Source: CogView, arXiv 2105.13290, "Sandwich LayerNorm".
    """
    check_choice("backend", backend, BACKENDS)
    check_choice("relax", relax, RELAX)
    check_choice("final_norm", final_norm, (True, False))
    eps = _check_eps(eps)
    dropout = _check_dropout(dropout_p)
    _check_input("f", f)
    _check_input("residual", residual)
    if residual.shape != f.shape:
        raise ValueError(f"residual: expected {tuple(f.shape)} as f, got {tuple(residual.shape)}")
    _check_affine("f", f, "post_", post_weight, post_bias)
    if residual.dtype not in (f.dtype, torch.float32):
        raise TypeError(f"residual: expected dtype {f.dtype} or float32, got {residual.dtype}")
    if residual.device != f.device:
        raise ValueError(f"residual: expected device {f.device} as f, got {residual.device}")
    if not final_norm:
        for name, parameter in (("pre_weight", pre_weight), ("pre_bias", pre_bias)):
            if parameter is not None:
                raise ValueError(
                    f"{name}: expected None without final_norm, got {describe(parameter)}"
                )
    _check_affine("residual", residual, "pre_", pre_weight, pre_bias)
    _check_generator(generator, f)

    parameters = post_weight, post_bias, pre_weight, pre_bias
    kernels = _kernels("sandwich_residual", backend, f, residual.dtype)
    seed = None if dropout == 0 else _draw_seed(f.device, generator)
    if kernels is None:
        dropped = None if seed is None else portable.dropout_mask(seed, dropout, f.shape)
        module = reference if backend == "reference" else portable
        return module.sandwich_residual(
            f, residual, *parameters, dropped, dropout / 65536, eps, relax, final_norm
        )
    check_no_tangent(
        f=f,
        residual=residual,
        post_weight=post_weight,
        post_bias=post_bias,
        pre_weight=pre_weight,
        pre_bias=pre_bias,
    )
    h, z = kernels.sandwich_residual(
        f, residual, final_norm, *parameters, seed, dropout, eps, RELAX.index(relax)
    )
    return h, z if final_norm else None


def patch(model: torch.nn.Module, relax: str | None = None) -> torch.nn.Module:
    """Let every ``nn.LayerNorm`` of ``model`` over one dimension run on these kernels.

    The modules themselves become :class:`PBRelaxLayerNorm`: parameters, hooks, names and state_dict
    stay, and so do optimizers and whatever else refers to them. Subclasses of ``nn.LayerNorm`` and
    norms over several dimensions are left alone, and so are norms that were patched before.

    Args:
        model: changed in place; may be a norm itself.
        relax: as in :func:`pb_relax_layer_norm`; ``None`` computes what ``nn.LayerNorm`` does. In
            evaluation, ``nn.TransformerEncoderLayer`` has a fused path of its own, which ``None``
            leaves on; it knows plain LayerNorm alone, so that any other value turns it off.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: a norm with an eps that :func:`pb_relax_layer_norm` refuses, by its name; then
            nothing was changed.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {describe(model)}")
    check_choice("relax", relax, RELAX)
    norms = {
        name: module
        for name, module in model.named_modules()
        if type(module) is torch.nn.LayerNorm and len(module.normalized_shape) == 1
    }
    for name, norm in norms.items():
        _check_eps(norm.eps, f"{name}.eps" if name else "eps")
    for norm in norms.values():
        norm.__class__ = PBRelaxLayerNorm
        norm.relax = relax  # type: ignore[assignment]
    for module in model.modules() if relax is not None else ():
        # What the fused path asks for; nested tensors, for padded batches, know nothing else.
        if isinstance(module, torch.nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, torch.nn.TransformerEncoder):
            module.use_nested_tensor = False
    return model


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
        return pb_relax_layer_norm(
            operators.contiguous_rows(x), self.weight, self.bias, self.eps, self.relax
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, relax={self.relax!r}"


def _kernels(
    function: str, backend: str, x: Tensor, result_dtype: torch.dtype
) -> operators.Kernels | None:
    """The operators that run the kernels on tensors like ``x``; ``None`` where ``portable`` is to
    compute."""
    if not kernels_wanted(backend, x.device) or not kernels_usable(
        function, backend, _unsupported(function, backend, x, result_dtype)
    ):
        return None
    return operators.HOST_MODEL if backend == "host_model" else operators.CUDA


def _draw_seed(device: torch.device, generator: torch.Generator | None) -> Tensor:
    return torch.randint(2**63 - 1, (1,), generator=generator, device=device)


def _unsupported(function: str, backend: str, x: Tensor, result_dtype: torch.dtype) -> str | None:
    """Why the kernels of ``backend`` do not take this input; ``None`` if they do."""
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the kernels take float32, float16 and bfloat16, got {x.dtype}"
    reason = extension.why_no_kernel_on(x.device, backend)
    if reason is None and backend == "auto":
        reason = why_not_trusted(function, x.dtype, result_dtype, x.device)
    return reason


def _check_eps(eps: float, name: str = "eps") -> float:
    if check_float(name, eps) < 1e-30:  # eps / 64 must not vanish in float32
        raise ValueError(f"{name}: expected at least 1e-30, got {eps}")
    return float(eps)


def _check_dropout(dropout_p: float) -> int:
    """``dropout_p`` in units of ``2^-16``."""
    if not 0 <= check_float("dropout_p", dropout_p) <= 1:
        raise ValueError(f"dropout_p: expected a probability, got {dropout_p}")
    return round(dropout_p * 65536)


def _check_generator(generator: torch.Generator | None, f: Tensor) -> None:
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator: expected a torch.Generator, got {describe(generator)}")
    if generator.device.type != f.device.type:
        raise ValueError(
            f"generator: expected device {f.device.type} as f, got {generator.device.type}"
        )


def _check_input(name: str, tensor: Tensor) -> None:
    check_tensor(name, tensor)
    if tensor.ndim == 0 or tensor.shape[-1] == 0:
        raise ValueError(f"{name}: expected shape (..., hidden), got {tuple(tensor.shape)}")
    check_last_dim_contiguous(name, tensor)


def _check_affine(
    x_name: str, x: Tensor, prefix: str, weight: Tensor | None, bias: Tensor | None
) -> None:
    """The weight and bias of the norm of ``x``; the user knows them with ``prefix``."""
    if weight is None and bias is None:
        return
    dtype, device, hidden = x.dtype, x.device, x.shape[-1:]
    for last, parameter in (("weight", weight), ("bias", bias)):
        if parameter is None:
            continue
        if not isinstance(parameter, Tensor) or parameter.dtype not in (dtype, torch.float32):
            raise TypeError(
                f"{prefix}{last}: expected a tensor of dtype {dtype} as {x_name}, or float32, "
                f"got {describe(parameter)}"
            )
        if parameter.shape != hidden:
            raise ValueError(
                f"{prefix}{last}: expected {tuple(hidden)} as the last dimension of {x_name}, "
                f"got {tuple(parameter.shape)}"
            )
        if parameter.device != device:
            raise ValueError(
                f"{prefix}{last}: expected device {device} as {x_name}, got {parameter.device}"
            )
        check_no_nan(prefix + last, parameter)
    if weight is not None and bias is not None and weight.dtype != bias.dtype:
        raise TypeError(
            f"{prefix}bias: expected dtype {weight.dtype} as {prefix}weight, got {bias.dtype}"
        )

"""``pb_relax_layer_norm`` and ``sandwich_residual``: the public functions, their module, and the
operator that reaches the CUDA kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cogview_kernels import extension, portable, reference
from cogview_kernels._checks import (
    check_choice,
    check_float,
    check_int,
    check_last_dim_contiguous,
    check_no_tangent,
    check_tensor,
    describe,
    values_readable,
)
from cogview_kernels.backends import BACKENDS, kernels_usable, kernels_wanted

RELAX = (None, "row", "tensor")  # numbered as in csrc/pb_relax_layer_norm


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
    _check_parameters("x", x, weight=weight, bias=bias)
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
        ``(h, z)``, each with the shape and dtype of ``residual``; ``z`` is the norm of the rounded
        ``h``.

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
    _check_parameters("f", f, post_weight=post_weight, post_bias=post_bias)
    if residual.dtype not in (f.dtype, torch.float32):
        raise TypeError(f"residual: expected dtype {f.dtype} or float32, got {residual.dtype}")
    if residual.device != f.device:
        raise ValueError(f"residual: expected device {f.device} as f, got {residual.device}")
    _check_parameters("residual", residual, pre_weight=pre_weight, pre_bias=pre_bias)
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
    if kernels_wanted(backend, x.device) and kernels_usable(
        "pb_relax_layer_norm", backend, x.device, _unsupported(x)
    ):
        for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
            check_no_tangent(name, tensor)
        ops = torch.ops.cogview_kernels
        host_model = backend == "host_model"
        norm = ops.pb_relax_layer_norm_host_model if host_model else ops.pb_relax_layer_norm
        y, _, _ = norm(x.reshape(-1, x.shape[-1]), weight, bias, eps, RELAX.index(relax))
        return y.view(x.shape)
    return portable.layer_norm(x, weight, bias, eps, relax)


def _unsupported(x: Tensor) -> str | None:
    """Why the kernels do not take this input, wherever it lies; ``None`` if they do."""
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the kernels take float32, float16 and bfloat16, got {x.dtype}"
    return None


def _check_eps(eps: float) -> float:
    if check_float("eps", eps) < 1e-30:  # eps / 64 must not vanish in float32
        raise ValueError(f"eps: expected at least 1e-30, got {eps}")
    return float(eps)


def _check_input(name: str, tensor: Tensor) -> None:
    check_tensor(name, tensor)
    if tensor.ndim == 0 or tensor.shape[-1] == 0:
        raise ValueError(f"{name}: expected shape (..., hidden), got {tuple(tensor.shape)}")
    check_last_dim_contiguous(name, tensor)


def _check_parameters(x_name: str, x: Tensor, **parameters: Tensor | None) -> None:
    """A norm's weight and bias, under the names that the user knows them by."""
    for name, parameter in parameters.items():
        _check_parameter(name, parameter, x_name, x)
    (weight_name, weight), (bias_name, bias) = parameters.items()
    if weight is not None and bias is not None and weight.dtype != bias.dtype:
        raise TypeError(
            f"{bias_name}: expected dtype {weight.dtype} as {weight_name}, got {bias.dtype}"
        )


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


# The operators, on rows: forward keeps mean and rstd for the backward. Outputs and workspace are
# allocated here, so that running out of memory stays torch.OutOfMemoryError.

extension.LIBRARY.define(
    "pb_relax_layer_norm_forward_out(Tensor x, Tensor? weight, Tensor? bias, Tensor? peak, "
    "float eps, int relax, Tensor(a!) y, Tensor(b!) mean, Tensor(c!) rstd) -> ()"
)
extension.LIBRARY.define(
    "pb_relax_layer_norm_backward_out(Tensor dy, Tensor x, Tensor? weight, Tensor mean, "
    "Tensor rstd, Tensor(a!) dx, Tensor(b!) partial, Tensor(c!)? dweight, Tensor(d!)? dbias) -> ()"
)


def _forward_fake(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, relax: int
) -> tuple[Tensor, Tensor, Tensor]:
    statistic = x.new_empty(x.shape[0], dtype=torch.float32)
    return x.new_empty(x.shape), statistic, torch.empty_like(statistic)


def _backward_fake(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    parameters: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    size = 0 if parameters is None else x.shape[1]
    dweight = x.new_empty(size, dtype=parameters or torch.float32)
    return x.new_empty(x.shape), dweight, torch.empty_like(dweight)


def _forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, relax: int
) -> tuple[Tensor, Tensor, Tensor]:
    y, mean, rstd = _forward_fake(x, weight, bias, eps, relax)
    peak = None
    if RELAX[relax] == "tensor" and x.numel() > 0:
        peak = torch.linalg.vector_norm(x, float("inf"), dtype=torch.float32).view(1)
    if x.shape[0] > 0:
        torch.ops.cogview_kernels.pb_relax_layer_norm_forward_out(
            x, _contiguous(weight), _contiguous(bias), peak, eps, relax, y, mean, rstd
        )
    return y, mean, rstd


def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    parameters: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dweight, dbias = _backward_fake(dy, x, weight, mean, rstd, parameters)
    rows, hidden = x.shape
    if rows == 0:
        return dx, dweight.zero_(), dbias.zero_()
    # Workers whose partial sums of dweight and dbias are added at the end: two blocks for each
    # multiprocessor; four workers share a block where a warp holds a row.
    num_workers = 2 * extension.num_sms(x.device) * (4 if hidden <= 512 else 1)
    partial = x.new_empty(2, min(rows, num_workers), hidden, dtype=torch.float32)
    wanted = (None, None) if parameters is None else (dweight, dbias)
    torch.ops.cogview_kernels.pb_relax_layer_norm_backward_out(
        dy, x, _contiguous(weight), mean.contiguous(), rstd.contiguous(), dx, partial, *wanted
    )
    return dx, dweight, dbias


def _contiguous(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.contiguous()


def _sample_by_sample(operator: Any) -> Any:
    """The operator under vmap, one call for each sample."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        def call(take: Any) -> Any:
            pairs = zip(args, in_dims, strict=True)
            return operator(*(arg if dim is None else take(arg, dim) for arg, dim in pairs))

        if info.batch_size == 0:  # the shapes of a sample's results
            results = [t.new_empty(0, *t.shape) for t in call(lambda arg, dim: arg.sum(dim))]
        else:
            each = [call(lambda arg, dim, i=i: arg.select(dim, i)) for i in range(info.batch_size)]
            results = [torch.stack(sample) for sample in zip(*each, strict=True)]
        return tuple(results), (0,) * len(results)

    return rule


def _folded_into_rows(operator: Any) -> Any:
    """The forward under vmap: rows that share weight, bias and no maximum know nothing of each
    other, so the mapped dimension becomes part of them."""
    otherwise = _sample_by_sample(operator)

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        x_dim, weight_dim, bias_dim = in_dims[:3]
        x, *rest, relax = args
        if x_dim is None or (weight_dim, bias_dim) != (None, None) or RELAX[relax] == "tensor":
            return otherwise(info, in_dims, *args)
        x = x.movedim(x_dim, 0)
        results = operator(x.flatten(0, 1), *rest, relax)
        return tuple(result.unflatten(0, x.shape[:2]) for result in results), (0, 0, 0)

    return rule


def _define_operators(name: str, device: str) -> tuple[Any, Any]:
    """The functional operators that call the kernels on tensors of ``device``."""
    forward = torch.library.custom_op(
        name,
        _forward,
        mutates_args=(),
        device_types=device,
        schema="(Tensor x, Tensor? weight, Tensor? bias, float eps, int relax)"
        " -> (Tensor y, Tensor mean, Tensor rstd)",
    )
    backward = torch.library.custom_op(
        f"{name}_backward",
        _backward,
        mutates_args=(),
        device_types=device,
        schema="(Tensor dy, Tensor x, Tensor? weight, Tensor mean, Tensor rstd, "
        "ScalarType? parameters) -> (Tensor dx, Tensor dweight, Tensor dbias)",
    )

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, bias, _, _ = inputs
        _, mean, rstd = output
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.mark_non_differentiable(mean, rstd)
        ctx.parameter_dtype = next((t.dtype for t in (weight, bias) if t is not None), None)

    def gradients(
        ctx: Any, dy: Tensor, dmean: Tensor | None, drstd: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        parameters = ctx.parameter_dtype if any(ctx.needs_input_grad[1:3]) else None
        if dy.stride(-1) != 1:
            dy = dy.contiguous()
        dx, dweight, dbias = backward(dy, *ctx.saved_tensors, parameters)
        return (
            dx,
            dweight if ctx.needs_input_grad[1] else None,
            dbias if ctx.needs_input_grad[2] else None,
            None,
            None,
        )

    forward.register_fake(_forward_fake)
    backward.register_fake(_backward_fake)
    forward.register_autograd(gradients, setup_context=setup_context)
    forward.register_vmap(_folded_into_rows(forward))
    backward.register_vmap(_sample_by_sample(backward))
    return forward, backward


_define_operators("cogview_kernels::pb_relax_layer_norm_host_model", "cpu")
for _operator, _cpu_kernel in zip(
    _define_operators("cogview_kernels::pb_relax_layer_norm", "cuda"),
    (portable.layer_norm_rows, portable.layer_norm_rows_backward),
    strict=True,
):
    _operator.register_kernel("cpu")(_cpu_kernel)

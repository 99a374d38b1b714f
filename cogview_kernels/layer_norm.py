"""``pb_relax_layer_norm`` and ``sandwich_residual``: the public functions, their module, and the
operators that reach the CUDA kernels."""

from __future__ import annotations

from typing import Any, Literal, overload

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
    if backend == "reference":
        return reference.pb_relax_layer_norm(x, weight, bias, eps, relax)
    norm = _operator("pb_relax_layer_norm", backend, {"x": x, "weight": weight, "bias": bias})
    if norm is None:
        return portable.layer_norm(x, weight, bias, eps, relax)
    y, _ = norm(_as_rows(x), weight, bias, eps, RELAX.index(relax))
    return y.view(x.shape)


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
    _check_parameters("f", f, post_weight=post_weight, post_bias=post_bias)
    if residual.dtype not in (f.dtype, torch.float32):
        raise TypeError(f"residual: expected dtype {f.dtype} or float32, got {residual.dtype}")
    if residual.device != f.device:
        raise ValueError(f"residual: expected device {f.device} as f, got {residual.device}")
    for name, parameter in (("pre_weight", pre_weight), ("pre_bias", pre_bias)):
        if parameter is not None and not final_norm:
            raise ValueError(f"{name}: expected None without final_norm, got {describe(parameter)}")
    _check_parameters("residual", residual, pre_weight=pre_weight, pre_bias=pre_bias)
    _check_generator(generator, f)

    parameters = {
        "post_weight": post_weight,
        "post_bias": post_bias,
        "pre_weight": pre_weight,
        "pre_bias": pre_bias,
    }
    sandwich = _operator("sandwich_residual", backend, {"f": f, "residual": residual, **parameters})
    seed = None if dropout == 0 else _draw_seed(f.device, generator)
    if sandwich is None:
        dropped = None if seed is None else portable.dropout_mask(seed, dropout, f.shape)
        module = reference if backend == "reference" else portable
        return module.sandwich_residual(
            f, residual, *parameters.values(), dropped, dropout / 65536, eps, relax, final_norm
        )
    h, z, _, _ = sandwich(
        _as_rows(f),
        _as_rows(residual),
        final_norm,
        *parameters.values(),
        seed,
        dropout,
        eps,
        RELAX.index(relax),
    )
    return h.view(f.shape), z.view(f.shape) if final_norm else None


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
        ValueError: a norm with an eps that :func:`pb_relax_layer_norm` refuses, by its name; then
            nothing was changed.
    """
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
            _contiguous_rows(x), self.weight, self.bias, self.eps, self.relax
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, relax={self.relax!r}"


def _operator(function: str, backend: str, tensors: dict[str, Tensor | None]) -> Any:
    """The operator that runs the kernels on ``tensors``, or ``None`` where ``portable`` is to
    compute. The first of them decides."""
    x = next(iter(tensors.values()))
    assert x is not None
    if not kernels_wanted(backend, x.device) or not kernels_usable(
        function, backend, x.device, _unsupported(x)
    ):
        return None
    for name, tensor in tensors.items():
        check_no_tangent(name, tensor)
    name = f"{function}_host_model" if backend == "host_model" else function
    return getattr(torch.ops.cogview_kernels, name)


def _draw_seed(device: torch.device, generator: torch.Generator | None) -> Tensor:
    return torch.randint(2**63 - 1, (1,), generator=generator, device=device)


def _as_rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _contiguous_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _unsupported(x: Tensor) -> str | None:
    """Why the kernels do not take this input, wherever it lies; ``None`` if they do."""
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the kernels take float32, float16 and bfloat16, got {x.dtype}"
    return None


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


# The operators, on rows: what the forward keeps for the backward are float32 statistics of each
# normalised row, see csrc/pb_relax_layer_norm. Outputs and workspace are allocated here, so that
# running out of memory stays torch.OutOfMemoryError, and by shapes alone, so that a call can be
# captured in a CUDA graph.

extension.LIBRARY.define(
    "pb_relax_layer_norm_forward_out(Tensor x, Tensor? weight, Tensor? bias, float eps, int relax, "
    "int num_blocks, Tensor(a!)? peak, Tensor(b!) y, Tensor(c!) statistics) -> ()"
)
extension.LIBRARY.define(
    "pb_relax_layer_norm_backward_out(Tensor dy, Tensor x, Tensor? weight, Tensor statistics, "
    "int num_blocks, Tensor(a!) dx, Tensor(b!)? partial, Tensor(c!)? dweight, Tensor(d!)? dbias) "
    "-> ()"
)
extension.LIBRARY.define(
    "sandwich_residual_forward_out(Tensor f, Tensor residual, Tensor? post_weight, "
    "Tensor? post_bias, Tensor? pre_weight, Tensor? pre_bias, Tensor? seed, int dropout, "
    "float eps, int relax, int num_blocks, Tensor(a!)? peaks, Tensor(b!) h, Tensor(c!)? z, "
    "Tensor(d!) f_statistics, Tensor(e!)? h_statistics) -> ()"
)
extension.LIBRARY.define(
    "sandwich_residual_backward_out(Tensor dh, Tensor? dz, Tensor f, Tensor? h, "
    "Tensor? post_weight, Tensor? pre_weight, Tensor f_statistics, Tensor? h_statistics, "
    "Tensor? seed, int dropout, int num_blocks, Tensor(a!) df, Tensor(b!)? dresidual, "
    "Tensor(c!)? partial, Tensor(d!)? dpost_weight, Tensor(e!)? dpost_bias, "
    "Tensor(f!)? dpre_weight, Tensor(g!)? dpre_bias) -> ()"
)


def _forward_fake(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, relax: int
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[0], 4, dtype=torch.float32)


def _backward_fake(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
    parameters: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), *_empty_parameters(x, parameters)


def _sandwich_fake(
    f: Tensor, residual: Tensor, final_norm: bool, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Without the final norm, the rows of its results have no elements."""
    rows, hidden = f.shape
    h, z = residual.new_empty(rows, hidden), residual.new_empty(rows, hidden if final_norm else 0)
    statistics = f.new_empty(rows, 4, dtype=torch.float32)
    return h, z, statistics, statistics.new_empty(rows, 4 if final_norm else 0)


def _sandwich_backward_fake(
    dh: Tensor, dz: Tensor | None, f: Tensor, h: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Without the final norm, the gradient of residual is dh and not here."""
    rows, hidden = f.shape
    dresidual = dh.new_empty(rows, 0 if dz is None else hidden)
    post, pre = (_empty_parameters(f, dtype) for dtype in rest[-2:])
    return f.new_empty(f.shape), dresidual, *post, *pre


def _empty_parameters(x: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """The gradients of weight and bias; of no elements where none is wanted."""
    dweight = x.new_empty(0 if dtype is None else x.shape[1], dtype=dtype or torch.float32)
    return dweight, torch.empty_like(dweight)


def _forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, relax: int
) -> tuple[Tensor, Tensor]:
    y, statistics = _forward_fake(x, weight, bias, eps, relax)
    if x.shape[0] > 0:
        peak = x.new_zeros(1, dtype=torch.float32) if RELAX[relax] == "tensor" else None
        parameters = _contiguous(weight), _contiguous(bias)
        torch.ops.cogview_kernels.pb_relax_layer_norm_forward_out(
            x, *parameters, eps, relax, _num_blocks(x), peak, y, statistics
        )
    return y, statistics


def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
    parameters: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dweight, dbias = _backward_fake(dy, x, weight, statistics, parameters)
    if x.shape[0] == 0:
        return dx, dweight.zero_(), dbias.zero_()
    num_blocks, partial = _num_blocks(x), None
    if parameters is not None:
        partial = x.new_empty(2, num_blocks, x.shape[1], dtype=torch.float32)
    torch.ops.cogview_kernels.pb_relax_layer_norm_backward_out(
        _contiguous_rows(dy),
        x,
        _contiguous(weight),
        statistics.contiguous(),
        num_blocks,
        dx,
        partial,
        _wanted(dweight),
        _wanted(dbias),
    )
    return dx, dweight, dbias


def _sandwich(
    f: Tensor, residual: Tensor, final_norm: bool, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    h, z, f_statistics, h_statistics = _sandwich_fake(f, residual, final_norm)
    if f.shape[0] > 0:
        *parameters, seed, dropout, eps, relax = rest
        peaks = f.new_zeros(2, dtype=torch.float32) if RELAX[relax] == "tensor" else None
        torch.ops.cogview_kernels.sandwich_residual_forward_out(
            f,
            residual,
            *map(_contiguous, parameters),
            seed,
            dropout,
            eps,
            relax,
            _num_blocks(f),
            peaks,
            h,
            z if final_norm else None,
            f_statistics,
            h_statistics if final_norm else None,
        )
    return h, z, f_statistics, h_statistics


def _sandwich_backward(
    dh: Tensor, dz: Tensor | None, f: Tensor, h: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    df, dresidual, *gradients = results = _sandwich_backward_fake(dh, dz, f, h, *rest)
    post_weight, pre_weight, f_statistics, h_statistics, seed, dropout, *_ = rest
    if f.shape[0] == 0:
        for gradient in gradients:
            gradient.zero_()
        return results
    num_blocks, partial = _num_blocks(f), None
    if any(gradient.numel() > 0 for gradient in gradients):
        shape = 2 if dz is None else 4, num_blocks, f.shape[1]
        partial = f.new_empty(shape, dtype=torch.float32)
    torch.ops.cogview_kernels.sandwich_residual_backward_out(
        _contiguous_rows(dh),
        None if dz is None else _contiguous_rows(dz),
        f,
        h,
        _contiguous(post_weight),
        _contiguous(pre_weight),
        f_statistics.contiguous(),
        _contiguous(h_statistics),
        seed,
        dropout,
        num_blocks,
        df,
        None if dz is None else dresidual,
        partial,
        *map(_wanted, gradients),
    )
    return results


def _num_blocks(x: Tensor) -> int:
    """Blocks that share the rows; each leaves a partial sum of the parameters' gradients."""
    return min(x.shape[0], extension.num_sms(x.device))


def _wanted(gradient: Tensor) -> Tensor | None:
    return gradient if gradient.numel() > 0 else None


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


def _folded_into_rows(operator: Any, num_inputs: int) -> Any:
    """A forward under vmap: rows that share their parameters and no maximum know nothing of each
    other, so the mapped dimension becomes part of them. Of a seed they know: it counts them."""
    otherwise = _sample_by_sample(operator)

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        inputs, rest = args[:num_inputs], args[num_inputs:]
        seeded = any(isinstance(arg, Tensor) and not arg.is_floating_point() for arg in rest)
        mapped = [dim is not None for dim in in_dims]
        alike = all(mapped[:num_inputs]) and not any(mapped[num_inputs:])
        if not alike or seeded or RELAX[rest[-1]] == "tensor":
            return otherwise(info, in_dims, *args)
        samples = [x.movedim(dim, 0) for x, dim in zip(inputs, in_dims, strict=False)]
        results = operator(*(x.flatten(0, 1) for x in samples), *rest)
        shape = samples[0].shape[:2]
        return tuple(result.unflatten(0, shape) for result in results), (0,) * len(results)

    return rule


def _define(name: str, device: str, function: Any, fake: Any, schema: str) -> Any:
    operator = torch.library.custom_op(
        name, function, mutates_args=(), device_types=device, schema=schema
    )
    operator.register_fake(fake)
    return operator


def _define_norm(name: str, device: str) -> tuple[Any, Any]:
    """The functional operators that call the norm's kernels on tensors of ``device``."""
    forward = _define(
        name,
        device,
        _forward,
        _forward_fake,
        "(Tensor x, Tensor? weight, Tensor? bias, float eps, int relax)"
        " -> (Tensor y, Tensor statistics)",
    )
    backward = _define(
        f"{name}_backward",
        device,
        _backward,
        _backward_fake,
        "(Tensor dy, Tensor x, Tensor? weight, Tensor statistics, ScalarType? parameters)"
        " -> (Tensor dx, Tensor dweight, Tensor dbias)",
    )

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, bias, _, _ = inputs
        _, statistics = output
        ctx.save_for_backward(x, weight, statistics)
        ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)
        ctx.parameters = _dtype_of(weight, bias)

    def gradients(ctx: Any, dy: Tensor, _: None) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad
        parameters = ctx.parameters if any(wanted[1:3]) else None
        results = backward(dy, *ctx.saved_tensors, parameters)
        return *_those(wanted, results), None, None

    forward.register_autograd(gradients, setup_context=setup_context)
    forward.register_vmap(_folded_into_rows(forward, 1))
    backward.register_vmap(_sample_by_sample(backward))
    return forward, backward


def _define_sandwich(name: str, device: str) -> tuple[Any, Any]:
    """The functional operators that call the sandwich's kernels on tensors of ``device``."""
    forward = _define(
        name,
        device,
        _sandwich,
        _sandwich_fake,
        "(Tensor f, Tensor residual, bool final_norm, Tensor? post_weight, Tensor? post_bias, "
        "Tensor? pre_weight, Tensor? pre_bias, Tensor? seed, int dropout, float eps, int relax)"
        " -> (Tensor h, Tensor z, Tensor f_statistics, Tensor h_statistics)",
    )
    backward = _define(
        f"{name}_backward",
        device,
        _sandwich_backward,
        _sandwich_backward_fake,
        "(Tensor dh, Tensor? dz, Tensor f, Tensor? h, Tensor? post_weight, Tensor? pre_weight, "
        "Tensor f_statistics, Tensor? h_statistics, Tensor? seed, int dropout, "
        "ScalarType? post_parameters, ScalarType? pre_parameters) -> (Tensor df, "
        "Tensor dresidual, Tensor dpost_weight, Tensor dpost_bias, Tensor dpre_weight, "
        "Tensor dpre_bias)",
    )

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        f, _, final_norm, *parameters, seed, dropout, _, _ = inputs
        h, z, f_statistics, h_statistics = output
        kept = (h, h_statistics) if final_norm else (None, None)
        ctx.save_for_backward(f, kept[0], parameters[0], parameters[2], f_statistics, kept[1], seed)
        ctx.mark_non_differentiable(f_statistics, h_statistics)
        ctx.set_materialize_grads(False)
        ctx.final_norm, ctx.dropout = final_norm, dropout
        ctx.parameters = _dtype_of(*parameters[:2]), _dtype_of(*parameters[2:])

    def gradients(
        ctx: Any, dh: Tensor | None, dz: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        f, h, post_weight, pre_weight, f_statistics, h_statistics, seed = ctx.saved_tensors
        post_wanted, pre_wanted = ctx.needs_input_grad[3:5], ctx.needs_input_grad[5:7]
        if not ctx.final_norm or dz is None:  # nobody uses z: as if it were not there
            dz = h = pre_weight = h_statistics = None
            pre_wanted = (False, False)
        else:
            dh = _or_zeros(dh, dz)
        post = ctx.parameters[0] if any(post_wanted) else None
        pre = ctx.parameters[1] if any(pre_wanted) else None
        kept = f, h, post_weight, pre_weight, f_statistics, h_statistics, seed
        df, dresidual, *of_parameters = backward(dh, dz, *kept, ctx.dropout, post, pre)
        dresidual = dh if dz is None else dresidual
        of_parameters = _those((*post_wanted, *pre_wanted), of_parameters)
        return df, dresidual, None, *of_parameters, None, None, None, None

    forward.register_autograd(gradients, setup_context=setup_context)
    forward.register_vmap(_folded_into_rows(forward, 2))
    backward.register_vmap(_sample_by_sample(backward))
    return forward, backward


def _or_zeros(gradient: Tensor | None, like: Tensor) -> Tensor:
    """A row of zeros stands for all of them where there is no gradient."""
    if gradient is not None:
        return gradient
    return like.new_zeros(1, like.shape[1]).expand(like.shape)


def _dtype_of(*parameters: Tensor | None) -> torch.dtype | None:
    return next((t.dtype for t in parameters if t is not None), None)


def _those(wanted: tuple[bool, ...], results: Any) -> tuple[Tensor | None, ...]:
    return tuple(t if want else None for want, t in zip(wanted, results, strict=False))


for _name, _define_operators, _cpu_kernels in (
    (
        "pb_relax_layer_norm",
        _define_norm,
        (portable.layer_norm_rows, portable.layer_norm_rows_backward),
    ),
    (
        "sandwich_residual",
        _define_sandwich,
        (portable.sandwich_residual_rows, portable.sandwich_residual_rows_backward),
    ),
):
    _define_operators(f"cogview_kernels::{_name}_host_model", "cpu")
    _operators = _define_operators(f"cogview_kernels::{_name}", "cuda")
    for _custom_op, _cpu_kernel in zip(_operators, _cpu_kernels, strict=True):
        _custom_op.register_kernel("cpu")(_cpu_kernel)

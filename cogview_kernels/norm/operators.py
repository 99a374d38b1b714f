"""The operators behind the norms: schemas, allocation, gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cogview_kernels import extension
from cogview_kernels.norm import portable

RELAX = (None, "row", "tensor")  # numbered as in csrc/pb_relax_layer_norm


def contiguous_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


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
        contiguous_rows(dy),
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
        contiguous_rows(dh),
        None if dz is None else contiguous_rows(dz),
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

"""The operators behind the norms: schemas, allocation, launches, gradients.

They take tensors ``(..., hidden)``, of which the kernels see the rows. What a forward keeps for its
backward are float32 statistics ``(rows, 4)`` of each normalised row, see csrc/pb_relax_layer_norm.

Outputs and workspaces are allocated in Python, so that running out of memory stays
torch.OutOfMemoryError, and by shapes alone, so that a call can be captured in a CUDA graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cogview_kernels import extension
from cogview_kernels.norm import portable
from cogview_kernels.operators import Backward, Operator, define_operator, define_out_operator

RELAX = (None, "row", "tensor")  # numbered as in csrc/pb_relax_layer_norm

_norm_out = define_out_operator(
    "pb_relax_layer_norm_forward_out(Tensor x, Tensor? weight, Tensor? bias, float eps, int relax, "
    "int num_blocks, Tensor(a!)? peak, Tensor(b!) y, Tensor(c!) statistics) -> ()"
)
_norm_backward_out = define_out_operator(
    "pb_relax_layer_norm_backward_out(Tensor dy, Tensor x, Tensor? weight, Tensor statistics, "
    "int num_blocks, Tensor(a!) dx, Tensor(b!)? partial, Tensor(c!)? dweight, Tensor(d!)? dbias) "
    "-> ()"
)
_sandwich_out = define_out_operator(
    "sandwich_residual_forward_out(Tensor f, Tensor residual, Tensor? post_weight, "
    "Tensor? post_bias, Tensor? pre_weight, Tensor? pre_bias, Tensor? seed, int dropout, "
    "float eps, int relax, int num_blocks, Tensor(a!)? peaks, Tensor(b!) h, Tensor(c!)? z, "
    "Tensor(d!) f_statistics, Tensor(e!)? h_statistics) -> ()"
)
_sandwich_backward_out = define_out_operator(
    "sandwich_residual_backward_out(Tensor dh, Tensor? dz, Tensor f, Tensor? h, "
    "Tensor? post_weight, Tensor? pre_weight, Tensor f_statistics, Tensor? h_statistics, "
    "Tensor? seed, int dropout, int num_blocks, Tensor(a!) df, Tensor(b!)? dresidual, "
    "Tensor(c!)? partial, Tensor(d!)? dpost_weight, Tensor(e!)? dpost_bias, "
    "Tensor(f!)? dpre_weight, Tensor(g!)? dpre_bias) -> ()"
)


def contiguous_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _rows(tensor: Tensor) -> Tensor:
    """The rows as the kernels take them: of a matrix, or of any contiguous tensor."""
    if tensor.is_contiguous() and tensor.ndim > 1:
        return tensor
    return _matrix(contiguous_rows(tensor))


def _matrix(tensor: Tensor) -> Tensor:
    return tensor if tensor.ndim == 2 else tensor.reshape(-1, tensor.shape[-1])


def _empty(like: Tensor) -> Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def _num_rows(x: Tensor) -> int:
    return math.prod(x.shape[:-1])


def _num_blocks(num_rows: int, x: Tensor) -> int:
    """Blocks that share the rows."""
    return min(num_rows, extension.num_sms(x.device))


def _num_summing_blocks(
    num_rows: int, x: Tensor, row_bytes: int, *parameters: torch.dtype | None
) -> int:
    """Blocks of a backward that leave partial sums for the parameters of as many norms.

    For each column a block moves ``row_bytes`` of activations for each of its rows, and once bytes
    of its own: of each norm the weight, and two sums, written and read. Those shall be less than
    5 %, and fewer blocks do the work where nine tenths of the multiprocessors suffice for that (60
    rows for each, more or less). At the bandwidth of the memory a backward does not issue in every
    slot, and by the cycle model a tenth more rows for each block take 0 to 2.5 % longer; not so
    beyond 4096 columns (8 %) and with fewer rows (6 %), where all multiprocessors work. A block's
    own bytes are never more than those of 3.4 rows.
    """
    blocks = _num_blocks(num_rows, x)
    block_bytes = sum(2 * 8 + (0 if dtype is None else dtype.itemsize) for dtype in parameters)
    few = num_rows * row_bytes // (20 * block_bytes) - 1  # one less, for the gradients themselves
    if 10 * few >= 9 * blocks and x.shape[-1] <= 4096:
        blocks = min(blocks, few)
    return _ceil_div(num_rows, _ceil_div(num_rows, blocks))  # the busiest has no more rows for it


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _dtype_of(weight: Tensor | None, bias: Tensor | None) -> torch.dtype | None:
    present = bias if weight is None else weight
    return None if present is None else present.dtype


class Affine(NamedTuple):
    """The gradients of a norm's weight and bias; of no elements where none is wanted."""

    weight: Tensor
    bias: Tensor


def _allocate_affine(x: Tensor, weight: Tensor | None, dtype: torch.dtype | None) -> Affine:
    if weight is not None and weight.dtype is dtype:
        dweight = _empty(weight)
    else:
        dweight = x.new_empty(0 if dtype is None else x.shape[-1], dtype=dtype or torch.float32)
    return Affine(dweight, torch.empty_like(dweight))


# pb_relax_layer_norm


def _allocate_norm(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _empty(x), x.new_empty((_num_rows(x), 4), dtype=torch.float32)


def _allocate_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
    parameters: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(x), *_allocate_affine(x, weight, parameters)


def _norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, relax: int
) -> tuple[Tensor, Tensor]:
    y, statistics = _allocate_norm(x)
    num_rows = statistics.shape[0]
    if num_rows > 0:
        peak = x.new_zeros(1, dtype=torch.float32) if RELAX[relax] == "tensor" else None
        _norm_out(
            _rows(x),
            _contiguous(weight),
            _contiguous(bias),
            eps,
            relax,
            _num_blocks(num_rows, x),
            peak,
            _rows(y),
            statistics,
        )
    return y, statistics


def _norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
    parameters: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    dx = _empty(x)
    gradient = _allocate_affine(x, weight, parameters)
    num_rows = statistics.shape[0]
    if num_rows == 0:
        return dx, gradient.weight.zero_(), gradient.bias.zero_()
    num_blocks, partial = _num_blocks(num_rows, x), None
    if parameters is not None:
        num_blocks = _num_summing_blocks(num_rows, x, 3 * x.itemsize, parameters)
        partial = x.new_empty((2, num_blocks, x.shape[-1]), dtype=torch.float32)
    _norm_backward_out(
        _rows(dy),
        _rows(x),
        _contiguous(weight),
        statistics.contiguous(),
        num_blocks,
        _rows(dx),
        partial,
        *(gradient if parameters is not None else (None, None)),
    )
    return dx, *gradient


def _norm_on_the_cpu(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, relax: int
) -> tuple[Tensor, Tensor]:
    y, statistics = portable.layer_norm_rows(_matrix(x), weight, bias, eps, relax)
    return y.view(x.shape), statistics


def _norm_backward_on_the_cpu(dy: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    dx, dweight, dbias = portable.layer_norm_rows_backward(_matrix(dy), _matrix(x), *rest)
    return dx.view(x.shape), dweight, dbias


class _NormSaved(NamedTuple):
    x: Tensor
    weight: Tensor | None
    statistics: Tensor


def _save_norm(
    ctx: Any,
    outputs: tuple[Tensor, Tensor],
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    relax: int,
) -> None:
    _, statistics = outputs
    ctx.save_for_backward(x, weight, statistics)  # _NormSaved
    ctx.set_materialize_grads(False)
    ctx.parameters = _dtype_of(weight, bias)


def _norm_gradients(backward: Operator) -> Callable[..., dict[str, Tensor | None]]:
    def gradients(ctx: Any, wanted: frozenset[str], dy: Tensor) -> dict[str, Tensor | None]:
        weight, bias = "weight" in wanted, "bias" in wanted
        saved = _NormSaved(*ctx.saved_tensors)
        dx, dweight, dbias = backward(dy, *saved, ctx.parameters if weight or bias else None)
        return {"x": dx, "weight": dweight if weight else None, "bias": dbias if bias else None}

    return gradients


# sandwich_residual


def _allocate_sandwich(
    f: Tensor, residual: Tensor, final_norm: bool, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Without the final norm, its results are rows without elements."""
    rows = _num_rows(f)
    h, f_statistics = _empty(residual), f.new_empty((rows, 4), dtype=torch.float32)
    if not final_norm:
        return h, h.new_empty((rows, 0)), f_statistics, f_statistics.new_empty((rows, 0))
    return h, torch.empty_like(h), f_statistics, torch.empty_like(f_statistics)


def _allocate_sandwich_backward(
    dh: Tensor,
    dz: Tensor | None,
    f: Tensor,
    h: Tensor | None,
    post_weight: Tensor | None,
    pre_weight: Tensor | None,
    f_statistics: Tensor,
    h_statistics: Tensor | None,
    seed: Tensor | None,
    dropout: int,
    post_parameters: torch.dtype | None,
    pre_parameters: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Without the final norm, the gradient of residual is dh and not here."""
    dresidual = dh.new_empty((_num_rows(f), 0)) if dz is None else _empty(dh)
    post = _allocate_affine(f, post_weight, post_parameters)
    return _empty(f), dresidual, *post, *_allocate_affine(f, pre_weight, pre_parameters)


def _sandwich(
    f: Tensor,
    residual: Tensor,
    final_norm: bool,
    post_weight: Tensor | None,
    post_bias: Tensor | None,
    pre_weight: Tensor | None,
    pre_bias: Tensor | None,
    seed: Tensor | None,
    dropout: int,
    eps: float,
    relax: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    h, z, f_statistics, h_statistics = _allocate_sandwich(f, residual, final_norm)
    num_rows = f_statistics.shape[0]
    if num_rows > 0:
        peaks = f.new_zeros(2, dtype=torch.float32) if RELAX[relax] == "tensor" else None
        _sandwich_out(
            _rows(f),
            _rows(residual),
            _contiguous(post_weight),
            _contiguous(post_bias),
            _contiguous(pre_weight),
            _contiguous(pre_bias),
            seed,
            dropout,
            eps,
            relax,
            _num_blocks(num_rows, f),
            peaks,
            _rows(h),
            _rows(z) if final_norm else None,
            f_statistics,
            h_statistics if final_norm else None,
        )
    return h, z, f_statistics, h_statistics


def _sandwich_backward(
    dh: Tensor,
    dz: Tensor | None,
    f: Tensor,
    h: Tensor | None,
    post_weight: Tensor | None,
    pre_weight: Tensor | None,
    f_statistics: Tensor,
    h_statistics: Tensor | None,
    seed: Tensor | None,
    dropout: int,
    post_parameters: torch.dtype | None,
    pre_parameters: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    has_z = dz is not None
    num_rows = f_statistics.shape[0]
    df, dresidual = _empty(f), _empty(dh) if has_z else dh.new_empty((num_rows, 0))
    post = _allocate_affine(f, post_weight, post_parameters)
    pre = _allocate_affine(f, pre_weight, pre_parameters)
    if num_rows == 0:
        for gradient in (*post, *pre):
            gradient.zero_()
        return df, dresidual, *post, *pre
    num_blocks, partial = _num_blocks(num_rows, f), None
    if post_parameters is not None or pre_parameters is not None:
        row_bytes = 2 * f.itemsize + (4 if has_z else 1) * dh.itemsize
        norms = (post_parameters, pre_parameters) if has_z else (post_parameters,)
        num_blocks = _num_summing_blocks(num_rows, f, row_bytes, *norms)
        shape = 2 * len(norms), num_blocks, f.shape[-1]
        partial = f.new_empty(shape, dtype=torch.float32)
    _sandwich_backward_out(
        _rows(dh),
        None if dz is None else _rows(dz),
        _rows(f),
        None if h is None else _rows(h),
        _contiguous(post_weight),
        _contiguous(pre_weight),
        f_statistics.contiguous(),
        _contiguous(h_statistics),
        seed,
        dropout,
        num_blocks,
        _rows(df),
        _rows(dresidual) if has_z else None,
        partial,
        *(post if post_parameters is not None else (None, None)),
        *(pre if pre_parameters is not None else (None, None)),
    )
    return df, dresidual, *post, *pre


def _sandwich_on_the_cpu(
    f: Tensor, residual: Tensor, final_norm: bool, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    results = portable.sandwich_residual_rows(_matrix(f), _matrix(residual), final_norm, *rest)
    h, z, f_statistics, h_statistics = results
    return h.view(f.shape), z.view(f.shape) if final_norm else z, f_statistics, h_statistics


def _sandwich_backward_on_the_cpu(
    dh: Tensor, dz: Tensor | None, f: Tensor, h: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:
    df, dresidual, *of_parameters = portable.sandwich_residual_rows_backward(
        _matrix(dh),
        None if dz is None else _matrix(dz),
        _matrix(f),
        None if h is None else _matrix(h),
        *rest,
    )
    dresidual = dresidual if dz is None else dresidual.view(f.shape)
    return df.view(f.shape), dresidual, *of_parameters


class _SandwichSaved(NamedTuple):
    """``h`` and its statistics: with the final norm alone."""

    f: Tensor
    h: Tensor | None
    post_weight: Tensor | None
    pre_weight: Tensor | None
    f_statistics: Tensor
    h_statistics: Tensor | None
    seed: Tensor | None


def _save_sandwich(
    ctx: Any,
    outputs: tuple[Tensor, Tensor, Tensor, Tensor],
    f: Tensor,
    residual: Tensor,
    final_norm: bool,
    post_weight: Tensor | None,
    post_bias: Tensor | None,
    pre_weight: Tensor | None,
    pre_bias: Tensor | None,
    seed: Tensor | None,
    dropout: int,
    eps: float,
    relax: int,
) -> None:
    h, _, f_statistics, h_statistics = outputs
    saved = _SandwichSaved(
        f,
        h if final_norm else None,
        post_weight,
        pre_weight,
        f_statistics,
        h_statistics if final_norm else None,
        seed,
    )
    ctx.save_for_backward(*saved)
    ctx.set_materialize_grads(False)
    ctx.dropout = dropout
    ctx.post_parameters = _dtype_of(post_weight, post_bias)
    ctx.pre_parameters = _dtype_of(pre_weight, pre_bias)


def _sandwich_gradients(backward: Operator) -> Callable[..., dict[str, Tensor | None]]:
    def gradients(
        ctx: Any,
        wanted: frozenset[str],
        dh: Tensor | None,
        dz: Tensor | None,
    ) -> dict[str, Tensor | None]:
        saved = _SandwichSaved(*ctx.saved_tensors)
        if saved.h is None or dz is None:  # nobody uses z: as if it were not there
            dz = None
            saved = saved._replace(h=None, pre_weight=None, h_statistics=None)
            wanted -= {"pre_weight", "pre_bias"}
        elif dh is None:
            # A row of zeros stands for all of them.
            dh = dz.new_zeros(dz.shape[-1]).expand(dz.shape)
        if dh is None:  # only z is used, which has no elements
            return {}
        post_parameters = ctx.post_parameters if wanted & {"post_weight", "post_bias"} else None
        pre_parameters = ctx.pre_parameters if wanted & {"pre_weight", "pre_bias"} else None
        df, dresidual, *of_parameters = backward(
            dh, dz, *saved, ctx.dropout, post_parameters, pre_parameters
        )
        dpost_weight, dpost_bias, dpre_weight, dpre_bias = of_parameters
        return {
            "f": df,
            "residual": dh if dz is None else dresidual,
            "post_weight": dpost_weight if "post_weight" in wanted else None,
            "post_bias": dpost_bias if "post_bias" in wanted else None,
            "pre_weight": dpre_weight if "pre_weight" in wanted else None,
            "pre_bias": dpre_bias if "pre_bias" in wanted else None,
        }

    return gradients


# vmap


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


def _folded_into_rows(num_inputs: int, allocate: Callable[..., Any]) -> Callable[[Any], Any]:
    """The rule for a forward under vmap: rows that share their parameters and no maximum know
    nothing of each other, so the mapped dimension becomes part of them. A dropout seed counts rows,
    so with one each sample is a call of its own."""

    def rule_of(operator: Any) -> Any:
        otherwise = _sample_by_sample(operator)

        def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
            inputs, rest = args[:num_inputs], args[num_inputs:]
            relax = rest[-1]
            seeded = any(isinstance(arg, Tensor) and not arg.is_floating_point() for arg in rest)
            mapped = [dim is not None for dim in in_dims]
            alike = all(mapped[:num_inputs]) and not any(mapped[num_inputs:])
            if not alike or seeded or RELAX[relax] == "tensor":
                return otherwise(info, in_dims, *args)
            samples = [x.movedim(dim, 0) for x, dim in zip(inputs, in_dims, strict=False)]
            of_one = allocate(*(x.new_empty(x.shape[1:]) for x in samples), *rest)
            results = tuple(
                result.view(info.batch_size, *one.shape)
                for result, one in zip(operator(*samples, *rest), of_one, strict=True)
            )
            return results, (0,) * len(results)

        return rule

    return rule_of


def _define_norm(name: str, device: str, on_the_cpu: bool) -> Operator:
    """``on_the_cpu``: portable computes the same on the CPU, where exported programs may run."""
    backward = define_operator(
        f"{name}_backward",
        "(Tensor dy, Tensor x, Tensor? weight, Tensor statistics, ScalarType? parameters)"
        " -> (Tensor dx, Tensor dweight, Tensor dbias)",
        _allocate_norm_backward,
        _norm_backward,
        vmap=_sample_by_sample,
        device=device,
        cpu_kernel=_norm_backward_on_the_cpu if on_the_cpu else None,
    )
    return define_operator(
        name,
        "(Tensor x, Tensor? weight, Tensor? bias, float eps, int relax)"
        " -> (Tensor y, Tensor statistics)",
        _allocate_norm,
        _norm,
        vmap=_folded_into_rows(1, _allocate_norm),
        backward=Backward(1, _save_norm, _norm_gradients(backward)),
        device=device,
        cpu_kernel=_norm_on_the_cpu if on_the_cpu else None,
    )


def _define_sandwich(name: str, device: str, on_the_cpu: bool) -> Operator:
    backward = define_operator(
        f"{name}_backward",
        "(Tensor dh, Tensor? dz, Tensor f, Tensor? h, Tensor? post_weight, Tensor? pre_weight, "
        "Tensor f_statistics, Tensor? h_statistics, Tensor? seed, int dropout, "
        "ScalarType? post_parameters, ScalarType? pre_parameters) -> (Tensor df, "
        "Tensor dresidual, Tensor dpost_weight, Tensor dpost_bias, Tensor dpre_weight, "
        "Tensor dpre_bias)",
        _allocate_sandwich_backward,
        _sandwich_backward,
        vmap=_sample_by_sample,
        device=device,
        cpu_kernel=_sandwich_backward_on_the_cpu if on_the_cpu else None,
    )
    return define_operator(
        name,
        "(Tensor f, Tensor residual, bool final_norm, Tensor? post_weight, Tensor? post_bias, "
        "Tensor? pre_weight, Tensor? pre_bias, Tensor? seed, int dropout, float eps, int relax)"
        " -> (Tensor h, Tensor z, Tensor f_statistics, Tensor h_statistics)",
        _allocate_sandwich,
        _sandwich,
        vmap=_folded_into_rows(2, _allocate_sandwich),
        backward=Backward(2, _save_sandwich, _sandwich_gradients(backward)),
        device=device,
        cpu_kernel=_sandwich_on_the_cpu if on_the_cpu else None,
    )


class Kernels(NamedTuple):
    """The operators that call the kernels."""

    pb_relax_layer_norm: Operator
    sandwich_residual: Operator


CUDA = Kernels(
    _define_norm("pb_relax_layer_norm", "cuda", on_the_cpu=True),
    _define_sandwich("sandwich_residual", "cuda", on_the_cpu=True),
)
HOST_MODEL = Kernels(
    _define_norm("pb_relax_layer_norm_host_model", "cpu", on_the_cpu=False),
    _define_sandwich("sandwich_residual_host_model", "cpu", on_the_cpu=False),
)

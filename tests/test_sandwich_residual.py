"""sandwich_residual: two norms, a residual and dropout in one step."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import refused
from test_pb_relax_layer_norm import DTYPES, IMPLEMENTATIONS, NAN, ONES, RELAX, X, formula
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import cogview_kernels as ck
from cogview.config import ModelConfig
from cogview.model import GPT, Operators
from cogview_kernels import extension
from cogview_kernels.norm import function as norm
from cogview_kernels.norm import portable

OPS = torch.ops.cogview_kernels
KERNELS = IMPLEMENTATIONS[2:]
BACKENDS = ["reference", "portable", *KERNELS]
SEED = 0x0123456789ABCDEF


@pytest.fixture
def fixed_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call draws the same seed, on every device."""
    monkeypatch.setattr(
        norm, "_draw_seed", lambda device, generator: torch.tensor([SEED], device=device)
    )


def sandwich(
    implementation: str,
    f: Tensor,
    residual: Tensor,
    *parameters: Tensor | None,
    eps: float = 1e-5,
    relax: str | None = "row",
    dropout_p: float = 0.0,
    final_norm: bool = True,
) -> tuple[Tensor, ...]:
    """``h`` and, with the final norm, ``z``. No parameters: none of the four."""
    parameters = parameters or (None,) * 4
    if implementation == "operator":
        rows = (t.reshape(-1, t.shape[-1]) for t in (f, residual))
        dropout = round(dropout_p * 65536)
        seed = norm._draw_seed(f.device, None) if dropout else None
        numbers = seed, dropout, eps, RELAX.index(relax)
        h, z, *_ = OPS.sandwich_residual(*rows, final_norm, *parameters, *numbers)
        results = (h, z) if final_norm else (h,)
        return tuple(result.view(f.shape) for result in results)
    device = "cuda" if implementation == "cuda" else "cpu"
    moved = (None if t is None else t.to(device) for t in (f, residual, *parameters))
    settings: dict[str, Any] = {"dropout_p": dropout_p, "final_norm": final_norm}
    results = ck.sandwich_residual(*moved, eps, relax, implementation, **settings)
    return tuple(result.cpu() for result in results if result is not None)


def gradients(results: tuple[Tensor, ...], leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """For upstream gradients that are the same in every dtype and whenever it is called."""
    generator = torch.Generator().manual_seed(3)
    upstream = [torch.randn(r.shape, generator=generator).bfloat16().to(r) for r in results]
    pairs = [(r, dr) for r, dr in zip(results, upstream, strict=True) if r.requires_grad]
    differentiable, upstream = map(list, zip(*pairs, strict=True))
    return torch.autograd.grad(differentiable, leaves, upstream)


def make_leaves(
    *shape: int, dtype: torch.dtype = torch.float32, residual_dtype: torch.dtype | None = None
) -> list[Tensor]:
    f, residual = 3 * torch.randn(2, *shape)
    parameters = torch.randn(4, shape[-1])
    kinds = [dtype, *[residual_dtype or dtype] * 5]
    tensors = zip((f, residual, *parameters), kinds, strict=True)
    return [t.to(kind).requires_grad_() for t, kind in tensors]


# The definition


def definition(
    f: Tensor,
    residual: Tensor,
    *parameters: Tensor | None,
    eps: float,
    relax: str | None,
    dropped: Tensor,
    dropout_p: float,
    rounded_h: Tensor,
) -> tuple[Tensor, Tensor]:
    """In float64; ``z`` is the norm of the ``h`` that was returned."""
    kept = torch.where(dropped, 0.0, f / (1 - dropout_p))
    h = residual + formula(kept, *parameters[:2], eps, relax)
    rounded_h = h + (rounded_h - h).detach()
    return h, formula(rounded_h, *parameters[2:], eps, relax)


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
def test_worked_by_hand(implementation: str) -> None:
    f = torch.tensor([[8.0, 0, -8, 0], [0, 0, 0, 0]])
    residual = torch.tensor([[0.0, 0, 0, 0], [16, 0, -16, 0]])
    post_weight, post_bias = torch.tensor([3.0, 1, 3, 1]), torch.tensor([0.0, 4, 0, -4])
    pre_weight, pre_bias = torch.tensor([1.0, 3, 1, 3]), torch.tensor([1.0, 0, 0, 0])
    # First row: c = 1, var + 4 c^2 = 36, x / sqrt = 4/3, -4/3; all the weighted norm.
    # h: 4, 4, -4, -4 with c = 1/2: var + 4 c^2 = 17. Second row: 16, 4, -16, -4 with c = 2.
    h, z = sandwich(
        implementation, f, residual, post_weight, post_bias, pre_weight, pre_bias, eps=4.0
    )
    torch.testing.assert_close(h, torch.tensor([[4.0, 4, -4, -4], [16, 4, -16, -4]]))
    first, second = 4 / math.sqrt(17), 4 / math.sqrt(136 + 16)
    expected = [[1 + first, 3 * first, -first, -3 * first]]
    expected.append([1 + 4 * second, 3 * second, -4 * second, -3 * second])
    torch.testing.assert_close(z, torch.tensor(expected))


@pytest.mark.thinned
@pytest.mark.usefixtures("fixed_seed")
@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
@pytest.mark.parametrize("relax", RELAX)
@pytest.mark.parametrize(
    "dtype, residual_dtype",
    [
        *((dtype, dtype) for dtype in DTYPES),
        (torch.half, torch.float),
        (torch.bfloat16, torch.float),
    ],
)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_equals_the_definition(
    implementation: str,
    relax: str | None,
    dtype: torch.dtype,
    residual_dtype: torch.dtype,
    dropout_p: float,
) -> None:
    leaves = make_leaves(2, 3, 44, dtype=dtype, residual_dtype=residual_dtype)
    settings: dict[str, Any] = {"eps": 0.1, "relax": relax}
    results = sandwich(implementation, *leaves, **settings, dropout_p=dropout_p)
    assert [t.dtype for t in results] == [residual_dtype] * 2
    assert all(t.shape == leaves[0].shape for t in results)

    dropout = round(dropout_p * 65536)
    dropped = portable.dropout_mask(torch.tensor([SEED]), dropout, leaves[0].shape)
    settings |= {"dropped": dropped, "dropout_p": dropout / 65536}
    wide = [t.detach().double().requires_grad_() for t in leaves]
    truth = definition(*wide, **settings, rounded_h=results[0].detach().double())
    names = ["h", "z", "df", "dresidual", "dpost_weight", "dpost_bias", "dpre_weight", "dpre_bias"]
    actual = (*results, *gradients(results, leaves))
    right = (*truth, *gradients(truth, wide))
    assert [t.dtype for t in actual[2:]] == [t.dtype for t in leaves]
    for name, value, expected in zip(names, actual, right, strict=True):
        # One rounding to the result's dtype; sums of a few dozen float32 numbers. Where autograd
        # composes the gradient, that of h is rounded, too.
        largest, eps = expected.abs().max(), torch.finfo(value.dtype).eps
        bound = 0.51 * eps * expected.abs()
        if name[0] == "d" and implementation in ("reference", "portable"):
            bound = bound + eps * largest
        bound = bound + 64 * torch.finfo(torch.float32).eps * largest
        assert largest > 0.1 and ((value.double() - expected).abs() <= bound).all(), name
    assert torch.equal(actual[2] == 0, dropped)


@pytest.mark.thinned
@pytest.mark.usefixtures("fixed_seed")
@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("hidden", [1, 7, 8, 63, 264, 700, 2056, 4100, 9000])
@pytest.mark.parametrize("num_sms", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_any_width(
    implementation: str,
    hidden: int,
    num_sms: int,
    dtype: torch.dtype,
) -> None:
    """Rows held by parts of a warp, by a block, and too wide for either; shared among blocks."""
    leaves = make_leaves(5, hidden, dtype=dtype, residual_dtype=torch.float32)
    for relax in RELAX:
        settings: dict[str, Any] = {"eps": 0.1, "relax": relax, "dropout_p": 0.3}
        runs = (sandwich(which, *leaves, **settings) for which in (implementation, "reference"))
        with extension.modelled_device(num_sms):
            actual, expected = ((*results, *gradients(results, leaves)) for results in runs)
        for one, two in zip(actual, expected, strict=True):
            rounding = 2 * torch.finfo(one.dtype).eps + 1e-5
            atol = rounding * max(1.0, two.abs().max().item())
            torch.testing.assert_close(one, two, rtol=0, atol=atol)


@pytest.mark.usefixtures("fixed_seed")
@pytest.mark.parametrize("backend", ["reference", "portable"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("final_norm", [True, False])
def test_gradients_are_those_of_the_values(
    backend: str, dropout_p: float, final_norm: bool
) -> None:
    tensors = [t.detach().double().requires_grad_() for t in make_leaves(3, 5)]
    tensors = tensors if final_norm else tensors[:4]

    def run(*tensors: Tensor) -> Any:
        tensors = tensors if final_norm else (*tensors, *(None,) * 2)
        settings: dict[str, Any] = {"dropout_p": dropout_p, "final_norm": final_norm}
        return sandwich(backend, *tensors, eps=0.3, relax=None, **settings)

    assert torch.autograd.gradcheck(run, tensors)
    assert torch.autograd.gradgradcheck(run, tensors)


@pytest.mark.usefixtures("fixed_seed")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_float16_at_the_end_of_the_range(implementation: str, dropout_p: float) -> None:
    """Sandwich-LN's point: whatever the branch returns, what is added to the residual is small.
    Divided by 1 - dropout_p, the branch would be infinite."""
    f = (torch.randn(4, 32).sign() * 65504).half().requires_grad_()
    residual = torch.randn(4, 32).half().requires_grad_()
    for relax in RELAX:
        h, z = sandwich(implementation, f, residual, relax=relax, dropout_p=dropout_p)
        assert h.abs().max() < 10 and z.abs().max() < 10
        loss = h.float().sum() + z.float().square().sum()
        for gradient in torch.autograd.grad(loss, (f, residual)):
            assert gradient.isfinite().all()


# Dropout


def philox_by_hand(counter: list[int], key: list[int]) -> list[int]:
    for _ in range(10):
        first, second = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            second >> 32 ^ counter[1] ^ key[0],
            second % 2**32,
            first >> 32 ^ counter[3] ^ key[1],
            first % 2**32,
        ]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return counter


@pytest.mark.parametrize(
    "counter, key, words",
    [
        ("00000000 " * 4, "00000000 " * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            "243f6a88 85a308d3 13198a2e 03707344",
            "a4093822 299f31d0",
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_published_words(counter: str, key: str, words: str) -> None:
    """The known answers of Random123, where Philox comes from."""
    numbers = [[int(word, 16) for word in text.split()] for text in (counter, key, words)]
    assert philox_by_hand(*numbers[:2]) == numbers[2]
    of_tensors = portable.philox4x32(*(tuple(map(torch.tensor, part)) for part in numbers[:2]))
    assert [word.item() for word in of_tensors] == numbers[2]


@pytest.mark.parametrize("shape", [(2, 3, 21), (4, 8), (1,), (0, 5)])
@pytest.mark.parametrize("seed", [0, SEED, 2**63 - 1, -1])
@pytest.mark.parametrize("dropout", [1, 20000, 65536])
def test_the_mask_is_its_definition(shape: tuple[int, ...], seed: int, dropout: int) -> None:
    key = [seed % 2**32, seed // 2**32 % 2**32]

    def dropped(row: int, column: int) -> bool:
        words = philox_by_hand([column // 8, row % 2**32, row // 2**32, 0], key)
        half = column % 8
        return (words[half // 2] >> 16 * (half % 2)) % 2**16 < dropout

    expected = [
        dropped(*place) for place in torch.ones(shape).reshape(-1, shape[-1]).nonzero().tolist()
    ]
    mask = portable.dropout_mask(torch.tensor([seed]), dropout, torch.Size(shape))
    assert mask.shape == shape and mask.dtype == torch.bool
    assert mask.flatten().tolist() == expected


def test_elements_are_dropped_independently() -> None:
    rows, hidden, dropout_p = 2000, 100, 0.1
    mask = portable.dropout_mask(
        torch.tensor([SEED]), round(dropout_p * 65536), torch.Size((rows, hidden))
    ).double()
    other = portable.dropout_mask(
        torch.tensor([SEED + 1]), round(dropout_p * 65536), torch.Size((rows, hidden))
    ).double()
    deviation = math.sqrt(dropout_p * (1 - dropout_p))
    assert (mask.mean() - dropout_p).abs() < 5 * deviation / math.sqrt(rows * hidden)
    assert ((mask.mean(0) - dropout_p).abs() < 5 * deviation / math.sqrt(rows)).all()
    assert ((mask.mean(1) - dropout_p).abs() < 6 * deviation / math.sqrt(hidden)).all()
    noise = (mask - dropout_p) / deviation
    for one, two in ((noise[:, 1:], noise[:, :-1]), (noise[1:], noise[:-1])):
        assert (one * two).mean().abs() < 5 / math.sqrt(rows * hidden), "neighbours"
    both = (noise * (other - dropout_p) / deviation).mean()
    assert both.abs() < 5 / math.sqrt(rows * hidden), "neighbouring seeds"


def dropped_by(implementation: str, f: Tensor, **settings: Any) -> Tensor:
    """Where the gradient of ``f`` is zero."""
    f = f.detach().requires_grad_()
    results = sandwich(implementation, f, torch.zeros_like(f), **settings)
    return gradients(results, [f])[0] == 0


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
def test_torch_seeds_the_dropout(implementation: str) -> None:
    f = torch.randn(5, 4, 40)
    draw = functools.partial(dropped_by, implementation, f, dropout_p=0.25)
    torch.manual_seed(7)
    first, second = draw(), draw()
    torch.manual_seed(7)
    assert torch.equal(draw(), first) and torch.equal(draw(), second)
    assert not torch.equal(first, second), "drawn anew for each call"
    assert 0.15 < first.double().mean() < 0.35
    torch.manual_seed(8)
    assert not torch.equal(draw(), first)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_generator_seeds_the_dropout(backend: str) -> None:
    device = "cuda" if backend == "cuda" else "cpu"
    f = torch.randn(5, 40, device=device)

    def draw(generator: torch.Generator) -> Tensor:
        state = torch.get_rng_state()
        h, _ = ck.sandwich_residual(
            f, f, None, None, None, None, backend=backend, dropout_p=0.5, generator=generator
        )
        assert torch.equal(torch.get_rng_state(), state), "torch's own is not touched"
        return h

    one, other = (torch.Generator(device).manual_seed(seed) for seed in (1, 1))
    first = draw(one)
    assert torch.equal(first, draw(other)) and not torch.equal(first, draw(one))


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_dropout_nothing_is_drawn(backend: str) -> None:
    x, state = torch.randn(3, 8), torch.get_rng_state()
    for dropout_p in (0.0, 2.0**-18):  # the second is no step of the probability
        h, z = sandwich(backend, x, x, dropout_p=dropout_p)
        plain = sandwich(backend, x, x)
        assert torch.equal(h, plain[0]) and torch.equal(z, plain[1])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
@pytest.mark.parametrize("relax", RELAX)
def test_everything_is_dropped(implementation: str, relax: str | None) -> None:
    leaves = make_leaves(3, 12)
    results = sandwich(implementation, *leaves, relax=relax, dropout_p=1.0)
    torch.testing.assert_close(results[0], leaves[1] + leaves[3])
    df, dresidual, dpost_weight, *others = gradients(results, leaves)
    assert not df.any() and not dpost_weight.any()
    assert all(t.isfinite().all() and t.any() for t in (dresidual, *others))


@pytest.mark.usefixtures("fixed_seed")
@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
def test_what_is_dropped_does_not_matter(implementation: str) -> None:
    """Not even NaN; and the largest magnitude is one of what is left."""
    leaves = make_leaves(4, 24)
    dropped = portable.dropout_mask(torch.tensor([SEED]), 32768, leaves[0].shape)
    for relax in RELAX:
        run = functools.partial(sandwich, implementation, relax=relax, dropout_p=0.5)
        results = run(*leaves)
        expected = (*results, *gradients(results, leaves))
        for value in (math.nan, math.inf, 1e30):
            f = leaves[0].detach().masked_fill(dropped, value).requires_grad_()
            changed = [f, *leaves[1:]]
            results = run(*changed)
            assert all(map(torch.equal, (*results, *gradients(results, changed)), expected))


# Properties


@pytest.mark.usefixtures("fixed_seed")
@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
@pytest.mark.parametrize("relax", RELAX)
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_without_the_final_norm(implementation: str, relax: str | None, dropout_p: float) -> None:
    leaves = make_leaves(3, 24, dtype=torch.float16, residual_dtype=torch.float32)
    run = functools.partial(sandwich, implementation, relax=relax, dropout_p=dropout_p)
    h, _ = run(*leaves)
    (alone,) = run(*leaves[:4], None, None, final_norm=False)
    assert torch.equal(alone, h)
    dh = torch.randn_like(h)
    pairs = (torch.autograd.grad(result, leaves[:4], dh) for result in (alone, h))
    for one, two in zip(*pairs, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)
        assert one.dtype == two.dtype and one.any()


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
def test_parameters_that_nothing_depends_on_have_no_gradient(implementation: str) -> None:
    """None, not zeros, which an optimizer with momentum or weight decay would take for one."""
    leaves = make_leaves(3, 40)
    h, _ = sandwich(implementation, *leaves)
    *found, weight, bias = torch.autograd.grad(h.sum(), leaves, allow_unused=True)
    assert weight is None and bias is None
    assert all(gradient is not None for gradient in found)
    torch.testing.assert_close(found[1], torch.ones(3, 40))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_either_result_may_go_without_a_gradient(implementation: str) -> None:
    leaves = make_leaves(3, 24)
    results = sandwich(implementation, *leaves)
    dh, dz = torch.randn(2, 3, 24)
    grad = functools.partial(
        torch.autograd.grad, inputs=leaves, retain_graph=True, materialize_grads=True
    )
    parts = grad(results[0], grad_outputs=dh), grad(results[1], grad_outputs=dz)
    both = grad(results, grad_outputs=(dh, dz))
    for one, two, total in zip(*parts, both, strict=True):
        torch.testing.assert_close(one + two, total, rtol=1e-4, atol=1e-4)
    assert not parts[0][4].any() and parts[1][4].any(), "h does not depend on pre_weight"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("wanted", [(0,), (1,), (2, 4), (3,), (5,), (0, 1)])
def test_gradients_that_are_wanted(implementation: str, wanted: tuple[int, ...]) -> None:
    leaves = make_leaves(3, 24)
    expected = gradients(sandwich(implementation, *leaves), leaves)
    some = [t.detach().requires_grad_(n in wanted) for n, t in enumerate(leaves)]
    actual = gradients(sandwich(implementation, *some), [some[n] for n in wanted])
    assert all(torch.equal(t, expected[n]) for t, n in zip(actual, wanted, strict=True))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("given", ["0011", "1100", "1000", "0001", "0000", "0110"])
def test_any_parameter_may_be_missing(implementation: str, given: str) -> None:
    leaves = make_leaves(3, 24)
    parameters = [t if one == "1" else None for t, one in zip(leaves[2:], given, strict=True)]
    some = [*leaves[:2], *(t for t in parameters if t is not None)]
    runs = (sandwich(which, *leaves[:2], *parameters) for which in (implementation, "reference"))
    actual, expected = ((*results, *gradients(results, some)) for results in runs)
    for one, two in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


@pytest.mark.thinned
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("relax", RELAX)
@pytest.mark.parametrize("place", ["f", "residual"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_poison_lands_where_the_reference_has_it(
    implementation: str, relax: str | None, place: str, value: float
) -> None:
    f, residual = torch.randn(2, 4, 9)
    (f if place == "f" else residual)[2, 3] = value
    right = sandwich("reference", f, residual, relax=relax)
    for one, two in zip(sandwich(implementation, f, residual, relax=relax), right, strict=True):
        torch.testing.assert_close(one, two, equal_nan=True)


@pytest.mark.usefixtures("fixed_seed")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("relax", RELAX)
def test_runs_are_bitwise_equal(implementation: str, relax: str | None) -> None:
    leaves = make_leaves(50, 33)
    runs = (sandwich(implementation, *leaves, relax=relax, dropout_p=0.1) for _ in range(2))
    one, two = ((*results, *gradients(results, leaves)) for results in runs)
    assert all(map(torch.equal, one, two))


@pytest.mark.usefixtures("fixed_seed")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("relax", RELAX)
def test_strides_do_not_matter(implementation: str, relax: str | None) -> None:
    wide, parameters = torch.randn(2, 3, 4, 8), list(torch.randn(4, 6))

    def run(f: Tensor, residual: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in (f, residual, *parameters)]
        results = sandwich(implementation, *leaves, relax=relax, dropout_p=0.3)
        return (*results, *torch.autograd.grad(results, leaves, (upstream, 2 * upstream)))

    for view in (
        lambda t: t[:, :, 1:7],
        lambda t: t.transpose(0, 1)[:, :, :6],
        lambda t: t[:1, :1, :6].expand(3, 4, 6),
    ):
        f, residual = map(view, wide)
        for upstream in (
            torch.randn(1).expand(f.shape),
            torch.randn(f.shape[::-1]).permute(2, 1, 0),
        ):
            views = run(f, residual, upstream)
            copies = run(f.contiguous(), residual.contiguous(), upstream.contiguous())
            for one, two in zip(views, copies, strict=True):
                torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)


@pytest.mark.thinned
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("relax", RELAX)
@pytest.mark.parametrize("shape", [(6,), (2, 1, 3, 6), (0, 6), (2, 0, 6), (3, 1)])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_any_number_of_rows(
    backend: str, relax: str | None, shape: tuple[int, ...], dropout_p: float
) -> None:
    leaves = make_leaves(*shape)
    results = sandwich(backend, *leaves, relax=relax, dropout_p=dropout_p)
    assert all(t.shape == shape for t in results)
    each = gradients(results, leaves)
    assert all(t.shape == leaf.shape for t, leaf in zip(each, leaves, strict=True))
    if math.prod(shape) == 0:
        assert not any(t.any() for t in each)
    (h,) = sandwich(backend, *leaves[:4], None, None, dropout_p=dropout_p, final_norm=False)
    assert all(t.isfinite().all() for t in (h, *results, *gradients((h,), leaves[:4])))


# What PyTorch asks of the operators


def operator(name: str, backend: str) -> Any:
    host_model = "_host_model" if backend == "host_model" else ""
    return getattr(OPS, name.replace("residual", f"residual{host_model}")).default


@pytest.mark.thinned
@pytest.mark.parametrize("backend", ["portable", *KERNELS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("relax", [0, 1, 2])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("final_norm", [True, False])
@pytest.mark.parametrize("dropout", [0, 20000])
def test_opcheck(
    backend: str, dtype: torch.dtype, relax: int, affine: bool, final_norm: bool, dropout: int
) -> None:
    """``portable``: what computes these operators on the CPU."""
    forward, backward = (
        operator(name, backend) for name in ("sandwich_residual", "sandwich_residual_backward")
    )
    device = "cuda" if backend == "cuda" else "cpu"
    f, residual, *parameters = (
        t.detach().to(device).requires_grad_()
        for t in make_leaves(5, 12, dtype=dtype, residual_dtype=torch.float32)
    )
    parameters = [t if affine and (final_norm or n < 2) else None for n, t in enumerate(parameters)]
    seed = torch.tensor([SEED], device=device) if dropout else None
    arguments = f, residual, final_norm, *parameters, seed, dropout, 1e-5, relax
    torch.library.opcheck(forward, arguments)
    with torch.no_grad():
        h, z, f_statistics, h_statistics = forward(*arguments)
    final = (z, h, h_statistics) if final_norm else (None, None, None)
    weights = [None if t is None else t.detach() for t in (parameters[0], parameters[2])]
    kinds = torch.float32 if affine else None, torch.float32 if affine and final_norm else None
    torch.library.opcheck(
        backward,
        (
            h,
            final[0],
            f.detach(),
            final[1],
            *weights,
            f_statistics,
            final[2],
            seed,
            dropout,
            *kinds,
        ),
    )


class Branch(nn.Module):
    """Two sub-layers in a row, as in a transformer."""

    def __init__(self, backend: str, dropout_p: float) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.norms = nn.ModuleList(ck.PBRelaxLayerNorm(16) for _ in range(3))
        self.settings: dict[str, Any] = {"backend": backend, "dropout_p": dropout_p}

    def forward(self, x: Tensor) -> Tensor:
        post, pre, last = ((norm.weight, norm.bias) for norm in self.norms)
        h, z = ck.sandwich_residual(self.linear(x), x, *post, *pre, **self.settings)
        none = None, None
        h, _ = ck.sandwich_residual(
            self.linear(z), h, *last, *none, final_norm=False, **self.settings
        )
        return h


def make_branch(backend: str, dropout_p: float) -> tuple[Branch, Tensor]:
    device = "cuda" if backend == "cuda" else "cpu"
    return Branch(backend, dropout_p).to(device), torch.randn(3, 5, 16, device=device)


def run_branch(function: Callable[[Tensor], Any], module: nn.Module, x: Tensor) -> list[Tensor]:
    leaf = x.detach().requires_grad_()
    y = function(leaf)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [leaf, *module.parameters()])]


@pytest.mark.parametrize("backend", ["portable", *KERNELS])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_drops_the_same_again(backend: str, use_reentrant: bool) -> None:
    module, x = make_branch(backend, 0.5)
    results = []
    for function in (module, functools.partial(checkpoint, module, use_reentrant=use_reentrant)):
        torch.manual_seed(5)
        leaf = x.detach().requires_grad_()
        y = function(leaf)
        y.square().sum().backward()
        results.append([y.detach(), leaf.grad, *(p.grad for p in module.parameters())])
        module.zero_grad()
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize(
    "backend, compiler",
    [
        ("portable", "aot_eager"),
        pytest.param("portable", "inductor", marks=pytest.mark.slow),
        *(
            pytest.param(*kernel.values, compiler, marks=kernel.marks)
            for kernel in KERNELS
            for compiler in ("aot_eager", "inductor")
        ),
    ],
)
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_compile_in_one_graph(backend: str, compiler: str, dropout_p: float) -> None:
    """With dropout, the seed is drawn inside the graph."""
    torch.compiler.reset()  # compilations of one function are limited, over all tests
    module, x = make_branch(backend, dropout_p)
    with torch.compiler.config.patch(force_disable_caches=True):
        with torch._inductor.config.patch(fallback_random=True):
            compiled = torch.compile(module, backend=compiler, fullgraph=True)
            # The second time with a dynamic batch size; inductor takes long over Philox's rounds.
            for batch in (3, 2) if compiler == "aot_eager" else (3,):
                x = x[:batch]
                torch.manual_seed(5)
                expected = run_branch(module, module, x)
                torch.manual_seed(5)
                actual = run_branch(compiled, module, x)
                for one, two in zip(actual, expected, strict=True):
                    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
                if dropout_p:
                    assert not torch.equal(compiled(x), actual[0]), "drawn anew"


@pytest.mark.parametrize("backend", ["portable", *KERNELS])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_export(backend: str, dropout_p: float) -> None:
    module, x = make_branch(backend, dropout_p)
    batch = torch.export.Dim("batch", max=64)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: batch},)).module()
    for size in (2, 5):
        x = torch.randn(size, 5, 16, device=x.device)
        torch.manual_seed(5)
        expected = module(x)
        torch.manual_seed(5)
        actual = program(x)
        torch.testing.assert_close(actual, expected)
        assert torch.equal(program(x), actual) == (dropout_p == 0)


@pytest.mark.thinned
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("relax", RELAX)
@pytest.mark.parametrize(
    "in_dims", [(0, 0, None), (1, 0, None), (0, None, None), (0, 0, 0), (None, None, 1)]
)
@pytest.mark.parametrize("final_norm", [True, False])
def test_vmap(
    backend: str, relax: str | None, in_dims: tuple[int | None, ...], final_norm: bool
) -> None:
    device = "cuda" if backend == "cuda" else "cpu"

    def run(f: Tensor, residual: Tensor, weight: Tensor) -> Any:
        pre = weight if final_norm else None
        results = ck.sandwich_residual(
            f, residual, weight, weight, pre, pre, 1e-5, relax, backend, final_norm=final_norm
        )
        return results if final_norm else results[0]

    # Samples of different magnitude, so that one maximum over all of them would be seen.
    magnitude = torch.tensor([1.0, 4.0, 1e3], device=device).view(3, 1, 1)
    full = *(torch.randn(2, 3, 4, 16, device=device) * magnitude), torch.randn(3, 16, device=device)
    mapped, samples = [], []
    for part, dim in zip(full, in_dims, strict=True):
        mapped.append(part[0] if dim is None else part.movedim(0, dim).contiguous())
        samples.append(part[:1].expand_as(part) if dim is None else part)
    batched = torch.func.vmap(run, in_dims)(*mapped)
    each = [run(*sample) for sample in zip(*samples, strict=True)]
    each = list(zip(*each, strict=True)) if final_norm else [each]
    for one, many in zip(batched if final_norm else [batched], each, strict=True):
        torch.testing.assert_close(one, torch.stack(list(many)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_vmap_with_dropout(backend: str) -> None:
    device = "cuda" if backend == "cuda" else "cpu"
    f = torch.randn(4, 16, device=device).expand(3, 4, 16)

    def run(f: Tensor) -> Tensor:
        none = (None,) * 4
        return ck.sandwich_residual(f, f, *none, backend=backend, dropout_p=0.5)[0]

    same, different = (
        torch.func.vmap(run, randomness=randomness)(f) for randomness in ("same", "different")
    )
    assert torch.equal(same[0], same[1]) and torch.equal(same[0], same[2])
    assert not torch.equal(different[0], different[1])
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(run)(f)


@pytest.mark.parametrize("backend", ["portable", *KERNELS])
def test_vmap_of_the_gradient(backend: str) -> None:
    device = "cuda" if backend == "cuda" else "cpu"
    leaves = [t.detach().to(device).requires_grad_() for t in make_leaves(5, 16)]
    results = ck.sandwich_residual(*leaves, backend=backend, dropout_p=0.5)

    def grad(upstream: Tensor) -> Any:
        return torch.autograd.grad(results, leaves, tuple(upstream), retain_graph=True)

    upstream = torch.randn(3, 2, 5, 16, device=device)
    batched = torch.func.vmap(grad)(upstream)
    for one, many in zip(batched, zip(*map(grad, upstream), strict=True), strict=True):
        torch.testing.assert_close(one, torch.stack(many), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "portable"])
@pytest.mark.parametrize("relax", RELAX)
def test_gradients_of_each_sample(backend: str, relax: str | None) -> None:
    """torch.func.grad takes no custom operators, so that the kernels are not asked."""
    f, residual, *parameters = (t.detach() for t in make_leaves(3, 5, 16))

    def loss(f: Tensor, residual: Tensor, *parameters: Tensor) -> Tensor:
        h, z = ck.sandwich_residual(f, residual, *parameters, relax=relax, backend=backend)
        return (h * z.sin()).sum()

    differentiate = torch.func.grad(loss, argnums=tuple(range(6)))
    batched = torch.func.vmap(differentiate, (0, 0, None, None, None, None))
    each = [differentiate(*sample, *parameters) for sample in zip(f, residual, strict=True)]
    for one, many in zip(batched(f, residual, *parameters), zip(*each, strict=True), strict=True):
        torch.testing.assert_close(one, torch.stack(many), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivatives(backend: str) -> None:
    device = "cuda" if backend == "cuda" else "cpu"
    leaves = [t.detach().to(device).requires_grad_() for t in make_leaves(3, 8)]
    h, z = ck.sandwich_residual(*leaves, backend=backend)
    (df,) = torch.autograd.grad((h * z).sum(), leaves[:1], create_graph=True)
    if backend in ("reference", "portable"):
        assert torch.autograd.grad(df.square().sum(), leaves[1])[0].abs().max() > 0
    else:
        with pytest.raises(RuntimeError, match="sandwich_residual.*_backward.*no autograd"):
            torch.autograd.grad(df.square().sum(), leaves[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("index", range(6))
def test_forward_mode(backend: str, index: int) -> None:
    """A derivative, or an error that names the tensor: never a zero."""
    device = "cuda" if backend == "cuda" else "cpu"
    tensors = [t.detach().to(device) for t in make_leaves(3, 8)]
    name = ("f", "residual", "post_weight", "post_bias", "pre_weight", "pre_bias")[index]

    def call(tensor: Tensor) -> Any:
        changed = [*tensors[:index], tensor, *tensors[index + 1 :]]
        return ck.sandwich_residual(*changed, backend=backend, dropout_p=0.2)[1]

    arguments = (tensors[index],), (torch.randn_like(tensors[index]),)
    if backend in ("reference", "portable"):
        assert torch.func.jvp(call, *arguments)[1].abs().max() > 0
    else:
        with pytest.raises(NotImplementedError, match=f"^{name}: expected no tangent"):
            torch.func.jvp(call, *arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing(backend: str) -> None:
    """Both norms compute in the dtypes that come: statistics are float32 without a cast."""
    leaves = make_leaves(3, 16, dtype=torch.bfloat16, residual_dtype=torch.float32)
    leaves = [t.detach().to("cuda" if backend == "cuda" else "cpu") for t in leaves]
    expected = ck.sandwich_residual(*leaves, backend=backend)
    with torch.autocast(leaves[0].device.type, torch.float16):
        actual = ck.sandwich_residual(*leaves, backend=backend)
    assert all(map(torch.equal, actual, expected))
    assert [t.dtype for t in actual] == [torch.float32] * 2


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("relax", RELAX)
def test_the_operator_on_the_cpu_computes_the_same(backend: str, relax: str | None) -> None:
    """A program exported from a GPU, run on a CPU: what its operators exchange means the same to
    both, so that the backward of one takes the statistics of the other."""
    device = "cuda" if backend == "cuda" else "cpu"
    tensors = [t.detach() for t in make_leaves(5, 24, dtype=torch.float16)]
    numbers = torch.tensor([SEED]), 20000, 1e-5, RELAX.index(relax)

    def there(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    arguments = *tensors[:2], True, *tensors[2:], *numbers
    h, z, f_statistics, h_statistics = OPS.sandwich_residual(*arguments)
    results = operator("sandwich_residual", backend)(*map(there, arguments))
    for one, two in ((h, results[0]), (z, results[1])):
        torch.testing.assert_close(one, two.cpu(), rtol=2e-3, atol=4e-3)
    kinds = torch.float16, torch.float16
    given = [h, z, tensors[0], h, tensors[2], tensors[4]]
    expected = OPS.sandwich_residual_backward(
        *given, f_statistics, h_statistics, *numbers[:2], *kinds
    )
    statistics = [t.cpu() for t in results[2:]]
    swapped = OPS.sandwich_residual_backward(*given, *statistics, *numbers[:2], *kinds)
    other = operator("sandwich_residual_backward", backend)(
        *map(there, (*given, f_statistics, h_statistics, *numbers[:2])), *kinds
    )
    for right, one, two in zip(expected, swapped, other, strict=True):
        torch.testing.assert_close(one, right, rtol=2e-3, atol=4e-3)
        torch.testing.assert_close(two.cpu(), right, rtol=2e-3, atol=4e-3)


# CogView


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_cogview_trains_alike(backend: str, dropout: float) -> None:
    """The same losses, step by step, whether its norms run on the kernels or on plain PyTorch."""
    config = ModelConfig(
        num_layers=2,
        hidden_size=32,
        num_heads=2,
        max_positions=16,
        dropout=dropout,
        attention="dense",
    )
    device = "cuda" if backend == "cuda" else "cpu"
    tokens = torch.randint(24, (2, 17), device=device)
    positions = torch.arange(16, device=device).expand(2, -1)

    def train(which: str) -> Tensor:
        operators = Operators(
            layer_norm=functools.partial(ck.pb_relax_layer_norm, backend=which),
            sandwich_residual=functools.partial(ck.sandwich_residual, backend=which),
        )
        torch.manual_seed(1)
        model = GPT(config, 24, operators).to(device)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        losses = []
        for _ in range(24):
            logits = model.logits(model(tokens[:, :-1], positions, [None] * config.num_layers))
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses)

    expected, actual = train("portable"), train(backend)
    assert expected[-1] < expected[0] / 2, "it learns"
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


# Bad input


@pytest.mark.parametrize(
    "arguments, error, match",
    [
        ({"f": X.int()}, TypeError, "f: expected float64"),
        ({"residual": None}, TypeError, "residual: expected a tensor"),
        ({"residual": X[:2]}, ValueError, r"residual: expected \(3, 4\) as f, got \(2, 4\)"),
        ({"residual": X.half()}, TypeError, "residual: expected dtype torch.float32.*float16"),
        ({"residual": X.to("meta")}, ValueError, "residual: expected device cpu as f, got meta"),
        ({"residual": torch.randn(4, 3).t()}, ValueError, "residual: expected a contiguous last"),
        ({"post_weight": ONES[:2]}, ValueError, r"post_weight: expected \(4,\).*\(2,\)"),
        ({"post_bias": NAN}, ValueError, "post_bias: expected numbers, got NaN"),
        ({"pre_weight": ONES.double()}, TypeError, "pre_weight: expected a tensor of dtype"),
        ({"pre_bias": ONES[:2]}, ValueError, r"pre_bias: expected \(4,\)"),
        ({"eps": 0}, ValueError, "eps: expected at least"),
        ({"relax": "no"}, ValueError, "relax: expected one of"),
        ({"backend": "no"}, ValueError, "backend: expected one of"),
        ({"dropout_p": -0.1}, ValueError, "dropout_p: expected a probability, got -0.1"),
        ({"dropout_p": 1.01}, ValueError, "dropout_p: expected a probability, got 1.01"),
        ({"dropout_p": math.nan}, ValueError, "dropout_p: expected .*finite.*got nan"),
        ({"dropout_p": True}, TypeError, "dropout_p: expected a float, got bool"),
        ({"final_norm": None}, ValueError, "final_norm: expected one of .*got None"),
        ({"final_norm": False}, ValueError, r"pre_weight: expected None without.*tensor \(4,\)"),
        (
            {"final_norm": False, "pre_weight": None},
            ValueError,
            "pre_bias: expected None without final_norm, got a float32 tensor",
        ),
        ({"generator": 3}, TypeError, "generator: expected a torch.Generator, got int 3"),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_bad_input_is_named(
    arguments: dict[str, Any], error: type[Exception], match: str, backend: str
) -> None:
    names = ("post_weight", "post_bias", "pre_weight", "pre_bias")
    good: dict[str, Any] = {"f": X, "residual": X, "backend": backend, **dict.fromkeys(names, ONES)}
    ck.sandwich_residual(**good)
    with refused(error, match):
        ck.sandwich_residual(**{**good, **arguments})


def test_a_generator_of_another_device_is_named() -> None:
    f = torch.randn(2, 4, device="meta")
    with pytest.raises(ValueError, match="generator: expected device meta as f, got cpu"):
        ck.sandwich_residual(f, f, None, None, None, None, generator=torch.Generator())

"""The suite's training steps compute what they declare, and train."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

import cogview.model
import cogview_kernels as ck
from benchmarks.suite import norms as norm_methods
from benchmarks.suite import steps as step_methods
from benchmarks.suite.cases import StepCase
from benchmarks.suite.methods import Method
from benchmarks.suite.steps import (
    SETTINGS,
    STEP_METHODS,
    Training,
    definitions,
    reference_losses,
)
from cogview_kernels import extension

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CASE = StepCase(
    num_layers=2,
    hidden_size=32,
    num_heads=2,
    batch=2,
    image_len=58,
    query_window=8,
    key_window_times=2,
    num_pivots=6,
    text_len=6,
    vocab_size=50,
    dtype="float32",
)
HALF = StepCase(**{**vars(CASE), "dtype": "bfloat16"})
TOLERANCE = {"float32": 1e-6, "bfloat16": 2e-3}  # relative error in norm, of the losses

of_methods = pytest.mark.parametrize("method", STEP_METHODS, ids=lambda method: method.name)
of_those_that_compile = pytest.mark.parametrize(
    "method", [m for m in STEP_METHODS if m.compiles], ids=lambda method: method.name
)


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Training, "compile", lambda training: None)


def error(training: Training, computes: str) -> float:
    """Relative error of the last step's losses against the definitions."""
    expected = reference_losses(training.case, computes, CPU)
    assert expected.dtype == torch.float64
    return float((training.losses - expected).norm() / expected.norm())


@pytest.mark.parametrize("case", [CASE, HALF], ids=lambda case: case.dtype)
@of_methods
def test_the_first_step_matches_the_definitions(
    uncompiled: None, method: Method, case: StepCase
) -> None:
    training = method.prepare(case, None, CPU)
    loss = training()
    assert loss.shape == () and torch.equal(loss, training.losses.mean())
    assert training.losses.shape == (case.tokens,) and training.losses.dtype == torch.float32
    assert error(training, method.computes) < TOLERANCE[case.dtype]
    assert error(training, method.computes) > 1e-5 or case is CASE, "not in half precision"
    assert abs(float(loss) / float(reference_losses(case, method.computes, CPU).mean()) - 1) < 1e-4
    for other in SETTINGS.keys() - {method.computes}:
        assert error(training, other) > 3 * TOLERANCE[case.dtype]


@of_methods
def test_gradients_match_the_definitions(uncompiled: None, method: Method) -> None:
    training = method.prepare(CASE, None, CPU)
    exact = Training(CASE, method.computes, definitions(), CPU)
    exact.model.double()
    for one in (training, exact):
        one.forward().mean().backward()
    for (name, parameter), right in zip(
        training.model.named_parameters(), exact.model.parameters(), strict=True
    ):
        assert parameter.grad is not None and right.grad is not None, name
        assert right.grad.count_nonzero() > 0, name
        assert (parameter.grad - right.grad).norm() < 1e-5 * right.grad.norm(), name


def test_a_step_s_loss_and_gradients_are_its_own() -> None:
    """Each token is predicted from those before it; gradients of earlier steps are cleared."""
    (method,) = (m for m in STEP_METHODS if m.name == "dense SDPA")
    training = method.prepare(CASE, None, CPU)
    training.optimizer.param_groups[0]["lr"] = 0.0  # every step repeats the first
    tokens, model = training.tokens, training.model
    z = model(tokens[:, :-1], training.positions, [None] * CASE.num_layers)
    scores = model.logits(z).log_softmax(-1).gather(2, tokens[:, 1:, None])
    gradients = []
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        torch.testing.assert_close(training(), -scores.detach().mean())
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    norm = sum(gradient.square().sum() for gradient in gradients[0])
    assert norm < 1 + 1e-4, "clipped"
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(second, first)


@of_methods
def test_training_trains(uncompiled: None, method: Method) -> None:
    training = method.prepare(CASE, None, CPU)
    before = [p.detach().clone() for p in training.model.parameters()]
    losses = [float(training()) for _ in range(8)]
    assert all(later < earlier for earlier, later in zip(losses, losses[1:], strict=False))
    after = training.model.parameters()
    assert not any(map(torch.equal, before, after))


def test_pivots_are_drawn_anew_in_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, sample_pivots = [], ck.sample_pivots

    def sample(*args: Any, **options: Any) -> torch.Tensor:
        drawn.append(sample_pivots(*args, **options))
        return drawn[-1]

    training = STEP_METHODS[0].prepare(CASE, None, CPU)
    monkeypatch.setattr(ck, "sample_pivots", sample)
    for _ in range(2):
        training()
    assert len(drawn) == 2 * CASE.num_layers
    assert all(not torch.equal(drawn[0], other) for other in drawn[1:])


def test_a_step_leaves_the_model_s_functions_alone() -> None:
    """Also after an error."""
    training = STEP_METHODS[0].prepare(CASE, None, CPU)
    assert cogview.model.ck is ck
    training.positions = training.positions + CASE.seqlen
    with pytest.raises(IndexError):
        training()
    assert cogview.model.ck is ck


def test_on_a_gpu_ours_is_never_a_substitute() -> None:
    kernels = step_methods.ours(CUDA)
    q, x = torch.randn(1, 1, 8, 32).bfloat16(), torch.randn(4, 32)
    layout = ck.ThreeRegionLayout(2, None, 4, 1)
    for call in (
        lambda: kernels.three_region_attention(q, q, q, layout),
        lambda: kernels.sandwich_residual(x, x, *[x[0]] * 4),
        lambda: kernels.PBRelaxLayerNorm(32)(x),
    ):
        with pytest.raises(ck.KernelUnavailable):
            call()


def test_plain_steps_do_not_call_this_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **options: Any) -> None:
        raise AssertionError

    for name in ("three_region_attention", "pb_relax_layer_norm", "sandwich_residual"):
        monkeypatch.setattr(ck, name, never)
        monkeypatch.setattr(
            sys.modules["cogview_kernels.norm.function"], name, never, raising=False
        )
    (method,) = (m for m in STEP_METHODS if m.name == "dense SDPA, F.layer_norm")
    method.prepare(CASE, None, CPU)()


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, None),
        ({"dtype": "float32"}, "float16 and bfloat16"),
        ({"hidden_size": 80}, "no kernel for 40"),
    ],
)
def test_a_method_that_cannot_run_gives_a_reason(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], expected: str | None
) -> None:
    monkeypatch.setattr(
        extension,
        "why_no_attention_kernel",
        lambda dtype, head_dim, device, backend: "no kernel for 40" if head_dim == 40 else None,
    )
    monkeypatch.setattr(norm_methods, "no_compiler", lambda case, device: None)
    case = StepCase(**{**vars(HALF), "hidden_size": 64, **changes})
    for method in STEP_METHODS[:2]:
        assert method.why_not(case, CPU) is None
        reason = method.why_not(case, CUDA)
        assert reason is None if expected is None else expected in str(reason)


def test_names_differ_and_ours_come_first() -> None:
    names = [method.name for method in STEP_METHODS]
    assert len(set(names)) == len(names) and names[0] == "cogview_kernels"
    assert {method.computes for method in STEP_METHODS} == SETTINGS.keys()
    assert STEP_METHODS[2].why_not(CASE, CPU) == "what cogview_kernels runs on the CPU"


@of_those_that_compile
def test_layers_share_one_compiled_graph(monkeypatch: pytest.MonkeyPatch, method: Method) -> None:
    """Two graphs in total: one for the layers and one for the loss."""
    graphs = []

    def compiler(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    torch_compile = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda *args, **options: torch_compile(*args, backend=compiler, **options)
    )
    torch.compiler.reset()
    training = method.prepare(CASE, None, CPU)
    for _ in range(2):
        training()
    assert len(graphs) == 2


@pytest.mark.slow
@of_those_that_compile
def test_compiled(method: Method) -> None:
    training = method.prepare(CASE, None, CPU)
    training()
    assert error(training, method.computes) < TOLERANCE["float32"]
    first = training.losses.mean()
    assert training() < first

"""The suite's training steps compute what they declare, and train."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import cogview_kernels as ck
from benchmarks.suite.cases import AttentionCase, StepCase
from benchmarks.suite.methods import Method
from benchmarks.suite.problems import NotMeasured, StepProblem
from benchmarks.suite.steps import (
    ATTENTION,
    STEP_METHODS,
    Training,
    as_cogview_computes,
    definitions,
)

CPU = torch.device("cpu")
LAYER = AttentionCase(64, 8, 2, 6, batch=2, num_heads=2, head_dim=16, text_len=6, dtype="float32")
CASE = StepCase(2, LAYER, 50)
HALF = StepCase(2, dataclasses.replace(LAYER, dtype="bfloat16"), 50)

of_methods = pytest.mark.parametrize("method", STEP_METHODS, ids=lambda method: method.name)


@pytest.mark.parametrize("case", [CASE, HALF], ids=lambda case: case.attention.dtype)
@of_methods
def test_the_first_step_matches_the_definitions(method: Method, case: StepCase) -> None:
    errors = StepProblem(case, CPU).prepared(method)[1]["errors"]
    assert (errors["losses"] > 1e-5) == (case is HALF), "autocast"
    for other in ATTENTION.keys() - {method.computes}:
        with pytest.raises(NotMeasured, match="wrong.*losses"):
            StepProblem(case, CPU).prepared(dataclasses.replace(method, computes=other))


@of_methods
def test_gradients_match_the_definitions(method: Method) -> None:
    training = method.prepare(CASE, None, CPU)
    exact = Training(CASE, method.computes, definitions, CPU)
    exact.model.double()
    for one in (training, exact):
        one.forward().mean().backward()
    for (name, parameter), right in zip(
        training.model.named_parameters(), exact.model.parameters(), strict=True
    ):
        assert parameter.grad is not None and right.grad is not None, name
        assert right.grad.count_nonzero() > 0, name
        assert (parameter.grad - right.grad).norm() < 1e-5 * right.grad.norm(), name


def test_a_step_s_loss_and_gradients_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each token is predicted from those before it; gradients are clipped, and none are left: the
    next step would free them, and its peak memory would look smaller."""
    (method,) = (m for m in STEP_METHODS if m.computes == "dense causal")
    training = method.prepare(CASE, None, CPU)
    training.optimizer.param_groups[0]["lr"] = 0.0  # every step repeats the first
    tokens, model = training.tokens, training.model
    z = model(tokens[:, :-1], training.positions, [None] * CASE.num_layers)
    scores = model.logits(z).log_softmax(-1).gather(2, tokens[:, 1:, None])
    norms, step = [], training.optimizer.step

    def observed() -> None:
        norms.append(sum(p.grad.square().sum() for p in model.parameters()).sqrt())
        step()

    monkeypatch.setattr(training.optimizer, "step", observed)
    for _ in range(2):
        torch.testing.assert_close(training(), -scores.detach().mean())
        assert all(p.grad is None for p in model.parameters())
    assert norms[0] == norms[1] <= 1 + 1e-4


def test_cogview_s_formulation_does_not_call_this_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **options: Any) -> None:
        raise AssertionError

    operators = as_cogview_computes(CASE, CPU)
    for operator in ("three_region_attention", "layer_norm", "sandwich_residual"):
        assert getattr(operators, operator).__module__ == "benchmarks.suite.steps"
    for name in ("three_region_attention", "pb_relax_layer_norm", "sandwich_residual"):
        monkeypatch.setattr(ck, name, never)
    (method,) = (m for m in STEP_METHODS if m.name == "CogView's formulation")
    method.prepare(CASE, None, CPU)()

"""The instability experiment: its float16 operations, its training, what it makes of a record."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.experiments import instability
from benchmarks.experiments.instability import PLAN, PRE, PRE_RELAXED, Seen, Settings, Variant
from cogview.config import ModelConfig
from cogview.model import GPT

TINY = Settings(steps=4, num_layers=2, hidden_size=16, num_heads=2, warmup_steps=1, window=1)


def half(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float16)


@pytest.mark.parametrize("variant", instability.COLOURS, ids=lambda variant: variant.name)
def test_the_model_is_gpt(variant: Variant) -> None:
    """Logits and gradients in float64; in float16 they are near, and nothing stays wider."""
    relax: Any = "row" if variant.relax else "none"
    shape: dict[str, Any] = {"num_layers": 2, "hidden_size": 16, "num_heads": 2}
    shape |= {"max_positions": 64, "dropout": 0.0, "attention": "dense"}
    config = ModelConfig(
        **shape, norm=variant.norm, relax=relax, init_std=0.2, embedding_gradient_scale=1.0
    )
    torch.manual_seed(0)
    model = GPT(config, 27).double()
    weights, tokens = dict(model.named_parameters()), instability.digits()[0][:2, :-1]
    expected = model.logits(model(tokens, torch.arange(64).expand(2, -1), [None] * 2))
    out = instability.logits(weights, tokens, config, variant, Seen(list))
    torch.testing.assert_close(out, expected)
    dout = torch.randn_like(out)
    gradients = [torch.autograd.grad(y, list(weights.values()), dout) for y in (out, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-10)
    halves = {name: weight.detach().half() for name, weight in weights.items()}
    rounded = instability.logits(halves, tokens, config, variant, Seen(list))
    assert rounded.dtype == torch.float16 and not torch.equal(rounded.double(), out)
    torch.testing.assert_close(rounded.double(), out, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("variant", "expected", "infinite"),
    [
        (PRE, [0.25] * 16, 1.0),  # only the bias remains
        (PRE_RELAXED, [1.25, -0.75] * 8, 0.0),
        (instability.PRE_STATISTICS, [1.25, -0.75] * 8, 0.0),
    ],
    ids=["float16", "relaxed", "float32"],
)
def test_statistics_of_large_rows(variant: Variant, expected: list[float], infinite: float) -> None:
    seen = Seen(list)
    for size in (255.0, 257.0):
        x = half(*[size, -size] * 8).requires_grad_()
        y = instability.layer_norm(x, half(*[1.0] * 16), half(*[0.25] * 16), 1e-5, variant, seen)
        (gradient,) = torch.autograd.grad(y, x, half(*range(16)))
        assert gradient.dtype == torch.float16 and gradient.isfinite().all()
        assert y.tolist() == (expected if size > 256 else [1.25, -0.75] * 8)
        assert gradient.any() == (size < 256 or not infinite)
    assert [float(value) for value in seen["infinite_variances"]] == [0.0, infinite]
    assert [float(value) for value in seen["norm_input"]] == [255, 257]


def test_scores_beyond_float16() -> None:
    torch.manual_seed(0)
    q, k, v = (scale * torch.randn(1, 1, 9, 16) for scale in (300.0, 300.0, 1.0))
    q, k, v, seen = q.half(), k.half(), v.half(), Seen(list)
    plain, relaxed = (instability.causal_attention(q, k, v, r, seen) for r in (False, True))
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    torch.testing.assert_close(relaxed.double(), expected, rtol=0.01, atol=0.01)
    assert not plain.isfinite().all()
    assert seen["score"][0] == math.inf and seen["score"][1] > instability.HALF_MAX
    for queries, keys, rows in (
        ((600.0, 0.0), (0.0, 600.0), [1, 2]),  # a later key's is far above the maximum
        ((1.0, 600.0), (-600.0, 600.0), [1, 3]),  # an earlier key's is far below it
    ):
        q, k, v = (half(*values).view(1, 1, 2, 1) for values in (queries, keys, (1.0, 3.0)))
        assert instability.causal_attention(q, k, v, True, seen).flatten().tolist() == rows


def test_the_position_line() -> None:
    """Ten images of each of two digits, which differ in half of the pixels."""
    train = torch.zeros(20, 65, dtype=torch.int64)
    train[:10, 0], train[10:, 0], train[10:, 1:33] = 17, 18, 5
    lines = [instability.frequency_loss(train, train, by_digit) for by_digit in (False, True)]
    near = [10.1 / 21.7, 20.1 / 21.7]  # a tenth is added to each of 17 counts
    assert lines[0] == pytest.approx(-sum(map(math.log, near)) / 2, abs=1e-4)
    assert lines[1] == pytest.approx(-math.log(10.1 / 11.7), abs=1e-4)
    images = torch.cat(instability.digits())
    assert instability.frequency_loss(images, images, False) == pytest.approx(1.672, abs=1e-3)


def test_the_scale_halves_and_the_run_stops() -> None:
    settings = dataclasses.replace(TINY, steps=20, initial_loss_scale=2.0**40, give_up_after=12)
    run = instability.train(PRE, 0.01, 0, settings, "cpu")
    assert run["skipped"] == [*range(12)] and run["steps"] == 12
    scales = run["curves"]["loss_scale"]
    assert scales == pytest.approx([2.0**n for n in range(40, 28, -1)], rel=1e-3)
    seen = "stopped: 12 steps skipped in a row, the loss scale fell to 2^29"
    assert instability.outcome(run, 1.68) == seen


def test_variants_start_equal_learn_and_repeat() -> None:
    settings = dataclasses.replace(TINY, steps=40, initial_loss_scale=64.0)
    runs = [instability.train(v, 0.02, 3, settings, "cpu") for v in (PRE, PRE_RELAXED, PRE)]
    for run in runs:
        losses = run["curves"]["loss"]
        assert sum(losses[-5:]) / 5 < losses[0] - 0.5 and run["held_out_loss"] < losses[0] - 0.5
        assert losses[0] == pytest.approx(runs[0]["curves"]["loss"][0], rel=1e-3)
    assert runs[0] | {"seconds": 0} == runs[2] | {"seconds": 0}


def test_a_finished_run_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = instability.run_once(PRE, 0.01, 0, TINY, "cpu", tmp_path)
    monkeypatch.setattr(instability, "train", lambda *_: "anew")
    assert instability.run_once(PRE, 0.01, 0, TINY, "cpu", tmp_path) == first
    longer = dataclasses.replace(TINY, steps=5)
    for what in ((PRE_RELAXED, 0.01, 0, TINY), (PRE, 0.1, 0, TINY), (PRE, 0.01, 0, longer)):
        assert instability.run_once(*what, "cpu", tmp_path) == "anew"


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    """Two seeds; PB-relax takes 1 or 2 nats off Pre-LN's loss of 3 at a rate of 0.01."""
    runs = []
    for rate, variants in PLAN.items():
        for number, (seed, variant) in enumerate((s, v) for s in (0, 1) for v in variants):
            loss = 3.0 if variant == PRE else 2.0 - seed if rate < 0.1 or seed == 0 else None
            curve = [2.5, None, 2.0, 1.0 + number / 10]
            run = {"variant": dataclasses.asdict(variant), "learning_rate": rate, "seed": seed}
            run |= {"steps": 4, "held_out_loss": loss, "skipped": []}
            runs.append(run | {"curves": dict.fromkeys(instability.CURVES, curve)})
    return {
        "machine_info": {"device": "A CPU"},
        "settings": dataclasses.asdict(TINY),
        "baselines": {"position": {"train": 1.67, "held out": 1.68}}
        | {"position and digit": {"train": 1.43, "held out": 1.51}},
        "runs": json.loads(json.dumps(runs)),
    }


def test_the_table(record: dict[str, Any]) -> None:
    rows = [[c.strip() for c in r.split("|")[1:-1]] for r in instability.table(record).split("\n")]
    runs = {(row[0], row[1]): row for row in rows if len(row) == 9}
    assert len(runs) == 2 + sum(map(len, PLAN.values()))
    assert runs["0.01", "Pre-LN"][3] == "2 of 2 above the position line"
    relaxed = runs["0.01", "Pre-LN + PB-relax"]
    assert relaxed[2] == "1.500 (1.000 to 2.000)" and relaxed[5] == "not finite"
    assert relaxed[3] == "1 of 2 above the position line; 1 of 2 below the position line"
    assert runs["0.1", "Sandwich-LN"][2] == "2.000 (2.000 to 2.000), of 1 that are finite"
    assert "1 of 2 with a loss that is not finite" in runs["0.1", "Sandwich-LN"][3]
    (change,) = (row for row in rows if row[:1] == ["PB-relax, in Pre-LN"])
    spread = 12.706 * 0.5  # t of one degree of freedom times the error of the mean
    assert change[2] == f"-1.500 ({-1.5 - spread:+.3f} to {-1.5 + spread:+.3f})" and change[3] == ""


def test_the_plot_has_gaps_and_the_line(
    record: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda f, *a, **k: (figures.append(f), save(f, *a, **k)))
    instability.draw(record, tmp_path / "picture.png")
    panel = figures[0].axes[1]  # learning rate 0.01
    heights = [list(line.get_ydata()) for line in panel.get_lines()]
    assert len(heights) == 2 * len(PLAN[0.01]) + 2 and [1.67, 1.67] in heights
    assert all(math.isnan(height[1]) for height in heights if len(height) == 4)
    assert (tmp_path / "picture.png").stat().st_size > 20_000

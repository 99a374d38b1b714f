"""The instability experiment: its simulated float16, its operations, its records."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import cogview_kernels as ck
from benchmarks.experiments import instability
from benchmarks.experiments.instability import VARIANTS, EveryOperation, Settings, Variant
from cogview.config import ModelConfig
from cogview.model import GPT

TINY = Settings(steps=4, num_layers=2, hidden_size=16, num_heads=2, warmup_steps=1, peaks_every=2)
CPU = torch.device("cpu")

halves = [variant for variant in VARIANTS if variant.dtype == "float16"]
each_half = pytest.mark.parametrize("variant", halves, ids=lambda variant: variant.stem)
relaxed_or_not = pytest.mark.parametrize("relax", [False, True])


def half(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float16)


def tiny_model(variant: Variant, dtype: torch.dtype) -> GPT:
    config = ModelConfig(
        num_layers=2,
        hidden_size=16,
        num_heads=2,
        max_positions=64,
        dropout=0.0,
        norm=variant.norm,  # type: ignore[arg-type]
        relax="row" if variant.relax else "none",
        attention="dense",
        init_std=0.2,
    )
    return GPT(config, instability.VOCAB_SIZE).to(dtype)


def hidden_states(model: GPT) -> Tensor:
    tokens = instability.digits()[:2, :-1]
    return model(tokens, torch.arange(64).expand(2, -1), [None] * 2)


# Float16.


def test_each_operation_is_rounded() -> None:
    one, eps = half(1.0), half(2.0**-11)
    with EveryOperation(simulate=True):
        assert ((one + eps) - one).item() == 0  # in float32 it would be eps
        assert (half(65504.0) + half(15.0)).item() == 65504
        assert (half(65504.0) + half(16.0)).item() == math.inf  # 65520
        assert (half(2.0**-24) * half(0.75)).item() == 2.0**-24
        assert (half(2.0**-24) * half(0.5)).item() == 0
        assert (half(300.0) ** 2).item() == math.inf


def test_an_operation_rounds_once() -> None:
    with EveryOperation(simulate=True):
        assert half(60000.0, 60000.0).mean().item() == 60000  # their sum overflows float16
        row = half(256.0, 256.0, -256.0)
        assert (row @ half(256.0, 1.0, 256.0)).item() == 256
        assert torch.stack([row, row]).dtype == torch.float16


def test_each_operation_of_the_backward_is_rounded() -> None:
    x = half(2.0).requires_grad_()
    with EveryOperation(simulate=True) as watch:
        (x * x).backward(half(40000.0))
        assert x.grad is not None and x.grad.item() == math.inf
        x.grad = None
        (x * 1.0 + x * 2.0**-11).backward(half(1.0))
        assert x.grad.item() == 1  # float32 would add 2**-11
        x.grad = None
        (x * 2.0**-25).backward(half(1.0))
        assert x.grad.item() == 0
    places, _ = watch.take()
    assert ("backward", "Global", "mul") in places


@each_half
@pytest.mark.parametrize("simulate", [True, False])
def test_no_operation_of_a_model_stays_in_float32(
    variant: Variant, simulate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, wide = tiny_model(variant, torch.float16), set()

    class Dtypes(EveryOperation):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = super().__torch_dispatch__(func, types, args, kwargs)
            results = out if isinstance(out, tuple) else (out,)
            if any(isinstance(t, Tensor) and t.dtype == torch.float32 for t in results):
                wide.add(func.overloadpacket.__name__)
            return out

    with instability.separate_operations(variant), Dtypes(simulate):
        hidden_states(model).sum().backward()
    assert wide <= ({"native_layer_norm"} if variant.statistics == "float32" else set())
    assert {weight.grad.dtype for weight in model.parameters() if weight.grad is not None} == {
        torch.float16
    }


def test_simulation_is_close_to_native_float16() -> None:
    model = tiny_model(halves[2], torch.float16)
    gradients, peaks = [], []
    for simulate in (True, False):
        model.zero_grad()
        with instability.separate_operations(halves[2]), EveryOperation(simulate) as watch:
            hidden_states(model).float().square().sum().backward()
        gradients.append(torch.cat([weight.grad.flatten() for weight in model.parameters()]))
        peaks.append(watch.take())
    assert torch.linalg.vector_norm(gradients[0] - gradients[1]) < 0.02 * gradients[1].norm()
    assert peaks[0][0] == peaks[1][0]
    forward = [phase == "forward" for phase, _, _ in peaks[0][0]]
    torch.testing.assert_close(peaks[0][1][forward], peaks[1][1][forward], rtol=0.02, atol=1e-3)


# The separate operations.


@relaxed_or_not
@pytest.mark.parametrize("statistics", ["float16", "float32"])
def test_the_norm_is_layer_norm(relax: bool, statistics: str) -> None:
    x = (3 + 40 * torch.randn(5, 16, dtype=torch.float64)).requires_grad_()
    weight, bias = torch.randn(2, 16, dtype=torch.float64).unbind()
    dout = torch.randn(5, 16, dtype=torch.float64)
    out = instability.layer_norm(x, weight, bias, 1e-2, relax, statistics)
    expected = ck.pb_relax_layer_norm(
        x, weight, bias, 1e-2, relax="row" if relax else None, backend="reference"
    )
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(
        *(torch.autograd.grad(y, x, dout)[0] for y in (out, expected)), rtol=1e-9, atol=1e-9
    )


def test_the_plain_norm_is_torchs() -> None:
    x = torch.randn(5, 16, dtype=torch.float64)
    weight, bias = torch.randn(2, 16, dtype=torch.float64).unbind()
    torch.testing.assert_close(
        instability.layer_norm(x, weight, bias, 1e-5, False, "float16"),
        F.layer_norm(x, (16,), weight, bias, 1e-5),
    )


@relaxed_or_not
def test_the_attention_is_causal_softmax(relax: bool) -> None:
    q, k, v, dout = (9 * torch.randn(4, 2, 3, 7, 8, dtype=torch.float64)).unbind()
    inputs = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
    out = instability.causal_attention(*inputs, relax)
    expected = F.scaled_dot_product_attention(*inputs, is_causal=True)
    torch.testing.assert_close(out, expected)
    for ours, theirs in zip(
        torch.autograd.grad(out, inputs, dout, retain_graph=True),
        torch.autograd.grad(expected, inputs, dout),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)


@each_half
def test_the_model_is_the_same_function(variant: Variant) -> None:
    model = tiny_model(variant, torch.float64)
    expected = hidden_states(model)
    with instability.separate_operations(variant):
        out = hidden_states(model)
    torch.testing.assert_close(out, expected)


def test_a_relaxed_row_near_the_end_of_float16_stays_finite() -> None:
    x = half(*[60000.0, -60000.0] * 8).requires_grad_()
    weight, bias = half(*[1.0] * 16), half(*[0.25] * 16)
    with EveryOperation(simulate=True):
        plain = instability.layer_norm(x, weight, bias, 1e-5, False, "float16")
        relaxed = instability.layer_norm(x, weight, bias, 1e-5, True, "float16")
        relaxed.backward(half(*range(16)))
    assert (plain == 0.25).all()  # infinite variance: only the bias remains
    assert relaxed.tolist() == [1.25, -0.75] * 8
    assert x.grad is not None and x.grad.isfinite().all()


def test_relaxed_scores_beyond_float16_stay_finite() -> None:
    q, k, v = (scale * torch.randn(1, 1, 9, 16) for scale in (300.0, 300.0, 1.0))
    q, k, v = (tensor.half() for tensor in (q, k, v))
    assert (q.double() @ k.double().mT / 4).abs().max() > 1.5 * instability.HALF_MAX
    with EveryOperation(simulate=True):
        plain = instability.causal_attention(q, k, v, relax=False)
        relaxed = instability.causal_attention(q, k, v, relax=True)
    assert not plain.isfinite().all()
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    torch.testing.assert_close(relaxed.double(), expected, rtol=0.01, atol=0.01)


@pytest.mark.parametrize(
    ("queries", "keys", "expected"),
    [((600.0, 0.0), (0.0, 600.0), [1, 2]), ((1.0, 600.0), (-600.0, 600.0), [1, 3])],
    ids=["a later key's", "far below the maximum"],
)
def test_no_score_overflows_with_the_relaxed_maximum(
    queries: tuple[float, ...], keys: tuple[float, ...], expected: list[float]
) -> None:
    q, k, v = (half(*values).view(1, 1, 2, 1) for values in (queries, keys, (1.0, 3.0)))
    with EveryOperation(simulate=True) as watch:
        out = instability.causal_attention(q, k, v, relax=True)
    assert out.flatten().tolist() == expected
    assert watch.take()[1].isfinite().all()


# Training.


def test_every_result_of_an_operation_is_recorded() -> None:
    x, weight = torch.randn(4, 8).half().requires_grad_(), torch.ones(8).half().requires_grad_()
    bias = torch.zeros(8).half().requires_grad_()
    with EveryOperation(simulate=True) as watch:
        F.layer_norm(x, (8,), weight, bias).backward(torch.full((4, 8), 3e4).half())
    places, peaks = watch.take()  # the bias's gradient, four times 3e4, is the third result
    backward = [p for p, place in zip(peaks, places, strict=True) if "backward" in place[2]]
    assert len(backward) == 3 and backward[0].isfinite() and backward[2] == torch.inf


def test_a_range_of_outcomes_covers_every_seed() -> None:
    assert instability._span([2.0, math.nan, 1.0], "{:.1f}") == "1.0 to NaN"
    assert instability._span([1.9, math.inf, 2.1, 1.7], "{:.1f}") == "1.7 to overflow"


def test_an_overflow_is_attributed_to_its_operation() -> None:
    model = tiny_model(halves[0], torch.float16)
    with torch.no_grad():
        model.transformer.layers[1].mlp.dense_h_to_4h.weight[0, 0] = 6e4  # type: ignore[union-attr]
    with instability.separate_operations(halves[0]), EveryOperation(simulate=True) as watch:
        hidden_states(model).sum().backward()
    run: dict[str, Any] = {
        "first_overflow": {"forward": None, "backward": None},
        "forward_overflows": 0,
    }
    places, peaks = watch.take()
    instability._note_overflows(run, 7, places, peaks)
    assert run["forward_overflows"] == 1
    assert run["first_overflow"]["forward"] == {
        "step": 7,
        "module": "layers.1.mlp.dense_h_to_4h",
        "operation": "addmm",
    }
    assert run["first_overflow"]["backward"]["step"] == 7


def test_the_largest_values_by_layer_are_those_of_the_residual_stream() -> None:
    model, seen = tiny_model(halves[0], torch.float16), []
    for layer in model.transformer.layers:
        layer.register_forward_hook(lambda _, __, out: seen.append(out[0].abs().max().item()))
    with instability.separate_operations(halves[0]), EveryOperation(simulate=True) as watch:
        hidden_states(model)
    hidden = instability.largest_by_layer(*watch.take(), num_layers=2)
    assert (hidden["residual"] >= torch.tensor(seen)).all()  # of both sums in a layer
    assert all((values > 0).all() for values in hidden.values())


def test_the_scale_halves_where_a_gradient_overflows() -> None:
    settings = dataclasses.replace(TINY, initial_loss_scale=2.0**40, give_up_after=3)
    run = instability.train(halves[1], 0, settings, CPU)
    assert run["skipped"] == [0, 1, 2]
    assert run["loss_scale"] == [2.0**40, 2.0**39, 2.0**38]
    assert run["loss"][0] == run["loss"][0] is not None
    assert run["first_overflow"]["forward"] is None and run["first_overflow"]["backward"]


def test_the_scale_doubles_without_overflows() -> None:
    settings = dataclasses.replace(TINY, initial_loss_scale=2.0, loss_scale_window=2)
    run = instability.train(halves[2], 0, settings, CPU)
    assert run["loss_scale"] == [2, 2, 4, 4] and run["skipped"] == []


def test_runs_learn_start_equal_and_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    starts = []

    def kept(thing: Any) -> Any:
        if isinstance(thing, GPT):
            starts.append({name: weight.clone() for name, weight in thing.state_dict().items()})
        return copied(thing)

    copied = copy.deepcopy
    monkeypatch.setattr(instability.copy, "deepcopy", kept)
    settings = dataclasses.replace(TINY, steps=40, learning_rate=0.02)
    runs = [
        instability.train(variant, 3, settings, CPU)
        for variant in (halves[2], halves[2], VARIANTS[-1])
    ]
    for run in runs:
        assert sum(run["loss"][-5:]) / 5 < run["loss"][0] - 0.5
    assert runs[0] | {"seconds": 0} == runs[1] | {"seconds": 0}
    for name, weight in starts[2].items():  # Pre-LN's weights; the sandwich has more
        assert torch.equal(weight, starts[0][name])


def test_a_finished_run_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = instability.run_once(halves[0], 0, TINY, "cpu", tmp_path)
    monkeypatch.setattr(instability, "train", lambda *_: {"trained": "anew"})
    assert instability.run_once(halves[0], 0, TINY, "cpu", tmp_path) == first
    anew = {"trained": "anew"}
    longer = dataclasses.replace(TINY, steps=5)
    for arguments in ((halves[1], 0, TINY), (halves[0], 1, TINY), (halves[0], 0, longer)):
        assert instability.run_once(*arguments, "cpu", tmp_path) == anew


# The record.


def run_of(loss: list[float | None], zeros: list[float | None], skipped: list[int]) -> Any:
    return {"loss": loss, "zero_gradients": zeros, "skipped": skipped}


def test_outcomes() -> None:
    calm = run_of([2.0] * 40, [0.1] * 40, [0, 1, 39])
    assert instability.outcome(calm, 2.06) == "trains"
    assert instability.outcome(calm, 2.03) == "learns nothing but the tokens' frequencies"
    now_and_then = run_of([1.0] * 40, [0.1] * 40, [n for n in range(40) if n % 8])
    assert instability.outcome(now_and_then, 2.06) == "diverges: most steps do not succeed"
    nan = run_of([2.0] * 20 + [None] * 20, [0.1] * 20 + [None] * 20, [0, 1, *range(20, 40)])
    assert instability.outcome(nan, 2.06) == "diverges: no step succeeds from 20 on"
    assert instability.zero_gradients(nan) == 0.1
    dead = run_of([2.0] * 40, [0.1] * 9 + [0.99] * 30 + [0.1], [])
    assert instability.outcome(dead, 2.06) == "hardly a gradient is left, yet the loss falls"
    assert instability.outcome(dead, 2.03) == "hardly a gradient is left"
    assert math.isnan(instability.final_loss(nan)) and instability.final_loss(calm) == 2


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    runs = [instability.train(variant, seed, TINY, CPU) for seed in (0, 1) for variant in VARIANTS]
    runs[3]["hidden"]["residual"][-1][-1] = runs[3]["largest"]["residual"][-1] = None
    runs[3]["loss"][-1] = None
    return {
        "machine_info": {"device": "A CPU", "device_type": "cpu", "torch": "2"},
        "commit_info": {"id": "0123456789ab"},
        "datetime": "2026-01-02T03:04:05",
        "simulated_float16": True,
        "settings": dataclasses.asdict(TINY),
        "loss_by_frequency": 2.06,
        "runs": runs,
    }


def test_the_table_has_a_row_for_each_variant(record: dict[str, Any]) -> None:
    lines = instability.table(record).splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[:9]]
    assert {len(row) for row in rows} == {10}
    assert [row[1] for row in rows[2:]] == [variant.name for variant in VARIANTS]
    assert "NaN" in rows[5][3] and "overflow" in rows[5][5]
    assert "nan" not in "".join(lines) and "inf" not in "".join(lines).replace("information", "")
    assert "2 seeds" in lines[-1] and "012345678" in lines[-1]


def test_the_plot_is_drawn(record: dict[str, Any], tmp_path: Path) -> None:
    instability.draw(record, tmp_path / "picture.png")
    with Image.open(tmp_path / "picture.png") as image:
        assert image.size[0] > 1000 and len(image.convert("L").getcolors() or ()) > 20


def test_a_record_is_json_with_a_line_for_each_run(
    record: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(instability, "RECORDS", tmp_path)
    path = instability.save(record)
    assert path.name == "instability-a-cpu-2026-01-02-0123456.json"
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == record
    assert sum(line.startswith('{"variant"') for line in path.read_text().splitlines()) == 14

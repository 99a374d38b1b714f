"""The quality experiment: what its tasks ask, how variants are compared, what the record tells."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.experiments import quality
from benchmarks.experiments.quality import NEIGHBOURS, TASKS, VARIANTS, Experiment, Run
from cogview.tokens import TokenDataset

TINY = (
    *quality.SETTINGS,
    "device=cpu",
    "image_tokenizer.image_size=32",
    "image_tokenizer.hidden=8",
    "image_training.steps=2",
    "model.num_layers=1",
    "model.hidden_size=32",
    "model.max_positions=72",
    "training.steps=3",
    "training.eval_every=2",
    "training.eval_examples=4",
)
EXPERIMENT = Experiment(
    TINY, (3,), (1e-3, 2e-3), sweep_steps=2, num_train=80, num_test=6, neighbour_steps=20
)


class InThisProcess:
    """Stands in for the process pool."""

    def __init__(self, *args: Any) -> None: ...
    def __enter__(self) -> InThisProcess:
        return self

    def __exit__(self, *args: Any) -> None: ...
    def submit(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(function(*args))
        return future


def records(out: Path) -> list[dict[str, Any]]:
    with mock.patch.object(quality, "ProcessPoolExecutor", InThisProcess):
        return list(quality.run_all(EXPERIMENT, 1, out))


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quality")


@pytest.fixture(scope="module")
def record(out: Path) -> dict[str, Any]:
    return records(out)[-1]


def test_every_run_is_in_the_record(record: dict[str, Any]) -> None:
    assert [(one["model"], one["rate"]) for one in record["sweep"]] == [
        (variant, rate) for rate in (1e-3, 2e-3) for variant in ("dense", "three_region")
    ]
    assert [(one["task"], one["model"]) for one in record["runs"]] == [
        *((task, NEIGHBOURS) for task in TASKS),
        *((task, variant) for task in TASKS for variant in VARIANTS),
    ]
    for one in record["sweep"] + record["runs"][2:]:
        assert [step for step, _ in one["curve"]] == ([2, 3] if one["draws"] else [2])
        assert ("digits_right" in one) == one["draws"]
    assert len({one["loss"] for one in record["runs"]}) == 8
    assert record["not_run"] == []


def test_only_missing_runs_are_run_again(out: Path, record: dict[str, Any]) -> None:
    (lost,) = out.glob("*/repeats-dense-3-*.json")
    lost.unlink()
    *_, before, after = records(out)
    assert [run.model for run in before["not_run"]] == ["dense"] and len(before["runs"]) == 7
    assert "Not run: repeats dense 3." in quality.table(before)
    kept = ("task", "model", "seed", "digest", "loss", "keys", "digits_right")
    assert sorted(str([one.get(name) for name in kept]) for one in after["runs"]) == sorted(
        str([one.get(name) for name in kept]) for one in record["runs"]
    )


def test_rates_with_the_lowest_loss_are_chosen() -> None:
    losses = {("dense", 1.0): 3, ("dense", 2.0): 1, ("three_region", 1.0): 4}
    losses |= {("dense", 3.0): 2, ("three_region", 2.0): 6, ("three_region", 3.0): 5}
    results = [{"model": m, "rate": rate, "loss": x} for (m, rate), x in losses.items()]
    runs = quality.compared(Experiment(seeds=(0, 1)), results)
    assert {(run.model, run.rate) for run in runs if run.model in VARIANTS} == {
        ("dense", 2.0),
        ("three_region", 1.0),
        ("no_pivots", 1.0),
    }
    assert [run.seed for run in runs if run.model in VARIANTS] == [0] * 6 + [1] * 6


def test_unequal_runs_are_refused(record: dict[str, Any]) -> None:
    quality.check_alike(record["runs"])
    assert len({one["digest"] for one in record["runs"][2:]}) == len(TASKS)
    other = [*record["runs"][:-1], record["runs"][-1] | {"digest": "other"}]
    with pytest.raises(RuntimeError, match="repeats.*no_pivots"):
        quality.check_alike(other)


def test_repeats_can_be_known_from_the_upper_half_alone() -> None:
    train, test = (quality.scenes_of("repeats", split, 60) for split in ("train", "test"))
    assert set(train[2] + test[2]) == {quality.UNNAMED}
    for images, digits, _ in (train, test):
        assert torch.equal(images[:, :, :32], images[:, :, 32:])
        assert torch.equal(digits[:, :2], digits[:, 2:])
    assert not {tuple(row) for row in train[1].tolist()} & {tuple(r) for r in test[1].tolist()}
    assert quality.digits_right(test[0], test[1]) > 0.9
    # Through all layers, windows reach back one row of codes at most.
    config = Experiment().config(Run("repeats", "no_pivots"))
    reach = config.model.query_window * config.model.key_window_times - 1
    assert config.model.num_layers * reach <= config.image_tokenizer.code_size
    captions = quality.scenes_of("captions", "test", 2)
    names = "zero one two three four five six seven eight nine".split()
    assert captions[2] == [" ".join(names[d] for d in digits) for digits in captions[1].tolist()]


@pytest.mark.parametrize("task", TASKS)
def test_losses_and_keys_are_measured(task: str) -> None:
    """With the full experiment's layouts, about a quarter of the keys of dense attention."""
    codes = np.random.default_rng(0).integers(0, 16, (4, 14, 14), dtype=np.int16)
    data = TokenDataset(np.zeros(16, np.int32), np.arange(5) * 4, codes, 64, 16)
    settings = (*quality.SETTINGS, "model.num_layers=1", "model.hidden_size=32")
    config = dataclasses.replace(Experiment(), settings=settings).config(Run(task, "three_region"))
    model = quality.model_with_waves(config.model, config.vocabulary.padded_size)
    whole, lower = (quality.measure(model, config, data, given) for given in (0.0, 0.5))
    (layout,) = model.sample_layouts(
        torch.full((4,), 7, dtype=torch.int32), 203, torch.Generator().manual_seed(0)
    )
    assert layout is not None
    seen = layout.dense_mask(4, 203, 203).sum().item() / (4 * 203)
    assert whole["keys"] == pytest.approx(seen) and whole["causal_keys"] == 102
    assert 0.22 < whole["keys"] / whole["causal_keys"] < 0.28
    model.word_embeddings.weight.data[:16] *= 3  # the losses of the halves differ now
    whole, lower = (quality.measure(model, config, data, given) for given in (0.0, 0.5))
    upper_codes = TokenDataset(**vars(data) | {"codes": codes[:, ::-1].copy()})
    assert whole["loss"] != lower["loss"]
    assert quality.measure(model, config, upper_codes, 0.5)["loss"] != lower["loss"]


def test_waves_tell_rows_and_columns() -> None:
    """The product of two positions depends on how many rows and columns lie between them."""
    config = Experiment().config(Run("captions", "dense"))
    model = quality.model_with_waves(config.model, config.vocabulary.padded_size)
    codes = model.transformer.position_embeddings.weight.detach()[6 : 6 + 196].view(14, 14, 128)
    products = torch.einsum("yxd,ijd->yxij", codes, codes)
    torch.testing.assert_close(products[:-2, :-3, :-2, :-3], products[2:, 3:, 2:, 3:])
    assert (products.flatten(2).argmax(2) == torch.arange(196).view(14, 14)).all()


@pytest.mark.parametrize(("rows_back", "known"), [(1, True), (7, False)])
def test_the_network_of_neighbours_sees_neighbours_alone(
    tmp_path: Path, rows_back: int, known: bool
) -> None:
    rng = np.random.default_rng(0)
    for split, num in (("train", 300), ("test", 30)):
        codes = rng.integers(0, 4, (num, 14, 6)).astype(np.int16)
        for row in range(rows_back, 14):
            codes[:, row] = codes[:, row - rows_back]
        text = np.zeros(num, np.int32), np.arange(num + 1)
        TokenDataset(*text, codes, 64, 4).save(tmp_path / f"repeats-{split}.npz")
    experiment = Experiment(neighbour_steps=60)
    result = quality.train_neighbours(experiment, Run("repeats", NEIGHBOURS), tmp_path)
    assert result["loss"] < 0.4 if known else result["loss"] == pytest.approx(math.log(4), abs=0.1)


def made_up(dense: list[float], three_region: list[float]) -> dict[str, Any]:
    """`digits_right` of each seed; the loss is its negative."""
    runs = []
    for task in TASKS:
        runs.append({"task": task, "model": NEIGHBOURS, "seed": 0, "loss": 1.0, "whole_loss": 1.0})
        for variant, values in (("dense", dense), ("three_region", three_region)):
            for seed, value in enumerate(values):
                run = Run(task, variant, seed, 2e-3)._asdict()
                run |= {"loss": -value, "digits_right": value, "keys": 51.0, "causal_keys": 102.0}
                runs.append(run | {"curve": [(1, 2.0), (2, 1.5), (3, 1.2), (4, 1.1)]})
    return {"runs": [run | {"core_seconds": 60.0} for run in runs]}


@pytest.mark.parametrize(
    ("three_region", "verdict"),
    [
        ([0.512, 0.501, 0.505], "non-inferior"),
        ([0.42, 0.43, 0.44], "inferior"),
        ([0.40, 0.52, 0.61], "not decided"),
        ([0.40], "not decided"),
    ],
)
def test_verdicts(three_region: list[float], verdict: str) -> None:
    found = made_up([0.50, 0.50, 0.50, 0.9], three_region)
    pair = ("three_region", "dense")
    mean, half, word = quality.difference(found, "captions", pair, "digits_right")
    assert mean == pytest.approx(np.mean(three_region) - 0.5) and word == verdict
    if len(three_region) == 3:  # Student's t for two degrees of freedom
        assert half == pytest.approx(
            4.30265 * np.std(three_region, ddof=1) / math.sqrt(3), rel=1e-4
        )
    loss = quality.difference(found, "captions", pair, "loss")
    assert loss[0] == pytest.approx(-mean)
    swapped = quality.difference(found, "captions", ("dense", "three_region"), "digits_right")
    words = {"non-inferior": "not decided", "inferior": "better"}
    if three_region[0] != 0.512:
        assert swapped[2] == words.get(verdict, "not decided")


def test_table_and_plot(record: dict[str, Any], tmp_path: Path) -> None:
    shown = record | made_up([0.8, 0.9, 0.7], [0.9, 0.9, 0.9])
    text = quality.table(shown)
    assert "| dense causal | 0.002 | 51.0 (50%) | -0.8000 ± 0.1000 | 80.0 ± 10.0 | 3 |" in text
    # 0.1, 0 and 0.2: half the interval is 4.303 * 0.1 / sqrt(3)
    assert "| -0.1000 (-0.3484 to +0.1484) | not decided | +10.0 (-14.8 to +34.8) |" in text
    assert "Dense ends 1.8000 nats below the 20 neighbours, and gained 0.1000 in" in text
    assert "dense causal 0.001: " in text and "8 core-minutes" not in text
    for name, content in (("one", record), ("three", shown)):
        quality.draw(content, tmp_path / f"{name}.png")
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.width > 1000 and len(image.convert("RGB").getcolors(10**6) or []) > 100

"""The quality experiment: what its tasks ask, what it measures, what the record decides."""

from __future__ import annotations

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
from cogview.data.tokens import TokenDataset

SMALL = ("device=cpu", "model.num_layers=1", "model.hidden_size=32")
TINY = (
    *("image_tokenizer.image_size=32", "image_tokenizer.hidden=8", "image_training.steps=2"),
    *("model.max_positions=72", "training.steps=3", "training.eval_every=2"),
)
EXPERIMENT = Experiment(
    (*quality.SETTINGS, *SMALL, *TINY), (3,), (3,), (1e-3, 2e-3), 100, 2, 80, 6, neighbour_steps=20
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


def test_the_record_holds_every_run(record: dict[str, Any]) -> None:
    assert [(one["model"], one["rate"]) for one in record["sweep"]] == [
        (variant, rate) for rate in (1e-3, 2e-3) for variant in ("dense", "three_region")
    ]
    assert [(one["task"], one["model"]) for one in record["runs"]] == [
        *((task, NEIGHBOURS) for task in TASKS),
        *(("captions", variant) for variant in VARIANTS if variant != "more_pivots"),
        *(("repeats", variant) for variant in VARIANTS),
    ]
    for one in record["sweep"] + record["runs"][2:]:
        assert [step for step, _ in one["curve"]] == ([2, 3] if one["draws"] else [2])
        assert ("digits_right" in one) == one["draws"]
    assert len({one["loss"] for one in record["runs"]}) == 9 and record["not_run"] == []


def test_only_missing_runs_are_run_again(out: Path, record: dict[str, Any]) -> None:
    next(out.glob("*/repeats-dense-3-*.json")).unlink()
    _, before, after = records(out)  # a record for each part, and one for the run
    assert len(before["runs"]) == 8 and "Not run: repeats dense 3." in quality.table(before)
    for name in ("model", "digest", "loss", "digits_right"):
        assert after["runs"][5][name] == record["runs"][5][name]


def test_unequal_runs_are_refused(record: dict[str, Any]) -> None:
    assert len({one["digest"] for one in record["runs"][2:]}) == len(TASKS)
    other = [*record["runs"][:-1], record["runs"][-1] | {"digest": "other"}]
    with pytest.raises(RuntimeError, match="repeats.*more_pivots"):
        quality.check_alike(other)


def test_rates_with_the_lowest_loss_are_chosen() -> None:
    results = [
        {"model": model, "rate": rate, "loss": loss}
        for model, losses in (("dense", (3, 1, 2)), ("three_region", (4, 6, 5)))
        for rate, loss in zip((1.0, 2.0, 3.0), losses, strict=True)
    ]
    runs = quality.compared(Experiment(seeds=(0, 1), repeats_seeds=(1,)), results)[len(TASKS) :]
    chosen = {"dense": 2.0, "three_region": 1.0, "no_pivots": 1.0, "more_pivots": 1.0}
    assert {run.model: run.rate for run in runs} == chosen
    assert [(run.task, run.seed) for run in runs] == [
        *([("captions", 0)] * 3 + [("captions", 1)] * 3 + [("repeats", 1)] * 4)
    ]


def test_repeats_can_be_known_from_the_upper_half_alone() -> None:
    train, test = (quality.scenes_of("repeats", split, 60) for split in ("train", "test"))
    assert set(train[2] + test[2]) == {quality.UNNAMED}
    for images, digits, _ in (train, test):
        assert torch.equal(images[:, :, :32], images[:, :, 32:])
        assert torch.equal(digits[:, :2], digits[:, 2:])
    assert not {tuple(row) for row in train[1].tolist()} & {tuple(r) for r in test[1].tolist()}
    assert quality.digits_right(test[0], test[1], given=0.5) > 0.9
    # Through all layers, windows reach back one row of codes at most.
    config = Experiment().config(Run("repeats", "no_pivots"))
    reach = config.model.query_window * config.model.key_window_times - 1
    assert config.model.num_layers * reach <= config.image_tokenizer.code_size


def test_captions_name_the_digits() -> None:
    names = "zero one two three four five six seven eight nine".split()
    _, digits, captions = quality.scenes_of("captions", "test", 20)
    assert captions == [" ".join(names[digit] for digit in row) for row in digits.tolist()]


@pytest.mark.parametrize("task", TASKS)
def test_losses_and_keys_are_measured(task: str) -> None:
    """With the experiment's layouts, which allow about a quarter of the keys of dense attention."""
    codes = np.random.default_rng(0).integers(0, 16, (4, 14, 14), dtype=np.int16)
    codes[:, 7:] = 0
    data = TokenDataset(
        np.zeros(16, np.int32), np.arange(5) * 4, codes, np.arange(4, dtype=np.uint64), 64, 16
    )
    config = Experiment((*quality.SETTINGS, *SMALL)).config(Run(task, "three_region"))
    model = quality.model_with_waves(config.model, config.vocabulary.padded_size)
    with torch.no_grad():  # code 0 is likely, whatever came before
        model.word_embeddings.weight[0] = 5 * model.transformer.final_layernorm.weight
        model.transformer.final_layernorm.bias.fill_(0.1)
    whole, lower = (quality.measure(model, config, data, given) for given in (0.0, 0.5))
    assert lower["loss"] < 0.1 and whole["loss"] > 1
    text_len = torch.full((4,), 7, dtype=torch.int32)
    (layout,) = model.sample_layouts(text_len, 203, torch.Generator().manual_seed(0))
    assert layout is not None
    assert whole["keys"] == pytest.approx(layout.dense_mask(4, 203, 203).sum().item() / (4 * 203))
    assert whole["causal_keys"] == 102 and 0.22 < whole["keys"] / 102 < 0.28


def test_waves_tell_rows_and_columns() -> None:
    """The product of two positions depends on how many rows and columns lie between them."""
    config = Experiment().config(Run("captions", "dense"))
    model = quality.model_with_waves(config.model, config.vocabulary.padded_size)
    codes = model.transformer.position_embeddings.weight.detach()[6 : 6 + 196].view(14, 14, 128)
    products = torch.einsum("yxd,ijd->yxij", codes, codes)
    torch.testing.assert_close(products[:-2, :-3, :-2, :-3], products[2:, 3:, 2:, 3:])
    assert (products.flatten(2).argmax(2) == torch.arange(196).view(14, 14)).all()


@pytest.mark.parametrize(("rows_back", "known"), [(1, True), (7, False)])
def test_the_neighbours_see_nothing_else(tmp_path: Path, rows_back: int, known: bool) -> None:
    for split, num in (("train", 300), ("test", 30)):
        codes = np.random.default_rng(num).integers(0, 4, (num, 14, 6)).astype(np.int16)
        for row in range(rows_back, 14):
            codes[:, row] = codes[:, row - rows_back]
        tokens = TokenDataset(
            np.zeros(num, np.int32),
            np.arange(num + 1),
            codes,
            np.arange(num, dtype=np.uint64),
            64,
            4,
        )
        tokens.save(tmp_path / f"repeats-{split}")
    run = Run("repeats", NEIGHBOURS)
    loss = quality.train_neighbours(Experiment(neighbour_steps=60), run, tmp_path)["loss"]
    assert loss < 0.4 if known else loss == pytest.approx(math.log(4), abs=0.1)


def made_up(dense: list[float], three_region: list[float]) -> dict[str, Any]:
    """Runs with these `digits_right`, and their negative as loss."""
    one = {"core_seconds": 60.0, "whole_loss": 1.0, "loss": 1.0}
    runs = [one | Run(task, NEIGHBOURS)._asdict() for task in TASKS]
    one |= {"keys": 51.0, "causal_keys": 102.0, "curve": [(1, 2.0), (2, 1.5), (3, 1.2), (4, 1.1)]}
    for variant, values in (("dense", dense), ("three_region", three_region)):
        for seed, x in enumerate(values):
            for task in TASKS:
                run = one | Run(task, variant, seed, 2e-3)._asdict()
                runs.append(run | {"digits_right": x, "loss": -x})
    return {"runs": runs}


@pytest.mark.parametrize(
    ("three_region", "verdict"),
    [
        ([0.512, 0.501, 0.505], "non-inferior"),
        ([0.42, 0.43, 0.44], "inferior"),
        ([0.40, 0.52, 0.61], "not decided"),
        ([0.485, 0.49, 0.495], "not decided"),  # around the margin
        ([0.40], "not decided"),
    ],
)
def test_verdicts(three_region: list[float], verdict: str) -> None:
    found, pair = made_up([0.50, 0.50, 0.50, 0.9], three_region), ("three_region", "dense")
    mean, half, word = quality.difference(found, "captions", pair, "digits right (%)")
    assert mean == pytest.approx(np.mean(three_region) - 0.5) and word == verdict
    if len(three_region) > 1:  # Student's t for two degrees of freedom
        error = np.std(three_region, ddof=1) / math.sqrt(3)
        assert half == pytest.approx(4.30265 * error, rel=1e-4)
    assert quality.difference(found, "captions", pair, "loss")[0] == pytest.approx(-mean)


def test_table_and_plot(record: dict[str, Any], tmp_path: Path) -> None:
    shown = record | made_up([0.8, 0.9, 0.7], [0.9, 0.9, 0.9])
    text = quality.table(shown)
    assert "| dense causal | 3 | 0.002 | 51.0 (50%) | -0.8000 ± 0.1000 | 80.0 ± 10.0 |" in text
    assert (
        "-0.1000 (-0.3484 to +0.1484), not decided | +10.0 (-14.8 to +34.8), not decided |" in text
    )
    assert "3 of 3 dense runs end below the 20 neighbours; the last quarter" in text
    assert "loss not decided, digits right not decided." in text
    for number, content in enumerate((record, shown)):
        quality.draw(content, tmp_path / f"{number}.png")
        with Image.open(tmp_path / f"{number}.png") as image:
            assert image.width > 1000 and len(image.convert("RGB").getcolors(10**6) or []) > 100

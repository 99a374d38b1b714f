"""The quality experiment: variants are treated alike, runs resume, the table is the record's."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

import cogview_kernels as ck
from benchmarks.experiments import quality
from cogview.config import load_config

SEEDS = (3, 4)
TINY = (
    "device=cpu",
    "image_tokenizer.image_size=16",
    "image_tokenizer.num_downsamples=1",
    "image_tokenizer.hidden=8",
    "image_training.steps=2",
    "model.num_layers=2",
    "model.hidden_size=16",
    "model.num_heads=2",
    "model.max_positions=96",
    "model.query_window=8",
    "model.key_window_times=2",
    "model.num_pivots=6",
    "training.steps=5",
    "training.batch_size=2",
    "training.eval_every=2",
    "training.eval_examples=4",
    "training.warmup_steps=1",
)


@pytest.fixture(scope="module")
def experiment() -> quality.Experiment:
    return quality.Experiment(load_config("digits", TINY), num_train=60, num_test=4)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quality")


@pytest.fixture(scope="module")
def record(experiment: quality.Experiment, out: Path) -> dict[str, Any]:
    """The record of all variants, run end to end."""
    *_, last = quality.run(experiment, list(quality.VARIANTS), SEEDS, jobs=2, out=out)
    return last


def trainer_of(
    experiment: quality.Experiment, out: Path, variant: str, seed: int = 3
) -> quality.ObservedTrainer:
    data = quality.load_data(experiment, experiment.folder(out))
    with tempfile.TemporaryDirectory() as folder:
        return quality.make_trainer(variant, experiment.of(variant, seed), folder, data)


def test_every_variant_runs(record: dict[str, Any]) -> None:
    names = [(run["variant"], run["seed"]) for run in record["runs"]]
    assert names == [(variant, seed) for variant in quality.VARIANTS for seed in SEEDS]
    assert record["not_run"] == []
    for run in record["runs"]:
        assert [point["step"] for point in run["training"]] == [1, 2, 3, 4, 5]
        assert [point["step"] for point in run["held_out"]] == [2, 4, 5]
        assert 0 <= run["accuracy"]["digit_accuracy"] <= 1


def test_weights_and_batches_depend_on_the_seed_only(record: dict[str, Any]) -> None:
    for name in ("initial_weights", "batches"):
        by_seed = {
            seed: {run[name] for run in record["runs"] if run["seed"] == seed} for seed in SEEDS
        }
        assert [len(digests) for digests in by_seed.values()] == [1, 1]
        assert by_seed[3] != by_seed[4]


def test_variants_learn_different_things(record: dict[str, Any]) -> None:
    losses = {run["held_out"][-1]["image_loss"] for run in record["runs"] if run["seed"] == 3}
    assert len(losses) == len(quality.VARIANTS)


def test_the_digest_covers_every_batch_that_is_read(
    experiment: quality.Experiment, out: Path, record: dict[str, Any]
) -> None:
    trainer = trainer_of(experiment, out, "dense")
    trainer.evaluate()
    before = trainer.batches.hexdigest()
    assert before == hashlib.sha256().hexdigest()
    trainer._train_step()
    assert trainer.batches.hexdigest() != before


def test_unequal_runs_are_refused(record: dict[str, Any]) -> None:
    for name in ("initial_weights", "batches"):
        runs = {(run["variant"], run["seed"]): dict(run) for run in record["runs"]}
        runs["without_text", 4][name] = "other"
        with pytest.raises(RuntimeError, match=f"seed 4.*{name}"):
            quality._ordered(runs, list(quality.VARIANTS), SEEDS)


@pytest.mark.parametrize("variant", quality.VARIANTS)
def test_keys_are_counted_exactly(
    experiment: quality.Experiment, out: Path, record: dict[str, Any], variant: str
) -> None:
    trainer = trainer_of(experiment, out, variant)
    config = trainer.config.model
    batch = trainer._batch(trainer.held_out_data, np.arange(4))
    length = batch.tokens.shape[1] - 1
    generator = torch.Generator().manual_seed(trainer.config.seed)
    layouts = trainer.model.sample_layouts(batch.text_len, length, generator)
    counts = {"window": 0, "text": 0, "pivots": 0}
    for layout in layouts:
        for sample in range(4):
            text_len = 0 if variant == "without_text" else int(batch.text_len[sample])
            pivots = layout.pivot_idx[sample].tolist() if layout else []
            for i in range(length):
                start = max(0, (i // 8 - 1) * 8) if layout else 0
                counts["window"] += i + 1 - start
                counts["text"] += min(text_len, start)
                counts["pivots"] += sum(text_len <= pivot < start for pivot in pivots)
    means = {name: count / (4 * length * config.num_layers) for name, count in counts.items()}
    found = quality.keys_attended(trainer)
    assert found["causal"] == (length + 1) / 2
    assert found["mean"] == pytest.approx(sum(means.values()))
    for name in counts if variant != "dense" else ():
        assert found[name] == pytest.approx(means[name])
    assert ("pivots" in found and found["pivots"] > 0) == (
        variant in ("three_region", "without_text")
    )
    assert ("text" in found and found["text"] > 0) == (
        variant in ("three_region", "without_pivots")
    )


def test_the_defaults_attend_to_at_most_a_quarter_of_the_keys() -> None:
    """With the full experiment's settings, for the shortest and the longest possible caption."""
    config = load_config("digits", quality.SETTINGS)
    for text_len in (14, config.model.max_positions - config.num_codes - 1):
        length = text_len + config.num_codes
        lengths = torch.full((8,), text_len, dtype=torch.int32)
        generator = torch.Generator().manual_seed(0)
        pivots = ck.sample_pivots(lengths, length, config.model.num_pivots, generator)
        layout = ck.ThreeRegionLayout(
            lengths, pivots, config.model.query_window, config.model.key_window_times
        )
        keys = layout.dense_mask(8, length, length).count_nonzero().item() / (8 * length)
        assert (length + 1) / 2 >= 4 * keys


def test_only_missing_runs_are_run_again(
    experiment: quality.Experiment, out: Path, record: dict[str, Any]
) -> None:
    folder, variants = experiment.folder(out), list(quality.VARIANTS)
    with mock.patch.object(quality, "ProcessPoolExecutor", InThisProcess):
        (again,) = quality.run(experiment, variants, SEEDS, jobs=1, out=out)
        assert again["runs"] == record["runs"]
        (folder / "without_text-4.json").unlink()
        before, after = quality.run(experiment, variants, SEEDS, jobs=1, out=out)
    assert before["not_run"] == [["without_text", 4]] and len(before["runs"]) == 7
    assert "without_text with seed 4" in quality.table(before)
    assert after["not_run"] == []
    assert after["runs"] == record["runs"]


def test_other_settings_are_other_runs(experiment: quality.Experiment, out: Path) -> None:
    training = dataclasses.replace(experiment.config.training, steps=6)
    config = dataclasses.replace(experiment.config, training=training)
    others = (
        dataclasses.replace(experiment, config=config),
        dataclasses.replace(experiment, num_train=61),
    )
    assert len({one.folder(out) for one in (experiment, *others)}) == 3


class InThisProcess:
    """Stands in for the process pool."""

    def __init__(self, *args: Any) -> None: ...

    def __enter__(self) -> InThisProcess:
        return self

    def __exit__(self, *args: Any) -> None: ...

    def submit(self, function: Any, *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(function(*args))
        return future


def made_up(digits: dict[str, tuple[float, ...]]) -> dict[str, Any]:
    runs = [
        {
            "variant": variant,
            "seed": seed,
            "keys": {"sequence": 590, "causal": 295.5, "mean": 295.5 if variant == "dense" else 60},
            "parameters": 123456,
            "initial_weights": "",
            "batches": "",
            "training": [{"step": s, "image_loss": 3 / s + value} for s in (10, 20, 30)],
            "held_out": [{"step": s, "image_loss": 4 / s + value} for s in (15, 30)],
            "accuracy": {"digit_accuracy": value, "whole_caption_accuracy": value / 2},
        }
        for variant, values in digits.items()
        for seed, value in enumerate(values)
    ]
    accuracy = {"digit_accuracy": 0.99, "whole_caption_accuracy": 0.96}
    return {
        "machine_info": {"device": "a CPU", "torch": "2.13"},
        "commit_info": {"id": "0" * 40},
        "datetime": "2026-11-25T00:00:00+00:00",
        "settings": json.loads(
            json.dumps(
                dataclasses.asdict(quality.Experiment(load_config("digits", quality.SETTINGS)))
            )
        ),
        "jobs": 2,
        "threads_per_job": 1,
        "can_be_read": {"real": accuracy, "reconstructed": accuracy},
        "runs": runs,
        "not_run": [],
    }


def test_table() -> None:
    text = quality.table(made_up({"dense": (0.8, 0.9, 0.7), "three_region": (0.9, 0.9, 0.9)}))
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ")}
    assert (
        "295.5 | 1.00x | 0.9333 ± 0.1000 | 80.0% ± 10.0% | 40.0% ± 5.0% | 3 |"
        in (rows["dense causal"])
    )
    assert "| 60.0 | 4.92x |" in rows["three-region"]
    # 0.1, 0 and 0.2: standard deviation 0.1, standard error 0.1 / sqrt(3)
    assert (
        "| +0.1000 ± 0.0577 | +10.0% ± 5.8% | +5.0% ± 2.9% | 3 |"
        in (rows["three-region − dense causal"])
    )
    assert not any("without" in name for name in rows)
    assert "24x24 codes, 590 tokens" in text


def test_differences_use_the_seeds_that_both_variants_ran() -> None:
    record = made_up({"dense": (0.8, 0.9, 0.1), "three_region": (0.5, 0.7)})
    mean, error, seeds = quality.paired_difference(record, "three_region", "dense", "digits right")
    assert (mean, error, seeds) == (pytest.approx(-0.25), pytest.approx(0.05), 2)
    record = made_up({"dense": (0.8,), "three_region": (0.5,)})
    assert quality.paired_difference(record, "three_region", "dense", "digits right")[1:] == (
        None,
        1,
    )
    assert "| -30.0% |" in quality.table(record)


@pytest.mark.parametrize("seeds", (1, 3))
def test_draw(tmp_path: Path, seeds: int) -> None:
    values = (0.8, 0.9, 0.7)[:seeds]
    record = made_up(dict.fromkeys(quality.VARIANTS, values))
    quality.draw(record, tmp_path / "quality.png")
    with Image.open(tmp_path / "quality.png") as image:
        assert image.width > 1000
        assert len(set(image.convert("RGB").resize((200, 100)).getdata())) > 20

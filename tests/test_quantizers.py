"""The comparison of the rules that train a codebook: its record, table and picture."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch
from PIL import Image
from test_quality import InThisProcess

from benchmarks.experiments import quantizers
from benchmarks.experiments.quantizers import Experiment
from cogview.config import QUANTIZERS

TINY = Experiment(
    steps=(2, 6), seeds=(0, 1), measurements=2, num_train=24, num_held_out=4,
    settings=(
        *Experiment.settings, "image_tokenizer.hidden=4", "image_tokenizer.codebook_size=32",
        "image_training.batch_size=2", "image_tokenizer.restart_below=0.99",
    ),
)  # fmt: skip


def test_every_rule_stands_in_record_table_and_picture(tmp_path: Path) -> None:
    with mock.patch.object(quantizers, "ProcessPoolExecutor", InThisProcess):
        record = quantizers.run_all(TINY, 1, tmp_path)
        with mock.patch.object(quantizers, "train", side_effect=AssertionError):
            again = quantizers.run_all(TINY, 1, tmp_path)  # nothing is run twice
    assert again["runs"] == record["runs"] and len(record["runs"]) == 16
    ends = {}
    for run in record["runs"]:
        assert [row["step"] for row in run["curve"]] == {2: [1, 2], 6: [3, 6]}[run["steps"]]
        if run["rule"] != "moving_average" or run["steps"] == 6:
            assert (run["revived"] > 0) == (run["rule"] == "moving_average")
        assert all(1 <= row["perplexity"] <= row["codes_used"] <= 32 for row in run["curve"])
        ends[run["rule"], run["steps"], run["seed"]] = run["curve"][-1]["loss"]
    assert len(set(ends.values())) == 16

    table = quantizers.table(record)
    assert len(table.split("\n\n")[0].splitlines()) == 2 + 8
    losses = [ends["gumbel", 6, seed] for seed in (0, 1)]
    cells = f"{sum(losses) / 2:.4f} ({min(losses):.4f} to {max(losses):.4f})"
    assert f"| Gumbel | 6 | {cells} |" in table and "codes used, of 32" in table
    quantizers.draw(record, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.width > 800
    assert set(quantizers.NAMES) == set(quantizers.COLOURS) == set(QUANTIZERS)


@pytest.mark.parametrize("rule", QUANTIZERS)
def test_rules_start_from_the_same_weights(rule: str, tmp_path: Path) -> None:
    weights = []
    for one in (rule, "fixed"):
        with mock.patch.object(quantizers.ImageTokenizerTrainer, "run", autospec=True) as run:
            with mock.patch.object(quantizers, "read_metrics", return_value=[]):
                quantizers.train(one, 2, 5, TINY)
        trainer = run.call_args.args[0]
        assert trainer.settings.eval_examples == TINY.num_held_out  # all that the table counts
        weights.append(trainer.model.enc_b.state_dict())
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name])

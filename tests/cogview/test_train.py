import contextlib
import dataclasses
import functools
import json
import os
import re
import signal
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
import torch

from cogview.checkpoint import list_checkpoints, load_checkpoint
from cogview.config import Config, load_config
from cogview.data.tokens import TokenDataset
from cogview.loop import choose_device, compute_dtype, learning_rate, read_metrics
from cogview.model import GPT
from cogview.sample import draw_images
from cogview.train import Trainer, _with_other_captions, make_batch

SETTINGS = [
    "device=cpu",
    "text_tokenizer.vocab_size=20",
    "image_tokenizer.image_size=16",
    "image_tokenizer.codebook_size=16",
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.num_heads=2",
    "model.max_positions=40",
    "model.dropout=0.1",
    "model.query_window=4",
    "model.key_window_times=2",
    "model.num_pivots=4",
    "training.steps=6",
    "training.batch_size=4",
    "training.warmup_steps=0",
    "training.eval_every=3",
    "training.save_every=3",
    "training.precision=float32",
]


def config(*overrides: str) -> Config:
    return load_config("digits", [*SETTINGS, *overrides])


def dataset(num: int = 10, seed: int = 0) -> TokenDataset:
    """Images in which all codes equal the first piece of the caption."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 7, num)
    text = rng.integers(0, 16, lengths.sum()).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    codes = np.broadcast_to(text[offsets[:-1], None, None], (num, 4, 4)).astype(np.int16)
    return TokenDataset(text, offsets, codes, rng.permutation(num).astype(np.uint64), 20, 16)


def trainer(settings: Config, folder: object) -> Trainer:
    return Trainer(settings, folder, dataset(), dataset(4, 1), progress=False)


MEASURED = "seconds", "tokens_per_second", "images_per_second", "peak_memory_gb"


def without_seconds(folder):
    return [
        {k: v for k, v in row.items() if k not in MEASURED}
        for row in read_metrics(folder / "metrics.jsonl")
    ]


def assert_same(a, b):
    """Compares nested dictionaries and lists bit for bit."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


# A separate process trains, and kills itself with SIGKILL in the middle of step 5.
KILLED = """
import os, signal, sys
sys.path[:0] = sys.argv[2:]
import test_train
class Killed(test_train.Trainer):
    def _check_finite(self, loss, grad_norm):
        if self.step == 4:
            os.kill(os.getpid(), signal.SIGKILL)
test_train.torch.set_num_threads(1)
config = test_train.config("data.workers=2")  # how it reads its data changes nothing
Killed(config, sys.argv[1], test_train.dataset(), test_train.dataset(4, 1), progress=False).run()
"""


def test_a_killed_run_resumes_bit_for_bit(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    trainer(config(), whole).run()

    paths = [os.path.dirname(__file__), os.getcwd()]
    process = subprocess.run(
        [sys.executable, "-c", KILLED, str(killed), *paths], capture_output=True, text=True
    )
    assert process.returncode == -signal.SIGKILL, process.stderr
    # The log is ahead of the checkpoint.
    assert [row["step"] for row in read_metrics(killed / "metrics.jsonl")] == [1, 2, 3, 4]
    torch.rand(3)  # the state of the global generator must not matter
    resumed = trainer(config(), killed)
    assert resumed.step == 3
    resumed.run()

    ends = [
        load_checkpoint(list_checkpoints(folder / "checkpoints")[0]) for folder in (whole, killed)
    ]
    assert ends[0]["step"] == 6
    assert_same(*ends)
    assert without_seconds(whole) == without_seconds(killed)
    assert len(without_seconds(whole)) == 6


def test_dropout_and_pivots_are_drawn_anew_each_step(tmp_path):
    settings = config("training.learning_rate=1e-12", "training.final_learning_rate=0")
    # The same batch each step, up to its order.
    run = Trainer(settings, tmp_path, dataset(4), dataset(4, 1), progress=False)
    assert run.train_step()["loss"] != pytest.approx(run.train_step()["loss"], rel=1e-5)


def test_training_learns_what_the_caption_says(tmp_path):
    settings = config(
        "training.steps=300", "training.learning_rate=1e-2", "model.dropout=0",
        "training.batch_size=8", "training.eval_every=300", "training.save_every=300",
        "training.text_weight=0",
    )  # fmt: skip
    data = dataset(512)  # too many examples to memorise
    Trainer(settings, tmp_path, data, dataset(32, 1), progress=False).run()
    last = read_metrics(tmp_path / "metrics.jsonl")[-1]
    # A model that ignores the caption pays log(16) / 16 = 0.17 for the first code.
    assert last["held_out_image_loss"] < 0.1
    assert last["held_out_text_loss"] > 2.0  # text has weight 0: not learned
    # With another caption, at least the first code of an image is a surprise.
    assert last["held_out_caption_gap"] > 0.2
    # Before training the gap is an accident of the weights, of either sign.
    untrained = Trainer(settings, tmp_path / "untrained", data, dataset(32, 1), progress=False)
    assert 3 * abs(untrained.evaluate()["caption_gap"]) < last["held_out_caption_gap"]


def test_the_caption_gap_takes_the_caption_of_another_image():
    """Neither another caption of the same image, nor the same caption of another one."""
    pairs = [(np.array([text]), np.full((1, 1), image)) for text, image in ["1A", "2A", "3B", "1C"]]
    assert [int(text[0]) for text, _ in _with_other_captions(pairs)] == [3, 1, 1, 2]
    assert _with_other_captions(pairs[:2]) == []


def test_captions_are_hidden_from_some_steps(tmp_path):
    seen = []
    settings = config(
        "training.caption_dropout=0.5", "training.micro_batch_size=2", "training.steps=40"
    )

    def hidden(batch):
        mask = settings.vocabulary.command("MASK")
        text = range(1, int(batch.text_len[0]) - 2)
        seen.append((batch.tokens[0, text] == mask).tolist())

    arguments = {"progress": False, "on_batch": hidden}
    run = Trainer(settings, tmp_path, dataset(), dataset(4, 1), **arguments)
    run.run()
    assert {len(set(row)) for row in seen} == {1}  # all of a caption or nothing
    assert 20 < sum(row[0] for row in seen) < 60 and len(seen) == 80
    # A function of the step, so that a resumed run hides the same ones.
    first, seen[:] = list(seen), []
    for _ in range(3):
        Trainer(settings, tmp_path / "again", dataset(), dataset(4, 1), **arguments).train_step()
    assert seen == first[:2] * 3
    # What is measured has its captions; so has another task, of which the text is the target.
    assert run.evaluate()["text_loss"] > 0
    seen.clear()
    settings = config("training.caption_dropout=0.5", "training.task=captioning")
    Trainer(settings, tmp_path / "other", dataset(), dataset(4, 1), **arguments).run()
    assert not any(map(any, seen))


def test_metrics_name_text_and_image_loss(tmp_path):
    trainer(config(), tmp_path).run()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert {
        "step",
        "loss",
        "text_loss",
        "image_loss",
        "learning_rate",
        "grad_norm",
        "seconds",
    } <= rows[0].keys()
    assert [("held_out_image_loss" in row) for row in rows] == [False, False, True] * 2


def test_what_is_not_finite_is_null_in_the_metrics(tmp_path):
    run = trainer(config(), tmp_path)
    run._log({"step": 1, "loss": float("inf"), "grad_norm": float("nan")}, mock.Mock())
    assert run.metrics_path.read_text() == '{"step": 1, "loss": null, "grad_norm": null}\n'


def test_a_full_disk_names_the_metrics(tmp_path):
    run = trainer(config(), tmp_path)
    run.metrics_path.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device: .*metrics.jsonl"):
        run.run()


def test_micro_batches_add_up_to_the_same_step(tmp_path):
    runs = []
    for name, size in (("one", 0), ("two", 2)):
        settings = config(
            "model.dropout=0", "model.attention=dense", f"training.micro_batch_size={size}"
        )
        run = trainer(settings, tmp_path / name)
        runs.append((run.train_step(), run.model.state_dict()))
    (one, a), (two, b) = runs
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)
    assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-4)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4)


def test_only_the_newest_checkpoints_stay(tmp_path):
    trainer(config("training.save_every=1", "training.keep_checkpoints=2"), tmp_path).run()
    assert [path.name for path in list_checkpoints(tmp_path / "checkpoints")] == [
        "step_00000006.pt",
        "step_00000005.pt",
    ]


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(tmp_path):
    trainer(config(), tmp_path).run()
    whole = load_checkpoint(list_checkpoints(tmp_path / "checkpoints")[0])
    newest = list_checkpoints(tmp_path / "checkpoints")[0]
    newest.write_bytes(newest.read_bytes()[:-1000])
    with pytest.warns(UserWarning, match="step_00000006.pt: truncated or damaged"):
        run = trainer(config(), tmp_path)
    assert run.step == 3
    run.run()
    assert_same(load_checkpoint(newest), whole)


def test_pruning_does_not_count_damaged_checkpoints(tmp_path):
    settings = config("training.save_every=1", "training.keep_checkpoints=2")
    trainer(settings, tmp_path).run()
    folder = tmp_path / "checkpoints"
    (folder / "step_00000006.pt").write_bytes(b"")
    (folder / "step_00000009.pt").write_bytes(b"")
    with pytest.warns(UserWarning, match="keeping the damaged file as step_0000000[69].pt.damaged"):
        run = trainer(settings, tmp_path)
    run.train_step()
    run._save()
    assert sorted(path.name for path in folder.iterdir()) == [
        "step_00000005.pt",
        "step_00000006.pt",
        "step_00000006.pt.damaged",
        "step_00000009.pt.damaged",
    ]
    assert load_checkpoint(folder / "step_00000006.pt")["step"] == 6


def test_no_readable_checkpoint_is_an_error_not_a_fresh_start(tmp_path):
    trainer(config(), tmp_path).run()
    for path in list_checkpoints(tmp_path / "checkpoints"):
        path.write_bytes(b"")
    with (
        pytest.warns(UserWarning),
        pytest.raises(ValueError, match="none of the 2 checkpoints can be read"),
    ):
        trainer(config(), tmp_path)


def test_a_checkpoint_of_other_settings_is_an_error(tmp_path):
    trainer(config(), tmp_path).run()
    for key, saved, requested in (
        ("model.max_positions", 40, 36),
        ("model.norm", "sandwich", "pre"),
        ("model.num_pivots", 4, 5),
        ("seed", 0, 1),
        ("training.task", "text_to_image", "captioning"),
        ("data.held_out_fraction", 0.05, 0.1),
        ("image_tokenizer.channels", 1, 3),
    ):
        with pytest.raises(ValueError, match=f"^{key}: .*step 6, was .* {saved}, got {requested};"):
            trainer(config(f"{key}={requested}"), tmp_path)
    changed = ["model.dropout=0", "model.activation_checkpointing=true", "training.steps=7"]
    assert trainer(config(*changed), tmp_path).step == 6


def poison(run: Trainer) -> None:
    with torch.no_grad():
        run.model.transformer.final_layernorm.weight.fill_(float("inf"))


def test_a_loss_that_is_not_finite_stops_training_and_names_the_step(tmp_path):
    run = trainer(config("training.steps=9"), tmp_path)
    train_step = run._train_step

    def step_of_a_diverging_model():
        if run.step == 4:
            poison(run)
        return train_step()

    run._train_step = step_of_a_diverging_model
    with pytest.raises(FloatingPointError, match="training stopped: loss nan .* at step 5"):
        run.run()
    assert load_checkpoint(list_checkpoints(tmp_path / "checkpoints")[0])["step"] == 3


def test_float16_skips_steps_that_overflow_and_counts_them(tmp_path):
    run = trainer(config("training.precision=float16", "training.steps=40"), tmp_path)
    run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)  # far too large for float16
    before = {name: weight.clone() for name, weight in run.model.state_dict().items()}
    first = run.train_step()
    assert first["skipped_steps"] == 1 and first["loss_scale"] == 2.0**39
    assert all(torch.equal(weight, before[name]) for name, weight in run.model.state_dict().items())
    rows = [run.train_step() for _ in range(35)]
    assert rows[-1]["skipped_steps"] == 0  # the loss scale has become small enough
    assert not torch.equal(run.model.word_embeddings.weight, before["word_embeddings.weight"])


def test_data_that_does_not_fit_is_named(tmp_path):
    with pytest.raises(
        ValueError, match="training data: expected 32 image codes .* got 16; encode the data again"
    ):
        trainer(config("image_tokenizer.codebook_size=32"), tmp_path)
    empty = TokenDataset(
        np.empty(0, np.int32), np.zeros(1, np.int64), np.empty((0, 4, 4), np.int16),
        np.empty(0, np.uint64), 20, 16,
    )  # fmt: skip
    with pytest.raises(ValueError, match="held-out data: expected at least one pair"):
        Trainer(config(), tmp_path, dataset(), empty, progress=False)


def test_learning_rate_warms_up_and_decays():
    settings = config("training.steps=100", "training.warmup_steps=10")
    training = settings.training
    rates = [learning_rate(training, step) for step in range(100)]
    assert rates[0] == pytest.approx(training.learning_rate / 10)
    assert max(rates) == rates[9] == rates[10] == training.learning_rate
    assert rates[55] == pytest.approx((training.learning_rate + training.final_learning_rate) / 2)
    assert rates[99] == pytest.approx(training.final_learning_rate, rel=0.02)


def test_a_short_trial_warms_up_in_a_tenth_of_its_steps(tmp_path):
    settings = config("training.steps=20", "training.warmup_steps=500", "training.save_every=20")
    whole, stopped = (trainer(settings, tmp_path / name) for name in ("whole", "stopped"))
    expected = "warmup_steps: 500 is more than a tenth of training.steps = 20: .* for 2 steps"
    with pytest.warns(UserWarning, match=f"^training.{expected}$"):
        whole.run()
    rates = [row["learning_rate"] for row in read_metrics(whole.metrics_path)]
    full = settings.training.learning_rate
    assert rates[:3] == [full / 2, full, full] and max(rates[3:]) < full

    stopped.train_step()  # in the middle of the warm-up
    stopped._save()
    resumed = trainer(settings, tmp_path / "stopped")
    with pytest.warns(UserWarning, match=expected):
        resumed.run()
    assert_same(resumed.model.state_dict(), whole.model.state_dict())


def test_captions_that_are_too_long_are_truncated(tmp_path):
    # 23 positions: 16 codes, 4 commands, 3 pieces of text.
    settings = dataclasses.replace(
        config(), model=dataclasses.replace(config().model, max_positions=23)
    )
    run = trainer(settings, tmp_path)
    batch = run._batch(run.train_data, np.arange(10))
    assert batch.tokens.shape[1] == 23 and int(batch.text_len.max()) == 6


def test_captioning_task_trains(tmp_path):
    trainer(config("training.task=captioning"), tmp_path).run()
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 6


def test_an_unknown_device_is_named():
    with pytest.raises(ValueError, match="device: 'cudda' cannot be used here"):
        choose_device("cudda")


def test_the_split_is_by_image_complete_and_fixed_by_the_seed():
    def keys(part):
        return set(part.image_keys[part.image_of[part.rows]])

    data = dataset(200)
    data.image_keys[:] = np.arange(200) // 4  # four captions for each image
    train, held_out = data.split(0.2, seed=0)
    assert 5 <= len(held_out) // 4 <= 15 and len(held_out) % 4 == 0
    assert not keys(train) & keys(held_out)
    rows = sorted(
        tuple(text) for part in (train, held_out) for text, _ in (part[i] for i in range(len(part)))
    )
    assert rows == sorted(tuple(data[i][0]) for i in range(200))
    assert np.array_equal(data.split(0.2, seed=0)[1].rows, held_out.rows)
    assert keys(data.split(0.2, seed=1)[1]) != keys(held_out)
    # Others stay where they are when images are added.
    fewer = data.select(np.arange(100)).split(0.2, seed=0)[1]
    assert keys(fewer) == keys(held_out) & set(range(25))
    assert [len(part) for part in dataset(2).split(1e-9, seed=0)] == [1, 1]
    with pytest.raises(ValueError, match="at least 2 different images"):
        dataset(1).split(0.2, seed=0)


def test_a_given_model_is_trained_and_its_batches_are_observed(tmp_path):
    """`make_model` draws its weights from the seed, whatever was drawn before; `on_batch` sees
    what the model is trained on, not the held-out pairs, and changes nothing."""

    class Marked(GPT):
        pass

    settings = config("training.micro_batch_size=2")
    torch.manual_seed(5)
    usual = trainer(settings, tmp_path / "usual")
    seen = []
    torch.manual_seed(6)
    observed = Trainer(
        settings,
        tmp_path / "observed",
        dataset(),
        dataset(4, 1),
        progress=False,
        make_model=Marked,
        on_batch=seen.append,
    )
    assert type(observed.model) is Marked
    assert_same(dict(usual.model.state_dict()), dict(observed.model.state_dict()))
    usual.run()
    observed.run()
    assert_same(dict(usual.model.state_dict()), dict(observed.model.state_dict()))
    assert len(seen) == 6 * 2
    known = [make_batch(settings, dataset(), [index]).tokens[0].tolist() for index in range(10)]
    for batch in seen:
        assert batch.tokens.shape[0] == 2
        for row in batch.tokens.tolist():
            assert any(row[: len(one)] == one for one in known)


def test_the_largest_hidden_values_are_logged(tmp_path):
    trainer(config("training.micro_batch_size=2"), tmp_path).run()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    for step, row in enumerate(rows, 1):
        layers = [row[name] for name in sorted(row) if re.fullmatch(r"max_hidden_\d\d", name)]
        assert len(layers) == (2 if step % 3 == 0 else 0)
        assert row["max_hidden"] > 0 and row["max_hidden"] == max(layers or [row["max_hidden"]])


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_layers_train_the_same_and_resume(tmp_path, monkeypatch, backend):
    """With three-region attention, activation checkpointing and lengths that differ from step to
    step: one graph each for training, for training with any length, and for the held-out loss."""
    chosen = functools.partialmethod(GPT.compile_layers, backend)
    monkeypatch.setattr(GPT, "compile_layers", chosen)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    settings = ["model.dropout=0", "model.activation_checkpointing=true"]
    trainer(config(*settings), tmp_path / "eager").run()
    compiled = trainer(config(*settings, "training.compile=true"), tmp_path / "compiled")
    assert compiled.model.state_dict().keys() == GPT(compiled.config.model, 64).state_dict().keys()
    compiled.run()
    draw_images(compiled.model, compiled.config, [[1, 2]], progress=False)  # compiles nothing
    assert counters["stats"]["unique_graphs"] == 3 and not counters["graph_break"]
    eager, ours = (without_seconds(tmp_path / name) for name in ("eager", "compiled"))
    for one, other in zip(eager, ours, strict=True):
        assert other == pytest.approx(one, rel=1e-4)

    whole = load_checkpoint(list_checkpoints(tmp_path / "compiled" / "checkpoints")[0])
    list_checkpoints(tmp_path / "compiled" / "checkpoints")[0].unlink()
    resumed = trainer(config(*settings, "training.compile=true"), tmp_path / "compiled")
    assert resumed.step == 3
    resumed.run()
    after = load_checkpoint(list_checkpoints(tmp_path / "compiled" / "checkpoints")[0])
    assert_same(whole["model"], after["model"])


@pytest.mark.parametrize("native", [True, False])
def test_auto_takes_float16_on_gpus_without_bfloat16(monkeypatch, native):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    gpu = torch.device("cuda", 0)
    assert compute_dtype("auto", gpu) == (torch.bfloat16 if native else torch.float16)
    for amx, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        assert compute_dtype("auto", torch.device("cpu")) == expected
    assert compute_dtype("float32", gpu) == torch.float32
    assert compute_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16

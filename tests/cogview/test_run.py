"""Runs that are interrupted, mixed up or changed: through the commands, with real signals."""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_cli import SMALL, cogview, error, photos, sets  # noqa: F401
from test_train import assert_same, without_seconds

from cogview.checkpoint import list_checkpoints, load_checkpoint
from cogview.config import load_config
from cogview.demo import main as demonstration
from cogview.image_training import ImageTokenizerTrainer
from cogview.loop import Loop, read_metrics
from cogview.run import Run
from cogview.text_tokenizer import TextTokenizer

# Its children have torch already, and no threads.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["cogview.cli", "cogview.run", "torch.utils.tensorboard", "torch._dynamo", __name__]
)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds `photos`, and `run`: 4 finished steps of the GPT."""
    folder = tmp_path_factory.mktemp("first")
    data = photos.__wrapped__(folder)  # type: ignore[attr-defined]
    new = ["--preset", "small", *sets(*SMALL)]
    run = ["--run", folder / "run"]
    for command in (
        ["train-text-tokenizer", *run, "--data", data, *new],
        ["train-image-tokenizer", *run, "--data", data],
        ["encode", *run, "--data", data],
        ["train", *run],
    ):
        assert cogview(*command, "--quiet") == 0
    return folder


@pytest.fixture
def run(first: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(first / "run", tmp_path / "copy"))


def child(arguments: list[str], log: str, prepare: Callable[[], object] | None) -> None:
    """In a process of its own: the command, its standard error in a file."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 2)
    sys.stderr = os.fdopen(2, "w", closefd=False)
    torch.set_num_threads(1)
    if prepare is not None:
        prepare()
    sys.exit(cogview(*arguments))


@contextlib.contextmanager
def running(
    log: Path, *arguments: object, prepare: Callable[[], object] | None = None
) -> Iterator[BaseProcess]:
    process = PROCESSES.Process(target=child, args=([*map(str, arguments)], str(log), prepare))
    process.start()
    try:
        yield process
        process.join(120)
    finally:
        process.kill()
        process.join()


def wait_for_steps(process: BaseProcess, folder: Path, steps: int) -> None:
    while process.is_alive() and len(read_metrics(folder / "metrics.jsonl")) < steps:
        time.sleep(0.002)


def end_of(folder: Path) -> dict[str, object]:
    return load_checkpoint(list_checkpoints(folder / "checkpoints")[0])


def content(path: Path) -> dict[str, bytes]:
    """Of a file, or of the files in a folder."""
    files = path.glob("[!.]*") if path.is_dir() else [path]
    return {file.name: file.read_bytes() for file in files}


LONG = ["training.steps=150", "training.save_every=7", "training.eval_every=10"]
LONG_IMAGES = [setting.replace("training", "image_training") for setting in LONG]


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("moments", [2, pytest.param(10, marks=pytest.mark.slow)])
@pytest.mark.parametrize("part", ["gpt", "image tokenizer"])
def test_killed_at_random_moments(first: Path, tmp_path: Path, part: str, moments: int) -> None:
    """SIGTERM and SIGKILL in turn; then weights, moments and log are those of a run that was never
    interrupted."""
    command: list[object] = ["train", "--quiet", *sets(*LONG)]
    parts = ["checkpoints", "metrics.jsonl", "tensorboard", "pictures"]
    if part == "image tokenizer":
        command = ["train-image-tokenizer", "--data", first / "photos", "--quiet"]
        command += sets(*LONG_IMAGES)
        parts = ["checkpoints", "image_training", "image_tokenizer.pt"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for run in (whole, killed):
        shutil.copytree(first / "run", run, ignore=shutil.ignore_patterns(*parts))
    assert cogview(*command, "--run", whole) == 0

    generator = random.Random(part)
    folders = [run / ("" if part == "gpt" else "image_training") for run in (whole, killed)]
    for number in range(moments):
        came = (signal.SIGTERM, signal.SIGKILL)[number % 2]
        log = tmp_path / f"log {number}"
        logged = len(read_metrics(folders[1] / "metrics.jsonl"))
        with running(log, *command, "--run", killed) as process:
            # After a kill the log is ahead of the checkpoint, until the next process cuts it.
            wait_for_steps(process, folders[1], logged + generator.randrange(1, 7))
            time.sleep(generator.uniform(0, 0.05))
            assert process.pid is not None
            os.kill(process.pid, came)
        assert process.exitcode == (143 if came == signal.SIGTERM else -9), log.read_text()
        if came == signal.SIGTERM:
            saved = re.search(r"stopped by SIGTERM after step (\d+), which", log.read_text())
            assert saved and end_of(folders[1])["step"] == int(saved[1])
    assert cogview(*command, "--run", killed) == 0

    ends = [end_of(folder) for folder in folders]
    assert ends[0]["step"] == 150
    assert_same(*ends)
    rows = [without_seconds(folder) for folder in folders]
    assert [row["step"] for row in rows[1]] == list(range(1, 151))
    for one, other in zip(*rows, strict=True):
        # A signal in the step before a measurement leaves the measurement out.
        assert one.items() >= other.items() if one["step"] % 10 == 0 else one == other
    assert rows[0][-1] == rows[1][-1] and "held_out_loss" in rows[1][-1] or part != "gpt"
    if part != "gpt":
        tokenizers = [Run.open(run).image_tokenizer() for run in (whole, killed)]
        assert tokenizers[0].fingerprint == tokenizers[1].fingerprint


def slow_steps() -> None:
    """Each step after the second takes half a minute."""
    step = Loop.train_step

    def slow(self: Loop) -> dict[str, float]:
        if self.step >= 6:
            Path(self.folder / "slow").touch()
            time.sleep(30)
        return step(self)

    mock.patch.object(Loop, "train_step", slow).start()


def test_ctrl_c_once_saves_and_twice_ends_at_once(run: Path, tmp_path: Path) -> None:
    command = ["train", "--quiet", "--run", run, *sets("training.steps=900")]
    with running(tmp_path / "once", *command) as process:
        wait_for_steps(process, run, 5)
        os.kill(process.pid or 0, signal.SIGINT)
    assert process.exitcode == 130
    said = re.search(r"stopped by SIGINT after step (\d+), which", (tmp_path / "once").read_text())
    assert said and end_of(run)["step"] == int(said[1])

    with running(tmp_path / "twice", *command, prepare=slow_steps) as process:
        while not (run / "slow").exists():
            time.sleep(0.01)
        began = time.monotonic()
        for wanted in ("SIGINT: saving after this step; again to stop at once", "stopped"):
            while wanted not in (tmp_path / "twice").read_text():
                os.kill(process.pid or 0, signal.SIGINT)
                time.sleep(0.5)
    assert process.exitcode == 130 and time.monotonic() - began < 20
    assert end_of(run)["step"] == max(6, int(said[1]))


def full_standard_error() -> None:
    """Standard error is a pipe that nobody reads for a while; a signal comes while a step waits to
    write to it."""
    step, (reading, writing) = Loop.train_step, os.pipe()

    def read_late() -> None:
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)
        while os.read(reading, 1 << 16):
            pass

    def noisy(self: Loop) -> dict[str, float]:
        if self.step == 5:
            os.dup2(writing, 2)
            threading.Thread(target=read_late, daemon=True).start()
            print(80_000 * "x", file=sys.stderr, flush=True)
        return step(self)

    mock.patch.object(Loop, "train_step", noisy).start()


def test_a_signal_while_standard_error_is_full(run: Path, tmp_path: Path) -> None:
    command = ["train", "--quiet", "--run", run, *sets("training.steps=900")]
    with running(tmp_path / "log", *command, prepare=full_standard_error) as process:
        pass
    assert process.exitcode == 143 and end_of(run)["step"] == 6


def test_a_second_process_is_refused_and_a_reader_is_not(
    run: Path, first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = sets("training.steps=100000", "training.save_every=1", "training.keep_checkpoints=1")
    with running(tmp_path / "log", "train", "--quiet", "--run", run, *settings) as process:
        wait_for_steps(process, run, 6)
        for command in (
            ["train", "--run", run, *sets("training.steps=3")],
            ["encode", "--run", run, "--data", first / "photos"],
            ["train-image-tokenizer", "--run", run, "--data", first / "photos"],
            ["train-text-tokenizer", "--run", run, "--data", first / "photos"],
        ):
            refused = error(capsys, *command)
            assert f"in use by process {process.pid} on " in refused and str(run) in refused
        # Checkpoints come and go meanwhile.
        assert cogview("sample", "--quiet", "--run", run, "a red wall") == 0
        assert load_config(run / "config.yaml").training.steps == 100_000
        assert process.is_alive()
        os.kill(process.pid or 0, signal.SIGTERM)
    assert process.exitcode == 143
    assert cogview("train", "--run", run, "--quiet", *sets("training.steps=1")) == 0  # free again


def other_text_tokenizer(run: Path) -> None:
    captions = ["a blue red wall", "the other words", "and some more of them here"]
    TextTokenizer.train(captions, run / "text_tokenizer.model", 20)


def other_image_tokenizer(run: Path) -> None:
    tokenizer = Run.open(run).image_tokenizer()
    with torch.no_grad():
        tokenizer.quantize_t.embed[:, 0] += 1
    tokenizer.save(run / "image_tokenizer.pt")


@pytest.mark.parametrize("replace", [other_text_tokenizer, other_image_tokenizer])
def test_another_tokenizer_under_a_finished_run_is_an_error(
    run: Path,
    first: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    replace: Callable[[Path], None],
) -> None:
    name = replace.__name__.removeprefix("other_").replace("_", " ")
    writer = tmp_path / "writer"
    shutil.copytree(run, writer, ignore=shutil.ignore_patterns("checkpoints", "metrics.jsonl"))
    task = sets("training.task=captioning", "training.steps=1")
    assert cogview("train", "--run", writer, "--quiet", *task) == 0
    photo = first / "photos" / "red0.png"
    assert cogview("caption", "--run", writer, photo, "--quiet") == 0
    for folder in (run, writer):
        replace(folder)
    for command in (["sample", "--run", run, "a wall"], ["caption", "--run", writer, photo]):
        said = error(capsys, *command)
        assert f"step {1 if 'caption' in command else 4}, was trained with another {name}" in said
        assert "Put the old one back" in said
    assert not (run / "samples").exists()
    said = error(capsys, "train", "--run", run)
    assert f"tokens: made with another {name}" in said and "run cogview encode again" in said
    # Encoding again is possible; going on with weights of other tokens is not.
    assert cogview("encode", "--run", run, "--data", first / "photos", "--quiet") == 0
    assert f"was trained with another {name}" in error(capsys, "train", "--run", run)
    assert f"was trained with another {name}" in error(capsys, "sample", "--run", run, "a wall")


def test_a_tokenizer_under_a_trained_model_is_not_replaced(
    run: Path, first: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (run / "text_tokenizer.model").read_bytes()
    fingerprint = Run.open(run).image_tokenizer().fingerprint
    data = shutil.copytree(first / "photos", run.parent / "photos")
    assert cogview("train-text-tokenizer", "--run", run, "--data", data, "--quiet") == 0  # the same
    captions = (data / "captions.tsv").read_text()
    (data / "captions.tsv").write_text(captions.replace("wall", "lawn"))
    said = error(capsys, "train-text-tokenizer", "--run", run, "--data", data)
    assert "trained with the text tokenizer in the folder, and useless with another" in said
    more = sets("image_training.steps=9")
    again = ["train-image-tokenizer", "--run", run, "--quiet", "--data", first / "photos"]
    assert cogview(*again) == 0  # there is nothing to train: the same
    assert cogview(*again, *more) == 2
    said = capsys.readouterr().err
    assert "trained with the image tokenizer in the folder" in said
    said = error(capsys, "train-image-tokenizer", "--run", run, "--data", data, *more)
    assert "trained with the image tokenizer in the folder" in said  # captions do not matter
    shutil.copy(data / "red1.png", data / "red0.png")
    Image.new("RGB", (9, 9)).save(data / "red1.png")
    said = error(capsys, "train-image-tokenizer", "--run", run, "--data", data, *more)
    assert "was trained with other images" in said
    assert load_config(run / "config.yaml").image_training.steps == 5
    assert (run / "text_tokenizer.model").read_bytes() == before
    assert Run.open(run).image_tokenizer().fingerprint == fingerprint


def test_held_out_images_that_the_image_tokenizer_saw_are_an_error(
    run: Path, first: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """By other settings, by a column that came later, and in a run that starts from this one; not
    where the data is other data."""
    shutil.rmtree(run / "checkpoints")
    for setting in ("data.held_out_fraction=0.7", "seed=1"):
        said = error(capsys, "train", "--run", run, *sets(setting))
        assert re.search(r"held_out of the data: \d of \d held-out images are among those", said)
    data = shutil.copytree(first / "photos", tmp_path / "photos")
    lines = (data / "captions.tsv").read_text().splitlines()
    rows = [f"{line}\t{number < 8}\n" for number, line in enumerate(lines)]
    (data / "captions.tsv").write_text("path\tcaption\theld_out\n" + "".join(rows))
    assert cogview("encode", "--run", run, "--data", data, "--quiet") == 0
    assert "of 3 held-out images are among those" in error(capsys, "train", "--run", run)

    before, new = first / "run", tmp_path / "new"
    init = ["--init-from", before, *sets("seed=1", "data.held_out_fraction=0.3")]
    assert "held-out images are among those" in error(capsys, "train", "--run", new, *init)
    for number, file in enumerate(data.glob("*.png")):
        Image.new("RGB", (9, 9), (number, 0, 0)).save(file)
    encode = ["encode", "--run", tmp_path / "newer", "--data", data, *init]
    assert cogview(*encode, "--quiet") == 0
    assert cogview("train", "--run", tmp_path / "newer", "--quiet") == 0


def said_by(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Standard error of a command that succeeds."""
    capsys.readouterr()
    assert cogview(*arguments, "--quiet") == 0
    return capsys.readouterr().err


def test_changed_settings_are_announced_or_refused(
    run: Path, first: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = ["train", "--run", run]
    for setting, named in (
        ("training.steps=0", "training.steps: expected 1 or more"),
        ("training.batch_size=-1", "training.batch_size: expected 1 or more"),
        ("training.learning_rate=0", "training.learning_rate: expected more than 0"),
        ("training.learning_rate=1e-9", "training.final_learning_rate: expected at most"),
        ("training.learning_rate=much", "training.learning_rate"),
        ("seed=1", "seed, or held_out of the data: "),
        ("data.held_out_fraction=0.7", "data.held_out_fraction, seed, or "),
        ("model.num_layers=2", "model.num_layers: "),
        ("training.task=captioning", "training.task: "),
    ):
        assert named in error(capsys, *train, *sets(setting)), setting
    assert load_config(run / "config.yaml").seed == 0

    changed = sets("training.steps=9", "training.batch_size=3", "training.learning_rate=1e-3")
    changed += sets("training.weight_decay=0.5", "model.dropout=0.2")
    said = said_by(capsys, *train, *changed)
    for expected in (
        "gpt: resuming at step 4 with other settings: ",
        "training.steps 4 -> 9",
        "training.batch_size 4 -> 3",
        "training.learning_rate 0.0006 -> 0.001",
        "training.weight_decay 0.04 -> 0.5",
        "model.dropout 0.1 -> 0.2",
        "the learning rate goes on at 0.000612 instead of 6e-05",
        "the data goes on behind the 16 examples read so far",
    ):
        assert expected in said
    state = end_of(run)
    assert state["examples"] == 16 + 5 * 3
    assert state["optimizer"]["param_groups"][0]["weight_decay"] == 0.5  # type: ignore[index]
    assert said_by(capsys, *train) == ""  # announced once
    assert "there is nothing to do: the run is at step 9" in said_by(
        capsys, *train, *sets("training.steps=5")
    )

    gumbel = ["image_tokenizer.quantizer=gumbel", "image_training.steps=4"]
    images = [*SMALL, *gumbel, "image_training.save_every=2"]
    command = ["train-image-tokenizer", "--run", run / "gumbel", "--data", first / "photos"]
    assert said_by(capsys, *command, "--preset", "small", *sets(*images)) == ""
    said = said_by(capsys, *command, *sets("image_training.steps=8", "image_tokenizer.kl_weight=1"))
    assert "image_tokenizer.kl_weight 0.0 -> 1.0" in said
    assert "the temperature goes on at 0.25 instead of 0.0625" in said
    assert "image_tokenizer.mean: " in error(
        capsys, *command, *sets("image_tokenizer.mean=[0.5,0.5,0.5]")
    )


def test_other_data_is_refused(
    run: Path, first: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    data = shutil.copytree(first / "photos", tmp_path / "photos")
    captions = (data / "captions.tsv").read_text()
    (data / "captions.tsv").write_text(captions.replace("red", "green"))
    tokens = content(run / "tokens")
    assert cogview("encode", "--run", run, "--data", data, "--quiet") == 0
    said = error(capsys, "train", "--run", run, *sets("training.steps=9"))
    assert "step 4, was trained with other tokens" in said and "order of reading" in said
    assert cogview("encode", "--run", run, "--data", first / "photos", "--quiet") == 0
    assert content(run / "tokens") == tokens
    assert cogview("train", "--run", run, "--quiet", *sets("training.steps=9")) == 0

    # Tokens of another folder.
    other = shutil.copytree(run, tmp_path / "other", ignore=shutil.ignore_patterns("checkpoints"))
    other_image_tokenizer(other)
    assert cogview("encode", "--run", other, "--data", data, "--quiet") == 0
    shutil.rmtree(run / "tokens")
    shutil.copytree(other / "tokens", run / "tokens")
    said = error(capsys, "train", "--run", run)
    assert "made with another image tokenizer" in said and "run cogview encode again" in said


def test_settings_edited_by_hand_and_parts_that_are_missing(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = run / "config.yaml"
    written = config.read_text()
    both = sample, train = ["sample", "--run", run, "a wall"], ["train", "--run", run]
    for before, after, key, commands in (
        ("codebook_size: 16", "codebook_size: 17", "image_tokenizer.codebook_size", both),
        ("- 0.79093", "- 0.5", "image_tokenizer.mean", both),
        ("vocab_size: 20", "vocab_size: 19", "text_tokenizer.vocab_size", both),
        ("task: text_to_image", "task: captioning", "training.task", both),
    ):
        assert before in written
        config.write_text(written.replace(before, after))
        for command in commands:
            said = error(capsys, *command)
            assert f"cogview: error: {key}: " in said, (key, command)
    config.write_text(written.replace("task: text_to_image", "task: captioning"))
    Run.open(run, ["training.task=text_to_image"]).draw(["a wall"])
    (first,) = run.parent.glob("*/pictures/*.png")
    assert "training.task: " in error(capsys, "caption", "--run", run, first)
    config.write_text(written)

    (run / "metrics.jsonl").unlink()
    more = sets("training.steps=6")
    said = said_by(capsys, *train, *more)
    assert "metrics.jsonl: 4 of the 4 steps before the checkpoint are missing" in said
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl")] == [5, 6]

    for path in list_checkpoints(run / "checkpoints"):
        state = load_checkpoint(path)
        del state["made_from"]["image tokenizer"]
        torch.save(state, path)
    for command in (sample, train):
        said = error(capsys, *command)
        assert "does not say which image tokenizer it was trained with" in said
    shutil.rmtree(run / "checkpoints")
    assert said_by(capsys, *train) == ""
    assert len(read_metrics(run / "metrics.jsonl.old")) == 2  # nothing is thrown away


def small_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))


def test_a_full_disk_loses_nothing(run: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: checkpoints do not fit."""
    before = end_of(run)
    command = ["train", "--run", run, "--quiet", *sets("training.steps=6")]
    with running(tmp_path / "log", *command, prepare=small_files) as process:
        pass
    said = (tmp_path / "log").read_text()
    assert process.exitcode == 2 and "step_00000006.pt: not saved: File too large" in said
    assert "Traceback" not in said
    assert_same(end_of(run), before)
    assert not list((run / "checkpoints").glob(".*"))
    assert cogview(*command) == 0 and end_of(run)["step"] == 6


def test_a_loss_that_is_not_finite_names_the_settings(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(run / "checkpoints")
    said = error(capsys, "train", "--run", run, *sets("training.learning_rate=1e30"))
    assert "training stopped: loss" in said
    assert "a lower training.learning_rate or a longer training.warmup_steps" in said
    for path in list_checkpoints(run / "checkpoints"):
        load_checkpoint(path)  # refuses weights that are not finite


def killed_before_the_rename() -> None:
    mock.patch.object(os, "replace", lambda *_: os.kill(os.getpid(), signal.SIGKILL)).start()


@pytest.mark.parametrize("command", ["encode", "train-text-tokenizer"])
def test_killed_midway_the_old_file_stays(
    run: Path, first: Path, tmp_path: Path, command: str
) -> None:
    shutil.rmtree(run / "checkpoints")
    path = run / ("tokens" if command == "encode" else "text_tokenizer.model")
    before = content(path)
    data = shutil.copytree(first / "photos", tmp_path / "photos")
    captions = (data / "captions.tsv").read_text()
    (data / "captions.tsv").write_text(captions.replace("wall number", "barn number"))
    arguments = [command, "--run", run, "--data", data, "--quiet"]
    with running(tmp_path / "log", *arguments, prepare=killed_before_the_rename) as process:
        pass
    assert process.exitcode == -signal.SIGKILL
    assert content(path) == before
    assert cogview(*arguments) == 0 and content(path) != before
    assert not list(run.rglob(".*partial*"))


def test_unknown_characters_are_said(
    run: Path, first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = said_by(capsys, "sample", "--run", run, "a ☃ wall", "a red wall", "☃ χ")
    assert "2 captions with characters that the text tokenizer has no piece for" in said
    assert said.rstrip().endswith("☃ χ")
    data = shutil.copytree(first / "photos", tmp_path / "photos")
    captions = (data / "captions.tsv").read_text()
    (data / "captions.tsv").write_text(captions.replace("a blue", "☃"), encoding="utf-8")
    assert "3 captions with characters" in said_by(capsys, "encode", "--run", run, "--data", data)


def test_drawing_from_python_and_settings_between_captions(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = Run.open(run).draw(["a red wall", "a blue wall"], seed=3)
    assert drawn.shape == (2, 3, 16, 16) and drawn.dtype == torch.float32
    assert 0 <= drawn.min() and drawn.max() <= 1
    assert torch.equal(Run.open(run).draw(["a red wall", "a blue wall"], seed=3), drawn)
    assert not torch.equal(Run.open(run).draw(["a red wall", "a blue wall"], seed=4), drawn)
    with pytest.warns(UserWarning, match="^sampling.guidance: 2, of a model .* without a caption"):
        Run.open(run, ["sampling.guidance=2"]).draw(["a red wall"])
    with pytest.raises(TypeError, match="captions: expected a list of captions, got one string"):
        Run.open(run).draw("a red wall")
    settings = ["--set", "sampling.temperature=0.5", "a red wall", "a blue wall"]
    assert cogview("sample", "--run", run, "--quiet", *settings) == 0
    assert len(list((run / "samples").glob("0*.png"))) == 2
    for caption in ("model.num_layers=2", "training.steps=3"):
        said = error(capsys, "sample", "--run", run, "a wall", caption)
        assert f"{caption!r} looks like a setting; give it behind --set" in said


def test_a_training_without_a_terminal_says_where_it_is(
    run: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """The lines of the log; TensorBoard's curves, settings and pictures; the picture files."""
    arguments = sets("training.steps=8", "training.log_every=2", "training.pictures_every=4")
    with caplog.at_level(logging.INFO), mock.patch("logging.basicConfig"):
        assert cogview("train", "--run", run, *arguments) == 0
    number = r"[\d,]+"
    assert len(caplog.messages) == 2
    for step, line in zip((6, 8), caplog.messages, strict=True):
        assert re.fullmatch(
            rf"gpt step {step}/8, loss \d\.\d{{4}}, held-out \d\.\d{{4}}, {number} tokens/s, "
            rf"\d\d:\d\d to go, peak memory \d\.\d\d GB, saved {step}",
            line,
        ), line
    with Image.open(run / "pictures" / "step_00000008.png") as pictures:
        assert pictures.size == (52, 34)  # three held-out images, and the drawings below them
    board = EventAccumulator(str(run / "tensorboard")).Reload()
    tags = board.Tags()
    assert {"loss", "held_out_loss", "learning_rate", "tokens_per_second"} <= {*tags["scalars"]}
    losses = {event.step: event.value for event in board.Scalars("loss")}
    rows = {int(row["step"]): row["loss"] for row in read_metrics(run / "metrics.jsonl")}
    assert losses.keys() == rows.keys() == set(range(1, 9))
    assert np.allclose([losses[step] for step in rows], [*rows.values()])
    assert any(tag.startswith("gpt") for tag in tags["images"])
    assert "settings/text_summary" in tags["tensors"]

    caplog.clear()
    images = Run.open(run)
    with caplog.at_level(logging.INFO), warnings.catch_warnings():
        ImageTokenizerTrainer(
            images.config, tmp_path / "images", torch.rand(8, 3, 16, 16), torch.rand(4, 3, 16, 16)
        ).run()
    assert re.search(r"\d+ of 16 codes used \(perplexity \d+\.\d\), \d+ revived", caplog.text)
    rows_of_images = read_metrics(tmp_path / "images" / "metrics.jsonl")
    assert {"held_out_perplexity", "held_out_codes_used"} <= rows_of_images[-1].keys()


def test_help_does_not_wait_for_torch() -> None:
    program = (
        "import sys, cogview.cli as c\n"
        "try: c.main(['sample', '--help'])\n"
        "except SystemExit: pass\n"
        "slow = {'torch', 'numpy', 'omegaconf', 'matplotlib', 'safetensors'}\n"
        "assert not slow & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


def small_demonstration() -> None:
    for name, value in (("NUM_TRAIN_SCENES", 24), ("NUM_TEST_SCENES", 4)):
        mock.patch.object(demonstration, name, value).start()
    reader = partial(demonstration.DigitReader, num_scenes=20)
    mock.patch.object(demonstration, "DigitReader", reader).start()


def test_a_killed_demonstration_goes_on(tmp_path: Path) -> None:
    small = sets(
        *("image_tokenizer.hidden=4", "image_training.steps=3", "model.num_layers=1"),
        *("model.hidden_size=16", "training.steps=40", "training.save_every=3"),
        *("training.batch_size=2", "training.eval_every=100", "device=cpu"),
    )
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    command = ["demo", "--quiet", *small, "--out"]
    for came in (signal.SIGKILL, signal.SIGTERM):
        logged = len(read_metrics(killed / "metrics.jsonl"))
        log = tmp_path / "log"
        with running(log, *command, killed, prepare=small_demonstration) as process:
            wait_for_steps(process, killed, logged + 5)
            os.kill(process.pid or 0, came)
        assert process.exitcode == (-9 if came == signal.SIGKILL else 143), log.read_text()
    for folder in (killed, whole):
        with running(tmp_path / "log", *command, folder, prepare=small_demonstration) as process:
            pass
        assert process.exitcode == 0, (tmp_path / "log").read_text()
    assert_same(end_of(killed), end_of(whole))
    results = [json.loads((folder / "metrics.json").read_text()) for folder in (killed, whole)]
    assert [result["resumed"] for result in results] == [True, False]
    assert results[0]["accuracy"] == results[1]["accuracy"]
    assert {path.name for path in whole.glob("*.png")} == {
        "samples.png",
        "reconstructions.png",
        "curves.png",
    }

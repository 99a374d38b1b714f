"""The training loop that the image tokenizer and the GPT share.

What a step computes is a function of the settings, the step and the number of examples read before
it. A checkpoint therefore needs no generator states, and a resumed run gives the same bits as one
that was never interrupted.

A run writes into its folder:

    checkpoints/     the newest ones; `training.keep_checkpoints` of them
    metrics.jsonl    one line per step
    tensorboard/     the same, and the pictures, for `tensorboard --logdir`
    pictures/        what the model makes of a few held-out examples, every `pictures_every` steps
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import resource
import signal
import sys
import threading
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from cogview import distributed
from cogview.checkpoint import (
    ShardedSave,
    check_settings,
    checkpoint_path,
    is_sharded,
    load_latest,
    prune_checkpoints,
    restore,
    save_checkpoint,
    training_state,
)
from cogview.config import Config, LoopConfig, to_yaml
from cogview.data.images import picture_grid, to_pillow
from cogview.data.loading import Reader
from cogview.files import atomic_write

# Under float16, a step is skipped if a gradient is not finite. After more such steps in a row,
# training stops.
MAX_SKIPPED_STEPS = 50
SECONDS_BETWEEN_LINES = 10.0

log = logging.getLogger(__name__)


class Stopped(Exception):
    """A signal ended the training between two steps, after a checkpoint was written.

    Attributes:
        signal: `signal.SIGTERM` or `signal.SIGINT`.
        step: number of finished steps, all of them in the checkpoint.
    """

    def __init__(self, signum: int, step: int) -> None:
        self.signal = signal.Signals(signum)
        self.step = step
        super().__init__(f"stopped by {self.signal.name} after step {step}, which is saved")


def choose_device(name: str) -> torch.device:
    """The device `cpu`, `cuda:1`, ...; `auto` is CUDA if there is a GPU, else the CPU.

    Raises:
        ValueError: this machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the type depends on the build of torch
        raise ValueError(
            f"device: {name!r} cannot be used here: {str(error).splitlines()[0]}"
        ) from None
    return device


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of activations for a `precision`. `auto` is bfloat16 on devices that
    multiply matrices in it: GPUs, and CPUs with AMX. It is float16 on older GPUs (before compute
    capability 8.0), and float32 on other CPUs."""
    if precision != "auto":
        dtype = getattr(torch, precision)
        assert isinstance(dtype, torch.dtype)
        return dtype
    if device.type != "cuda":
        return torch.bfloat16 if torch.cpu._is_amx_tile_supported() else torch.float32
    with torch.cuda.device(device):
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float16


def learning_rate(settings: LoopConfig, step: int) -> float:
    """Linear warm-up to `learning_rate`, then a cosine down to `final_learning_rate`."""
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    progress = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return (
        settings.final_learning_rate
        + (settings.learning_rate - settings.final_learning_rate) * cosine
    )


def step_seed(seed: int, step: int, example: int = 0) -> int:
    """The seed of a step's random numbers, from the example with this position in its batch on."""
    return int(np.random.SeedSequence([seed, step, example]).generate_state(1, np.uint64)[0] >> 1)


class Loop(ABC):
    """A training run; resumes from the newest checkpoint in its folder.

    A subclass makes the model and calls `_resume` at the end of its constructor.

    Args:
        config: all settings of the run.
        settings: those of this loop, a section of `config`.
        folder: where the results go; created if necessary.
        made_from: fingerprints of what the model is trained on, by name.
        progress: show a progress bar if standard error is a terminal, else lines in the log.

    Attributes:
        model: on the device.
        step: number of finished optimizer steps.
        examples: number of examples that these steps have read.

    Raises:
        ValueError: a checkpoint has other settings or was made from other data, or there are
            checkpoints but none can be read.
    """

    name: str  # for people
    unit: str  # what is counted per second: a name in the metrics of a step
    sections: tuple[str, ...]  # of the settings that the training depends on
    fixed_settings: tuple[str, ...]  # that must not change between a checkpoint and now
    model: nn.Module
    optimizer: torch.optim.Optimizer
    reader: Reader[Any]  # of the batches

    def __init__(
        self,
        config: Config,
        settings: LoopConfig,
        folder: str | os.PathLike[str],
        made_from: Mapping[str, str] | None = None,
        progress: bool = True,
    ) -> None:
        self.config = config
        self.settings = settings
        self.folder = Path(folder)
        self.checkpoints = self.folder / "checkpoints"
        self.metrics_path = self.folder / "metrics.jsonl"
        self.made_from = dict(made_from or {})
        self.progress = progress
        self.device = choose_device(config.device)
        self.dtype = compute_dtype(settings.precision, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.step = 0
        self.examples = 0
        self.skipped_steps = 0  # number of steps in a row without an update
        self.saved = 0  # step of the newest complete checkpoint
        self._saving: ShardedSave | None = None

    @abstractmethod
    def _train_step(self) -> dict[str, float]:
        """One optimizer step: its metrics, among them `loss` and the number of `self.unit`."""

    @abstractmethod
    def evaluate(self) -> dict[str, float]:
        """Measurements on held-out examples: every call on the same ones."""

    def pictures(self) -> Tensor | None:
        """Pictures (2 N, C, H, W) in [0, 1] that show what the model can do, if any: N real ones,
        and what it makes of each."""
        return None

    def schedule(self, settings: LoopConfig, step: int) -> dict[str, float]:
        """What changes from step to step by a rule, under these settings: by name."""
        return {"learning rate": learning_rate(settings, step)}

    def in_words(self, metrics: Mapping[str, float]) -> str:
        """What a line of the log says of a step beside its loss."""
        return ""

    def run(self) -> None:
        """Trains up to `settings.steps`, and leaves the model in evaluation mode.

        Raises:
            Stopped: SIGTERM or Ctrl-C came; the step that was running is finished and saved.
            FloatingPointError: the loss or a gradient is not finite; the message names the step.
                Under float16 such a step is skipped, and more than `MAX_SKIPPED_STEPS` in a row are
                an error.
            OSError: a checkpoint or the metrics cannot be written; earlier checkpoints are intact.
        """
        settings = self.settings
        if self.step >= settings.steps:
            self.model.eval()
            return
        first = distributed.is_first()
        if first and settings.warmup < settings.warmup_steps:
            warnings.warn(
                f"{settings.section}.warmup_steps: {settings.warmup_steps} is more than a tenth of "
                f"{settings.section}.steps = {settings.steps}: the learning rate rises for "
                f"{settings.warmup} steps",
                stacklevel=2,
            )
        if settings.batch_size > (available := self.reader.num_examples):
            warnings.warn(
                f"{settings.section}.batch_size: {settings.batch_size} examples per step, of "
                f"{available} in all: a step reads some more than once",
                stacklevel=2,
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        devices = [self.device] if self.device.type == "cuda" else []
        bar = tqdm(
            initial=self.step,
            total=settings.steps,
            desc=self.name,
            unit="step",
            disable=None if self.progress and first else True,
        )
        lines = _Lines(self, enabled=self.progress and first and bool(bar.disable))
        with (
            self._board() if first else contextlib.nullcontext() as board,
            contextlib.closing(self.reader),
            bar,
            torch.random.fork_rng(devices),
            _signals() as signals,
        ):
            while self.step < settings.steps:
                metrics = self.train_step()
                last = self.step == settings.steps
                # A signal may reach the processes at different steps: all stop at the same one.
                came = distributed.largest(max(signals, default=0))
                # After a signal, little time may be left: the checkpoint comes first.
                if last or (self.step % settings.eval_every == 0 and not came):
                    metrics |= {f"held_out_{n}": value for n, value in self.evaluate().items()}
                self._log(metrics, board)
                if last or self.step % settings.save_every == 0 or came:
                    self._save(board, wait=last or bool(came))
                elif self._saving is not None and self._saving.is_written():
                    self._finish_saving()
                lines.add(metrics, self.saved, last)
                bar.set_postfix(loss=f"{metrics['loss']:.3f}", saved=self.saved, refresh=False)
                bar.update()
                every = settings.pictures_every
                if every and (last or self.step % every == 0) and not came:
                    self._show(board)
                came = distributed.largest(max(signals, default=0))
                if came and not last:
                    self._finish_saving()
                    if self.saved < self.step:
                        self._save(board)
                    raise Stopped(came, self.step)
        self.model.eval()

    def train_step(self) -> dict[str, float]:
        """One step; its metrics. Changes the state of the default generator."""
        started = time.perf_counter()
        torch.manual_seed(step_seed(self.config.seed, self.step))
        self.model.train()
        rate = learning_rate(self.settings, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        metrics = {"step": self.step + 1} | self._train_step()
        self.step += 1
        self.examples += self.settings.batch_size
        seconds = time.perf_counter() - started
        per_second = metrics.pop(self.unit) / seconds
        return metrics | {
            "learning_rate": rate,
            "seconds": seconds,
            f"{self.unit}_per_second": per_second,
            "peak_memory_gb": _peak_memory(self.device) / 1e9,
        }

    def _autocast(self, cache: bool = False) -> contextlib.AbstractContextManager[Any]:
        """
        Args:
            cache: keep every weight in half precision until the end. Where each is used once, that
                is a copy of the whole model for nothing.
        """
        enabled = self.dtype != torch.float32
        dtype = self.dtype if enabled else None
        return torch.autocast(self.device.type, dtype, enabled, cache_enabled=cache)

    def _update(self, loss: float) -> dict[str, float]:
        """Clips the gradients and makes the optimizer's step; its metrics."""
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_grad_norm)
        grad_norm = distributed.full(norm).item()
        self._check_finite(loss, grad_norm)
        self.scaler.step(self.optimizer)  # skips the update if a gradient is not finite
        self.scaler.update()
        metrics = {"grad_norm": grad_norm}
        if self.scaler.is_enabled():
            metrics |= {"loss_scale": self.scaler.get_scale(), "skipped_steps": self.skipped_steps}
        return metrics

    def _check_finite(self, loss: float, grad_norm: float) -> None:
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.skipped_steps = 0
            return
        self.skipped_steps += 1
        if self.scaler.is_enabled() and self.skipped_steps <= MAX_SKIPPED_STEPS:
            return
        reason = f"loss {loss} and gradient norm {grad_norm} at step {self.step + 1}"
        if self.scaler.is_enabled():
            reason += f"; {self.skipped_steps} steps in a row were not finite"
        self._finish_saving()
        raise FloatingPointError(
            f"{self.name}: training stopped: {reason}; the checkpoints in {self.checkpoints} are "
            f"older. Try {self._advice()}"
        )

    def _advice(self) -> str:
        section = self.settings.section
        return f"a lower {section}.learning_rate or a longer {section}.warmup_steps"

    @contextlib.contextmanager
    def _board(self) -> Iterator[Any]:
        """TensorBoard's writer, with the settings as its first text."""
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(str(self.folder / "tensorboard"), purge_step=self.step + 1)
        board.add_text("settings", f"```yaml\n{to_yaml(self.config)}```", self.step)
        try:
            yield board
        finally:
            with contextlib.suppress(OSError):  # a full disk: the checkpoint was refused before
                board.close()

    def _log(self, metrics: dict[str, float], board: Any) -> None:
        if not distributed.is_first():
            return
        # JSON has no word for what a skipped float16 step may measure.
        row = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        with _naming(self.metrics_path), open(self.metrics_path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
        with _naming(self.folder / "tensorboard"):
            for name, value in metrics.items():
                if name != "step":
                    board.add_scalar(name, value, self.step)

    @torch.no_grad()
    def _show(self, board: Any) -> None:
        pictures = self.pictures()
        if pictures is None or not distributed.is_first():
            return
        path = self.folder / "pictures" / f"step_{self.step:08d}.png"
        with atomic_write(path) as temporary:
            grid = picture_grid(pictures, columns=len(pictures) // 2)
            to_pillow(grid).save(temporary, format="png")
        with _naming(self.folder / "tensorboard"):
            board.add_images(self.name, pictures, self.step)

    def _save(self, board: Any = None, wait: bool = True) -> None:
        """Writes a checkpoint, the part of this process.

        Args:
            board: TensorBoard's writer, of the first process.
            wait: until the checkpoint is complete, also with `training.async_checkpoints`.
        """
        self._finish_saving()
        if board is not None:
            with _naming(self.folder / "tensorboard"):
                board.flush()  # or kill -9 leaves a gap in the curves
        state = {
            "step": self.step,
            "examples": self.examples,
            "config": dataclasses.asdict(self.config),
            "made_from": self.made_from,
            "scaler": self.scaler.state_dict(),
            "skipped_steps": self.skipped_steps,
        }
        sharded = is_sharded(self.model)
        path = checkpoint_path(self.checkpoints, self.step, sharded)
        if sharded or distributed.is_first():
            state |= training_state(self.model, self.optimizer)
        if sharded:
            background = self.config.training.async_checkpoints and not wait
            self._saving = ShardedSave(path, state, background)
            if not background:
                self._finish_saving()
            return
        if distributed.is_first():
            save_checkpoint(path, state)
            prune_checkpoints(self.checkpoints, self.settings.keep_checkpoints)
        self.saved = self.step

    def _finish_saving(self) -> None:
        """Completes the checkpoint that is being written, if there is one."""
        if self._saving is None:
            return
        self._saving.finish()
        self.saved = self._saving.step
        self._saving = None
        if distributed.is_first():
            prune_checkpoints(self.checkpoints, self.settings.keep_checkpoints)

    def _resume(self) -> None:
        first = distributed.is_first()
        with distributed.first_before_others():
            state = load_latest(self.checkpoints, set_aside=first, tensors=False)
        if state is None:
            # Of a run that ended before its first checkpoint.
            if first and self.metrics_path.is_file():
                self.metrics_path.replace(self.metrics_path.with_suffix(".jsonl.old"))
            return
        source = f"{self.checkpoints}, step {state['step']},"
        check_settings(
            state["config"], dataclasses.asdict(self.config), self.fixed_settings, source
        )
        check_made_from(state["made_from"], self.made_from, source)
        self.made_from = state["made_from"] | self.made_from
        self._restore(state, source)
        if self.scaler.is_enabled():
            if not state["scaler"]:
                raise ValueError(
                    f"{self.settings.section}.precision: {source} was not trained with float16; "
                    "set it back, or use a new run folder"
                )
            self.scaler.load_state_dict(state["scaler"])
        self.step, self.examples = state["step"], state["examples"]
        self.saved = self.step
        self.skipped_steps = state["skipped_steps"]
        if not first:
            return
        # The log may be ahead of the checkpoint, and its last line may be incomplete.
        kept = [row for row in read_metrics(self.metrics_path) if row["step"] <= self.step]
        if len(kept) < self.step:
            warnings.warn(
                f"{self.metrics_path}: {self.step - len(kept)} of the {self.step} steps before "
                "the checkpoint are missing",
                stacklevel=3,
            )
        with atomic_write(self.metrics_path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        self._announce_changes(state["config"])

    def _restore(self, state: dict[str, Any], source: str) -> None:
        """Weights and moments of the checkpoint; weight decay and the like as the settings say
        now."""
        now = [
            {name: value for name, value in group.items() if name != "params"}
            for group in self.optimizer.param_groups
        ]
        restore(self.model, self.optimizer, state, source)
        for group, settings in zip(self.optimizer.param_groups, now, strict=True):
            group.update(settings)

    def _announce_changes(self, before: dict[str, dict[str, Any]]) -> None:
        """Says which settings are others than before, and what that does to the run from here."""
        now = dataclasses.asdict(self.config)
        changed = {
            f"{section}.{name}": (before[section][name], value)
            for section in self.sections
            for name, value in now[section].items()
            if name in before[section] and before[section][name] != value
        }
        if not changed:
            return
        section, settings = self.settings.section, self.settings
        listed = ", ".join(f"{name} {a} -> {b}" for name, (a, b) in changed.items())
        message = f"{self.name}: resuming at step {self.step} with other settings: {listed}"
        known = {name: value for name, value in before[section].items() if name in now[section]}
        old = self.schedule(dataclasses.replace(settings, **known), self.step)
        for name, value in self.schedule(settings, self.step).items():
            if self.step < settings.steps and not math.isclose(old[name], value, rel_tol=1e-6):
                message += f"; the {name} goes on at {value:.3g} instead of {old[name]:.3g}"
        if f"{section}.batch_size" in changed:
            message += f"; the data goes on behind the {self.examples} examples read so far"
        if self.step > settings.steps:
            message += f"; there is nothing to do: the run is at step {self.step} already"
        warnings.warn(message, stacklevel=4)


def check_made_from(before: Mapping[str, str], now: Mapping[str, str], source: str) -> None:
    """Compares fingerprints of what a checkpoint was made from with those of what there is now.

    Raises:
        ValueError: one differs or is not known; the message names it and says what to do.
    """
    for name, fingerprint in now.items():
        if name not in before:
            raise ValueError(
                f"{source} does not say which {name} it was trained with, so that nothing shows "
                "whether it fits the one in the folder; train again in a new folder"
            )
        if before[name] != fingerprint:
            tokenizer = "tokenizer" in name
            reason = (
                "its weights mean nothing with this one"
                if tokenizer
                else "the order of reading and the held-out examples would change in the middle"
            )
            raise ValueError(
                f"{source} was trained with {'another' if tokenizer else 'other'} {name} "
                f"({before[name]}) than now ({fingerprint}): {reason}. Put the old "
                f"{'one' if tokenizer else 'ones'} back, or train in a new folder"
            )


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, float]]:
    """The rows of a metrics log, without damaged lines; empty if there is no file."""
    rows: list[dict[str, float]] = []
    if not Path(path).is_file():
        return rows
    for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
    return rows


class _Lines:
    """Lines of the log, for runs without a terminal."""

    def __init__(self, loop: Loop, enabled: bool) -> None:
        self.loop, self.enabled = loop, enabled
        self.begin_step, self.begin = loop.step, time.monotonic()
        self.line_before = self.begin - SECONDS_BETWEEN_LINES  # so that the first step has a line
        self.units, self.units_since = 0.0, self.begin  # for the rate since the line before
        self.held_out = ""

    def add(self, metrics: dict[str, float], saved: int, last: bool) -> None:
        loop, settings = self.loop, self.loop.settings
        for name, value in metrics.items():
            if name.startswith("held_out") and name.endswith("loss"):
                self.held_out = f", held-out {value:.4f}"
                break
        self.units += metrics[f"{loop.unit}_per_second"] * metrics["seconds"]
        now = time.monotonic()
        due = now >= self.line_before + SECONDS_BETWEEN_LINES
        if settings.log_every:
            due = loop.step % settings.log_every == 0
        if not (self.enabled and (due or last)):
            return
        per_step = (now - self.begin) / (loop.step - self.begin_step)
        rate = self.units / max(now - self.units_since, 1e-9)
        self.line_before, self.units, self.units_since = now, 0.0, now
        log.info(
            f"{loop.name} step {loop.step}/{settings.steps}, loss {metrics['loss']:.4f}"
            f"{self.held_out}{loop.in_words(metrics)}, {rate:,.0f} {loop.unit}/s, "
            f"{tqdm.format_interval(per_step * (settings.steps - loop.step))} to go, "
            f"peak memory {metrics['peak_memory_gb']:.2f} GB, saved {saved}"
        )


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGTERM and SIGINT while a step runs; a second one ends the program at once."""
    came: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        if came and signum == signal.SIGINT:
            raise KeyboardInterrupt
        if came:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        came.append(signum)
        # Not `print`: the signal may come while this thread writes to standard error.
        name = signal.Signals(signum).name
        os.write(2, f"{name}: saving after this step; again to stop at once\n".encode())

    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    before = {signum: signal.signal(signum, note) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield came
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Gives an error of the disk the name of the file: writing to an open file has none."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _peak_memory(device: torch.device) -> float:
    """Bytes: of the GPU's allocator, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

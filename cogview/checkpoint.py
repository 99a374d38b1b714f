"""Checkpoints of a training run.

A checkpoint is a dictionary of tensors and plain values, with the model's weights under "model" and
the step under "step". One process writes it as a file, `step_00001000.pt`. Processes that each hold
a part of the model (`training.parallel=fsdp`) write it together, as a folder `step_00001000.dcp` of
torch.distributed.checkpoint. Any number of processes reads either of them, whichever way the model
is spread over them.

A checkpoint is written under a temporary name and then renamed, so that a crash, `kill -9` or a
full disk leaves earlier checkpoints untouched. Checksums reveal damage when it is read.

Reading a file runs no code from it. The folder's `.metadata` is a pickle of torch's: read only
folders that you trust.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import pickle
import re
import shutil
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from cogview import distributed
from cogview.files import atomic_write, check_zip, fsync_folder

FORMAT = "cogview-checkpoint-2"
PLAIN_VALUES = "values.pt"  # in a folder: all of the checkpoint but its tensors
CHECKSUMS = ".crc32.json"  # in a folder: how the names of the files with checksums end

# What zipfile, pickle and torch raise on damaged bytes. A seek to a damaged offset is an OSError.
_DAMAGED = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    pickle.UnpicklingError,
    RuntimeError,  # includes NotImplementedError
    OSError,
    EOFError,
    LookupError,
    AttributeError,
    TypeError,
    ValueError,
)


def is_sharded(model: nn.Module) -> bool:
    """Whether this process holds a part of the model, and checkpoints are folders."""
    return isinstance(model, FSDPModule)


def checkpoint_path(folder: str | os.PathLike[str], step: int, sharded: bool = False) -> Path:
    """Path of the checkpoint of a step."""
    return Path(folder) / f"step_{step:08d}.{'dcp' if sharded else 'pt'}"


def list_checkpoints(folder: str | os.PathLike[str]) -> list[Path]:
    """The checkpoints in a folder, newest first; empty if the folder does not exist."""
    found = [
        path
        for path in Path(folder).glob("step_*")
        if re.fullmatch(r"step_\d{8,}\.(pt|dcp)", path.name)
    ]
    return sorted(found, key=lambda path: int(path.stem.removeprefix("step_")), reverse=True)


def training_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The `model` and `optimizer` of a checkpoint. Names of parameters stand in it, and no numbers,
    so that it fits however the model is spread over processes."""
    weights, optimizer_state = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": optimizer_state}


def save_checkpoint(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Writes `state` to `path`, which at any time holds either the old file or the new one.

    Raises:
        ValueError: a weight under "model" is NaN or infinite; saving it would replace a good
            checkpoint with a useless one.
        OSError: the file cannot be written; the previous file is intact.
    """
    _check_finite(state["model"], path)
    _write_file(path, state)


class ShardedSave:
    """Writes a checkpoint as a folder, to which every process adds the tensors that it holds.

    The folder has its name only after `finish`.

    Args:
        path: from `checkpoint_path(..., sharded=True)`; on a disk that all processes share.
        state: with the parts of this process.
        background: return as soon as the tensors are copied to memory.

    Raises:
        ValueError, OSError: as `save_checkpoint`.
    """

    def __init__(self, path: Path, state: dict[str, Any], background: bool = False) -> None:
        self.step: int = state["step"]
        self.path, self.partial = path, path.with_name(f".{path.name}.partial")
        bad = ""
        try:
            _check_finite(state["model"], path)
        except ValueError as error:
            bad = str(error)
        if distributed.largest(bool(bad)):
            raise ValueError(bad or f"{path}: NaN or infinity in the weights of another process")
        tensors = {"model": state["model"], "optimizer": state["optimizer"]["state"]}
        values = {name: value for name, value in state.items() if name not in tensors}
        values["param_groups"] = state["optimizer"]["param_groups"]
        with distributed.first_before_others():
            if distributed.is_first():
                shutil.rmtree(self.partial, ignore_errors=True)
                self.partial.mkdir(parents=True)
                _write_file(self.partial / PLAIN_VALUES, values)
        writer = _Writer(self.partial)
        self._future: concurrent.futures.Future[Any] | None = None
        with _checkpoint_errors(path):
            if background:
                group = distributed.background_group()
                # The type is that of another argument, async_checkpointer_type.
                self._future = dcp.async_save(tensors, storage_writer=writer, process_group=group)  # type: ignore[assignment]
            else:
                dcp.save(tensors, storage_writer=writer)

    def is_written(self) -> bool:
        """Whether `finish` need not wait."""
        return self._future is None or self._future.done()

    def finish(self) -> None:
        """Waits until all is written, and then gives the folder its name."""
        with _checkpoint_errors(self.path):
            if self._future is not None:
                self._future.result()
        if distributed.is_first():
            fsync_folder(self.partial)
            if self.path.exists():  # from a run that went back to an earlier step
                _delete(self.path)
            self.partial.rename(self.path)
            fsync_folder(self.path.parent)


def load_checkpoint(path: str | os.PathLike[str], tensors: bool = True) -> dict[str, Any]:
    """Reads a checkpoint to the CPU.

    Args:
        path: a file or a folder.
        tensors: False leaves the tensors of a folder to `restore`: there is no "model" then, and
            "folder" holds the path. Of a folder, "optimizer" is never read here.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        PermissionError: it may not be read.
        ValueError: it is truncated, damaged or not a checkpoint of this program, or a weight is NaN
            or infinite.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        state = _load_folder(path, tensors) if path.is_dir() else _load_file(path)
    except PermissionError:
        raise
    except _DAMAGED as error:
        if not path.exists():  # deleted while it was read
            raise FileNotFoundError(f"{path}: no such checkpoint") from error
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: truncated or damaged checkpoint: {reason}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(
            f"{path}: expected a checkpoint of format {FORMAT}, got another kind of file"
        )
    _check_finite(state.get("model", {}), path)
    return state


def load_latest(
    folder: str | os.PathLike[str], set_aside: bool = False, tensors: bool = True
) -> dict[str, Any] | None:
    """Reads the newest readable checkpoint of a folder, and warns of each newer one that is not.

    Args:
        tensors: as for `load_checkpoint`.
        set_aside: rename the newer, unreadable checkpoints to `<name>.damaged`. A run that resumes
            needs this: `prune_checkpoints` would count them and delete good ones.

    Returns:
        the checkpoint, or None if the folder has none.

    Raises:
        ValueError: there are checkpoints, but none can be read.
    """
    paths = list_checkpoints(folder)
    unreadable: dict[Path, ValueError] = {}
    state = None
    for path in paths:
        try:
            state = load_checkpoint(path, tensors)
            break
        except FileNotFoundError:  # a training has written a newer one, and deleted this one
            if list_checkpoints(folder) != paths:
                return load_latest(folder, set_aside, tensors)
            raise
        except ValueError as error:
            unreadable[path] = error
    for path, reason in unreadable.items():
        message = f"{reason}; going back to the checkpoint before it"
        if set_aside and state is not None:
            damaged = path.with_name(f"{path.name}.damaged")
            path.replace(damaged)
            message += f", and keeping the damaged file as {damaged.name}"
        warnings.warn(message, stacklevel=2)
    if paths and state is None:
        raise ValueError(
            f"{folder}: none of the {len(paths)} checkpoints can be read; move them away to start "
            "from the beginning"
        )
    return state


def prune_checkpoints(folder: str | os.PathLike[str], keep: int) -> None:
    """Deletes all checkpoints of a folder except the newest `keep`."""
    for path in list_checkpoints(folder)[keep:]:
        _delete(path)


def restore(
    model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], source: str
) -> None:
    """Copies a checkpoint into a model and its optimizer, however they are spread over processes.

    Args:
        state: from `load_latest(..., tensors=False)`, on every process.
        source: where it comes from, for the message.

    Raises:
        ValueError: it does not fit the model.
    """
    if "folder" in state:
        folder = Path(state["folder"])
        check_weights(model, _weights_in(folder, "meta"), source)
        own = training_state(model, optimizer)
        tensors = {"model": own["model"], "optimizer": own["optimizer"]["state"]}
        _read_tensors(tensors, folder)
        weights = tensors["model"]
        optimizer_state = {"state": tensors["optimizer"], "param_groups": state["param_groups"]}
    else:
        weights, optimizer_state = state["model"], state["optimizer"]
        check_weights(model, weights, source)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=weights,
        optim_state_dict=optimizer_state,
        options=StateDictOptions(full_state_dict=is_sharded(model) and "folder" not in state),
    )


def check_settings(
    saved: dict[str, Any], requested: dict[str, Any], keys: Sequence[str], source: str
) -> None:
    """Compares the settings of a checkpoint with the requested ones.

    Args:
        saved, requested: nested dictionaries; a setting that `saved` lacks is not compared, because
            the checkpoint may be older than the setting.
        keys: settings that must be the same, such as `model.norm`.
        source: where `saved` comes from, for the message.

    Raises:
        ValueError: a setting differs; the message names it with both values.
    """
    for key in keys:
        *sections, name = key.split(".")
        before, now = saved, requested
        for section in sections:
            before, now = before.get(section, {}), now[section]
        if name in before and before[name] != now[name]:
            raise ValueError(
                f"{key}: {source} was trained with {before[name]}, got {now[name]}; set it back, "
                "or use a new run folder"
            )


def load_weights(model: nn.Module, weights: dict[str, torch.Tensor], source: str) -> None:
    """Copies weights into a model.

    Args:
        source: where they come from, for the message.

    Raises:
        ValueError: missing or unknown names, or different shapes. The message lists them, and
            nothing is copied.
    """
    check_weights(model, weights, source)
    model.load_state_dict(weights)


def check_weights(model: nn.Module, weights: dict[str, torch.Tensor], source: str) -> None:
    """The checks of `load_weights`; the model may be on the device `meta`."""
    own = model.state_dict()
    problems = [f"missing {name}" for name in own if name not in weights]
    problems += [f"unknown {name}" for name in weights if name not in own]
    problems += [
        f"{name}: expected {tuple(own[name].shape)}, got {tuple(weights[name].shape)}"
        for name in own
        if name in weights and own[name].shape != weights[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(
            f"{source}: the weights do not fit the model: {'; '.join(problems[:5])}{more}"
        )


def _write_file(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        torch.save({"format": FORMAT, **state}, file)


def _load_file(path: Path) -> dict[str, Any]:
    check_zip(path)
    return torch.load(path, map_location="cpu", weights_only=True)


class _Writer(dcp.FileSystemWriter):
    """Every process also writes the checksums of its files."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        written = super().write_data(plan, planner)  # done when it returns
        prefix = plan.storage_data.prefix
        self._write_checksums(prefix, sorted(Path(self.path).glob(f"{prefix}*.distcp")))
        return written

    def finish(self, metadata: Any, results: Any) -> None:
        super().finish(metadata, results)
        self._write_checksums("metadata", [Path(self.path, ".metadata")])

    def _write_checksums(self, prefix: str, paths: list[Path]) -> None:
        checksums = {path.name: _checksum(path) for path in paths}
        with atomic_write(Path(self.path, f"{prefix}{CHECKSUMS}")) as temporary:
            temporary.write_text(json.dumps(checksums), encoding="utf-8")


def _checksum(path: Path) -> int:
    checksum = 0
    with open(path, "rb") as file:
        while block := file.read(2**24):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _load_folder(path: Path, tensors: bool) -> dict[str, Any]:
    state = _load_file(path / PLAIN_VALUES)
    if distributed.is_first():  # of the processes that read it
        checksums: dict[str, int] = {}
        for file in path.glob(f"*{CHECKSUMS}"):
            checksums |= json.loads(file.read_text(encoding="utf-8"))
        for name in {".metadata", *checksums, *(file.name for file in path.glob("*.distcp"))}:
            if not (path / name).is_file() or _checksum(path / name) != checksums.get(name):
                raise ValueError(f"{name} is missing or has a wrong checksum")
    if not tensors:
        return state | {"folder": str(path)}
    weights = _weights_in(path)
    _read_tensors({"model": weights}, path, alone=True)
    return state | {"model": weights}


def _read_tensors(tensors: dict[str, Any], folder: Path, alone: bool = False) -> None:
    """Fills the tensors of this process; of all of them together, unless it is `alone`."""
    with _checkpoint_errors(folder), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.load(tensors, storage_reader=dcp.FileSystemReader(folder), no_dist=alone)


def _weights_in(folder: Path, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Empty tensors like the model's weights in a checkpoint that is a folder."""
    metadata = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    return {
        name.removeprefix("model."): torch.empty(
            entry.size, dtype=entry.properties.dtype, device=device
        )
        for name, entry in metadata.items()
        if name.startswith("model.") and isinstance(entry, TensorStorageMetadata)
    }


@contextlib.contextmanager
def _checkpoint_errors(path: Path) -> Iterator[None]:
    """Turns torch's CheckpointException, which is no Exception, into the error of one process."""
    try:
        yield
    except dcp.CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        cause = next((cause for cause in causes if isinstance(cause, OSError)), causes[0])
        reason = (str(cause) or type(cause).__name__).splitlines()[0]
        if isinstance(cause, OSError):
            raise OSError(cause.errno, f"{path}: {cause.strerror}") from error
        raise ValueError(f"{path}: {reason}") from error


def _delete(path: Path) -> None:
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    # Renamed first: a folder of which a part is deleted must not look like a damaged checkpoint.
    hidden = path.with_name(f".{path.name}.deleted")
    shutil.rmtree(hidden, ignore_errors=True)
    path.rename(hidden)
    shutil.rmtree(hidden)


def _check_finite(weights: dict[str, torch.Tensor], path: str | os.PathLike[str]) -> None:
    for name, weight in weights.items():
        weight = weight.to_local() if isinstance(weight, DTensor) else weight
        if weight.is_floating_point() and not torch.isfinite(weight).all():
            raise ValueError(f"{path}: {name} holds NaN or infinity; weights must be finite")

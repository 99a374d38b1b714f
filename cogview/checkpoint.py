"""Checkpoints of a training run: one file per checkpoint.

A checkpoint is a dictionary of tensors and plain values, with the model's weights under "model" and
the step under "step". It is written to a temporary file and then renamed, so that a crash,
`kill -9` or a full disk leaves earlier checkpoints untouched. Checksums reveal a damaged file when
it is read.
"""

from __future__ import annotations

import os
import pickle
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cogview.files import atomic_write

FORMAT = "cogview-checkpoint-2"

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


def checkpoint_path(folder: str | os.PathLike[str], step: int) -> Path:
    """Path of the checkpoint of a step."""
    return Path(folder) / f"step_{step:08d}.pt"


def list_checkpoints(folder: str | os.PathLike[str]) -> list[Path]:
    """The checkpoints in a folder, newest first; empty if the folder does not exist."""
    found = [
        path for path in Path(folder).glob("step_*.pt") if re.fullmatch(r"step_\d{8,}", path.stem)
    ]
    return sorted(found, key=lambda path: int(path.stem.removeprefix("step_")), reverse=True)


def save_checkpoint(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Writes `state` to `path`, which at any time holds either the old file or the new one.

    Raises:
        ValueError: a weight under "model" is NaN or infinite; saving it would replace a good
            checkpoint with a useless one.
        OSError: the file cannot be written; the previous file is intact.
    """
    _check_finite(state["model"], path)
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        torch.save({"format": FORMAT, **state}, file)


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a checkpoint to the CPU. Only tensors and plain values are read, never code.

    Raises:
        FileNotFoundError: there is no such file.
        PermissionError: the file may not be read.
        ValueError: the file is truncated, damaged or not a checkpoint of this program, or a weight
            is NaN or infinite.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not compare the checksums
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"wrong checksum of {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, PermissionError):
        raise
    except _DAMAGED as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: truncated or damaged checkpoint: {reason}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ValueError(
            f"{path}: expected a checkpoint of format {FORMAT}, got another kind of file"
        )
    _check_finite(state["model"], path)
    return state


def load_latest(folder: str | os.PathLike[str], set_aside: bool = False) -> dict[str, Any] | None:
    """Reads the newest readable checkpoint of a folder, and warns of each newer one that is not.

    Args:
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
            state = load_checkpoint(path)
            break
        except FileNotFoundError:  # a training has written a newer one, and deleted this one
            if list_checkpoints(folder) != paths:
                return load_latest(folder, set_aside)
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
        path.unlink(missing_ok=True)


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
    model.load_state_dict(weights)


def _check_finite(weights: dict[str, torch.Tensor], path: str | os.PathLike[str]) -> None:
    for name, weight in weights.items():
        if weight.is_floating_point() and not torch.isfinite(weight).all():
            raise ValueError(f"{path}: {name} holds NaN or infinity; weights must be finite")

"""Weights that leave a run and enter another one: `model.safetensors`.

Any program can read the file. Its tensors have the names of `GPT.state_dict()`. Its metadata, which
safetensors restricts to strings, say what the weights are; all of them may be missing:

    cogview      version of this format: "1"
    config       all settings, as JSON
    made_from    fingerprints of the tokenizers and tokens that they were trained with, as JSON
    step         number of training steps behind them
    fingerprint  of the weights themselves; another one reveals a damaged file
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cogview.files import atomic_write


@dataclass(frozen=True)
class Weights:
    """Weights of a GPT, on the CPU, and where they come from.

    Attributes:
        tensors: as in `GPT.state_dict()`.
        config: the settings of their training, as nested dictionaries.
        made_from: fingerprints of what they were trained with, by name.
        step: number of training steps behind them.
        source: where they come from, for messages.
        is_checkpoint: of a training here, which always knows `made_from`.
    """

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    made_from: dict[str, str]
    step: int
    source: str
    is_checkpoint: bool = False

    @cached_property
    def fingerprint(self) -> str:
        """Equal for equal names, shapes, dtypes and values."""
        return _fingerprint(self.tensors)

    def to(self, dtype: torch.dtype) -> Weights:
        tensors = {name: tensor.to(dtype) for name, tensor in self.tensors.items()}
        return replace(self, tensors=tensors)


def _fingerprint(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def save_weights(path: str | os.PathLike[str], weights: Weights) -> None:
    """Writes a file of safetensors; an existing one is replaced atomically."""
    metadata = {
        "format": "pt",  # what other programs expect of a file that torch has written
        "cogview": "1",
        "config": json.dumps(weights.config),
        "made_from": json.dumps(weights.made_from),
        "step": str(weights.step),
        "fingerprint": weights.fingerprint,
    }
    save_tensors(path, weights.tensors, metadata)


def save_tensors(
    path: str | os.PathLike[str],
    tensors: dict[str, Tensor],
    metadata: dict[str, str] | None = None,
) -> None:
    """Writes a file of safetensors; an existing one is replaced atomically.

    Raises:
        OSError: it cannot be written; the previous file is intact.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    whole = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_write(path) as temporary:
        try:
            save_file(whole, temporary, metadata)
        except SafetensorError as error:  # of the disk: the tensors are sound
            raise OSError(errno.EIO, str(error)) from error


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The metadata of a file, without its tensors.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it is not safetensors.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file of weights")
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(
            f"{path}: expected weights in the format safetensors, got a damaged file or another "
            f"kind ({error})"
        ) from error


def load_weights_file(path: str | os.PathLike[str]) -> Weights:
    """Reads a file of safetensors to the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not safetensors, or its weights are not those that were written.
    """
    from safetensors.torch import load_file

    metadata = read_metadata(path)
    weights = Weights(
        load_file(path),
        json.loads(metadata.get("config", "{}")),
        json.loads(metadata.get("made_from", "{}")),
        int(metadata.get("step", "0")),
        str(path),
    )
    expected = metadata.get("fingerprint", weights.fingerprint)
    if weights.fingerprint != expected:
        raise ValueError(
            f"{path}: damaged: the weights are not those that were written (fingerprint "
            f"{weights.fingerprint} instead of {expected})"
        )
    return weights

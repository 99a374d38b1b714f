"""Checkpoints in the layout of the released CogView.

    FOLDER/mp_rank_00_model_states.pt, mp_rank_01_model_states.pt, ...    one file per shard
    FOLDER/latest_checkpointed_iteration.txt (or latest)    names the subfolder with these files

A file is a dictionary with the weights under "module". Names and shapes of a single shard are those
of `cogview.model.GPT`. Tensor parallelism splits some of them over N shards:

    attention.query_key_value    rows; each shard has the rows of Q, then K, then V of its heads
    mlp.dense_h_to_4h            rows
    attention.dense              columns of the weight; every shard has the whole bias
    mlp.dense_4h_to_h            columns of the weight; every shard has the whole bias
    word_embeddings              rows; their number is padded to a multiple of 128 N
    everything else              every shard has the whole

The files are read with `weights_only=True`: tensors and plain values, never code.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pickle
import re
import shutil
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cogview.checkpoint import check_weights
from cogview.config import Config, ModelConfig, load_config
from cogview.files import atomic_write, check_zip
from cogview.image_tokenizer import ImageTokenizer
from cogview.model import GPT
from cogview.run import Run
from cogview.text_tokenizer import TextTokenizer
from cogview.weights import Weights, save_weights

TRACKERS = ("latest_checkpointed_iteration.txt", "latest")  # Megatron's and DeepSpeed's
ROWS = ("mlp.dense_h_to_4h.weight", "mlp.dense_h_to_4h.bias", "word_embeddings.weight")
COLUMNS = ("attention.dense.weight", "mlp.dense_4h_to_h.weight")
QUERY_KEY_VALUE = ("attention.query_key_value.weight", "attention.query_key_value.bias")

# Beside the weights, the files hold the state of generators and the arguments of the command line.
# These types carry data only.
_RECONSTRUCT: Any = np.zeros(0).__reduce__()[0]  # of numpy's arrays; it moved in version 2
_HARMLESS: list[Any] = [
    argparse.Namespace,
    np.ndarray,
    np.dtype,
    type(np.dtype(np.uint32)),
    (_RECONSTRUCT, "numpy.core.multiarray._reconstruct"),
    (_RECONSTRUCT, "numpy._core.multiarray._reconstruct"),
]


def read_released(folder: str | os.PathLike[str]) -> tuple[dict[str, Tensor], int]:
    """The weights of all shards, merged; the embedding keeps its padding.

    Returns:
        weights with the names of `GPT.state_dict()`, on the CPU in the dtype of the files; and the
        number of shards.

    Raises:
        FileNotFoundError: there is no such checkpoint, or a shard is missing.
        ValueError: a file is damaged, holds more than data, or has another layout.
    """
    paths = _shards(Path(folder))
    shards = [_read_shard(path) for path in paths]
    for path, shard in zip(paths, shards, strict=True):
        if shard.keys() != shards[0].keys():
            other = sorted(shard.keys() ^ shards[0].keys())[0]
            raise ValueError(f"{path}: expected the names of {paths[0].name}, got {other} in one")
    try:
        merged = {name: _merge(name, [shard[name] for shard in shards]) for name in shards[0]}
    except RuntimeError as error:
        raise ValueError(f"{folder}: shards that do not fit each other: {error}") from error
    return merged, len(shards)


def released_config(
    tensors: dict[str, Tensor],
    num_shards: int,
    preset: str = "cogview-4b",
    overrides: Sequence[str] = (),
) -> Config:
    """The settings of released weights: sizes as in the tensors, the rest as in CogView's code.

    Args:
        tensors, num_shards: from `read_released`.
        preset: settings of the tokenizers, of training and of sampling.
        overrides: further settings; the number of heads is taken to be hidden_size / 64.

    Raises:
        ValueError: names that are not those of this layout, or a vocabulary of another size.
    """
    words, positions = "word_embeddings.weight", "transformer.position_embeddings.weight"
    layers = [re.match(r"transformer\.layers\.(\d+)\.", name) for name in tensors]
    numbers = {int(match[1]) for match in layers if match}
    if words not in tensors or positions not in tensors or not numbers:
        raise ValueError(
            f"released checkpoint: expected {words}, {positions} and transformer.layers.*, got "
            f"{', '.join(list(tensors)[:3])}, ..."
        )
    sandwich = "transformer.layers.0.third_layernorm.weight" in tensors
    rows, hidden = tensors[words].shape
    released = [
        f"model.num_layers={max(numbers) + 1}",
        f"model.hidden_size={hidden}",
        f"model.num_heads={max(1, hidden // 64)}",
        f"model.max_positions={len(tensors[positions])}",
        f"model.norm={'sandwich' if sandwich else 'pre'}",
        "model.relax=tensor",
        "model.layernorm_eps=1e-5",
        "model.attention=three_region",
        "model.query_window=128",
        "model.key_window_times=6",
        "model.num_pivots=768",
        "model.pivot_bias=cogview",
    ]
    config = load_config(preset, [*released, *overrides])
    size, padding = config.vocabulary.size, 128 * num_shards
    if not size <= rows < size + padding:
        raise ValueError(
            f"text_tokenizer.vocab_size, image_tokenizer.codebook_size: {words} has {rows} rows in "
            f"{num_shards} shards; the settings need {size}, padded to a multiple of {padding}"
        )
    return config


def write_released(
    folder: str | os.PathLike[str],
    tensors: dict[str, Tensor],
    config: ModelConfig,
    num_shards: int,
    step: int,
) -> list[Path]:
    """Writes weights as the released code reads them, in float16.

    Args:
        tensors: as in `GPT.state_dict()`.
        config: of these weights. The released code knows Sandwich-LN only, and always divides by
            the maximum of the whole tensor, so that other settings are warned of.
        num_shards: the released code's `--model-parallel-size`; it must divide the number of heads.
        step: number of training steps; it names the subfolder.

    Returns:
        the files of the shards.

    Raises:
        ValueError: the weights cannot be divided so, or one is too large for float16.
    """
    if config.norm != "sandwich":
        raise ValueError(
            f"model.norm: expected sandwich, got {config.norm}; released CogView has it"
        )
    if num_shards < 1 or config.num_heads % num_shards:
        raise ValueError(
            f"--shards: expected a number that divides {config.num_heads} heads, got {num_shards}"
        )
    if config.relax != "tensor":
        warnings.warn(
            f"model.relax: these weights were trained with {config.relax}; the released code "
            "computes tensor, and its results differ a little",
            stacklevel=2,
        )
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor.half()).all():
            raise ValueError(f"{name}: expected numbers that float16 can hold, got larger ones")
    subfolder = f"{step}" if step else "release"
    paths = []
    for index in range(num_shards):
        shard = {
            name: _part(name, tensor, index, num_shards).half().clone()
            for name, tensor in tensors.items()
        }
        path = Path(folder) / subfolder / f"mp_rank_{index:02d}_model_states.pt"
        with atomic_write(path) as temporary, open(temporary, "wb") as file:
            torch.save({"module": shard, "iteration": step}, file)
        paths.append(path)
    with atomic_write(Path(folder) / TRACKERS[0]) as temporary:
        temporary.write_text(subfolder)
    return paths


def import_released(
    folder: str | os.PathLike[str],
    path: str | os.PathLike[str],
    preset: str = "cogview-4b",
    overrides: Sequence[str] = (),
    text_tokenizer: str | os.PathLike[str] | None = None,
    image_tokenizer: str | os.PathLike[str] | None = None,
) -> Run:
    """Makes a run of a released checkpoint.

    Args:
        folder: with the checkpoint.
        path: folder of the new run.
        preset, overrides: as for `released_config`.
        text_tokenizer, image_tokenizer: files of its SentencePiece model and of its VQVAE. These,
            or those that lie in the folder of the run already, are recorded as the tokenizers of
            the weights. They can also be put there later: drawing then warns.

    Raises:
        FileExistsError: there is a run in the folder.
        FileNotFoundError, ValueError: a file is missing, damaged or of another layout, or sizes
            differ.
    """
    if (Path(path) / "config.yaml").exists():
        raise FileExistsError(f"--run: expected a new folder, got a run: {path}")
    tensors, num_shards = read_released(folder)
    config = released_config(tensors, num_shards, preset, overrides)
    words = "word_embeddings.weight"
    tensors[words] = resize_vocabulary(tensors[words], config.vocabulary.padded_size)
    with torch.device("meta"):
        model = GPT(config.model, config.vocabulary.padded_size)
    check_weights(model, tensors, str(folder))
    run = Run(path, config)
    with run.writing():
        if text_tokenizer is not None:
            TextTokenizer.load(text_tokenizer)
            with atomic_write(run.text_tokenizer_path) as temporary:
                shutil.copyfile(text_tokenizer, temporary)
        if image_tokenizer is not None:
            ImageTokenizer.load(image_tokenizer, config.image_tokenizer).save(
                run.image_tokenizer_path
            )
        made_from = {}
        if run.text_tokenizer_path.is_file():
            made_from["text tokenizer"] = run.text_tokenizer().fingerprint
        if run.image_tokenizer_path.is_file():
            made_from["image tokenizer"] = run.image_tokenizer().fingerprint
        weights = Weights(tensors, dataclasses.asdict(config), made_from, 0, str(folder))
        save_weights(run.weights_path, weights.to(torch.float32))
        run.save_config()
    return run


def resize_vocabulary(weight: Tensor, rows: int) -> Tensor:
    """An embedding (V, hidden) with another number of padding rows at its end. New ones repeat the
    last row: it is a padding row already, which training has made unlikely."""
    more = weight[-1:].expand(max(0, rows - len(weight)), -1)
    return torch.cat([weight[:rows], more])


def _shards(folder: Path) -> list[Path]:
    for tracker in TRACKERS:
        if (folder / tracker).is_file():
            folder = folder / (folder / tracker).read_text().strip()
            break
    paths = sorted(folder.glob("mp_rank_*_model_states.pt"))
    expected = [folder / f"mp_rank_{i:02d}_model_states.pt" for i in range(max(1, len(paths)))]
    if paths != expected:
        missing = [path.name for path in expected if path not in paths]
        raise FileNotFoundError(f"{folder}: expected {missing[0]} in it, got none")
    return paths


def _read_shard(path: Path) -> dict[str, Tensor]:
    try:
        check_zip(path)
        with torch.serialization.safe_globals(_HARMLESS):
            saved: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        kind = re.search(r"GLOBAL ([\w.]+)", str(error))
        got = (
            f"{kind[1]}; it is not read, because that could run code" if kind else "a damaged file"
        )
        raise ValueError(f"{path}: expected tensors and plain values, got {got}") from error
    except PermissionError:
        raise
    # A seek to a damaged offset is an OSError.
    except (RuntimeError, EOFError, ValueError, LookupError, OSError, zipfile.BadZipFile) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path}: truncated or damaged file: {reason}") from error
    weights = saved.get("module") if isinstance(saved, dict) else None
    if not isinstance(weights, dict) or not all(
        isinstance(value, Tensor) for value in weights.values()
    ):
        raise ValueError(f"{path}: expected a dictionary of tensors under the key 'module'")
    for name, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: {name} holds NaN or infinity; weights must be finite")
    return {name.removeprefix("module."): tensor for name, tensor in weights.items()}


def _merge(name: str, parts: list[Tensor]) -> Tensor:
    if name.endswith(QUERY_KEY_VALUE):
        thirds = [part.chunk(3) for part in parts]
        return torch.cat([part[i] for i in range(3) for part in thirds])
    if name.endswith(ROWS):
        return torch.cat(parts)
    if name.endswith(COLUMNS):
        return torch.cat(parts, dim=1)
    for index, part in enumerate(parts[1:], 1):
        if not torch.equal(part, parts[0]):
            raise ValueError(f"{name}: expected the same in all shards, got another in {index}")
    return parts[0]


def _part(name: str, tensor: Tensor, index: int, count: int) -> Tensor:
    """What shard `index` of `count` has of a tensor."""
    if name == "word_embeddings.weight":
        padding = 128 * count
        tensor = resize_vocabulary(tensor, -(-len(tensor) // padding) * padding)
    dim = 1 if name.endswith(COLUMNS) else 0
    pieces = 3 if name.endswith(QUERY_KEY_VALUE) else 1
    if pieces == 1 and not name.endswith((*ROWS, *COLUMNS)):
        return tensor
    return torch.cat([piece.chunk(count, dim)[index] for piece in tensor.chunk(pieces, dim)], dim)

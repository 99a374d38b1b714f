"""Sampling from the GPT: batched, cached, with temperature, top-k, top-p and token-type masks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm

import cogview_kernels as ck
from cogview.config import Config, SamplingConfig
from cogview.model import GPT, KVCache
from cogview.sequence import TokenSequence, captioning, collate, hide_captions, text_to_image


def sample_tokens(
    logits: torch.Tensor,
    allowed: torch.Tensor,
    sampling: SamplingConfig,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Draws one token per row.

    Args:
        logits: (B, V), any floating-point dtype.
        allowed: bool (V,), the token-type mask; no other id is ever drawn.
        sampling: temperature (0: the likeliest token), then top-k, then top-p of the rest.
        generator: on the device of the logits.

    Returns:
        int64 (B,)
    """
    logits = logits.float().masked_fill(~allowed, float("-inf"))
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits, ids = logits.sort(dim=-1, descending=True, stable=True)
    # Subtract the largest logit, and use a temperature that float32 can invert, to avoid overflow.
    logits = (logits - logits[:, :1]) / max(sampling.temperature, torch.finfo(torch.float32).tiny)
    if sampling.top_k:
        logits[:, sampling.top_k :] = float("-inf")
    probabilities = logits.softmax(-1)
    if sampling.top_p < 1.0:
        # Probability of all likelier tokens: 0 for the likeliest token, which always stays.
        likelier = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(likelier >= sampling.top_p, 0.0)
    return ids.gather(1, torch.multinomial(probabilities, 1, generator=generator)).squeeze(1)


@torch.inference_mode()
def generate(
    model: GPT,
    config: Config,
    prompts: Sequence[TokenSequence],
    num_new: Sequence[int],
    allowed: torch.Tensor,
    generator: torch.Generator | None = None,
    stop_token: int | None = None,
    progress: tqdm | None = None,
    guidance: float = 1.0,
) -> list[list[int]]:
    """Continues prompts of different lengths in one batch.

    Each layer draws its pivots once, for the whole sequence; each new token then reads text, pivots
    and window from the cache.

    Args:
        model: the model in evaluation mode; sampling uses its device, and its dtype or that of
            autocast.
        prompts: beginnings of sequences.
        num_new: number of tokens to add to each prompt.
        allowed: bool (vocabulary,), the ids that may be drawn.
        generator: on the device of the model.
        stop_token: ends a sequence early, and is then the last of the returned ids.
        progress: advances by one for each token position.
        guidance: as `SamplingConfig.guidance`: unless it is 1, each sequence has a second one
            beside it, with the text hidden and the same pivots.

    Returns:
        the new ids of each prompt.

    Raises:
        ValueError: a sequence would have more positions than the model.
    """
    device, dtype = model.word_embeddings.weight.device, model.word_embeddings.weight.dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    starts = torch.tensor([len(prompt) for prompt in prompts], device=device)
    ends = starts + torch.tensor(list(num_new), device=device)
    length = int(ends.max())
    batch = collate(config.vocabulary, prompts, length)
    tokens, text_len = batch.tokens.to(device), batch.text_len.to(device)
    index = torch.arange(length, device=device)
    last = torch.tensor([prompt.positions[-1] for prompt in prompts], device=device)
    positions = torch.where(
        index < starts[:, None],
        batch.positions.to(device),
        last[:, None] + 1 + index - starts[:, None],
    )
    positions = torch.where(index < ends[:, None], positions, 0)
    if int(positions.max()) >= config.model.max_positions:
        raise ValueError(
            f"prompt: expected a sequence of at most {config.model.max_positions} positions in "
            f"all, got {int(positions.max()) + 1}; shorten the text"
        )
    layouts = model.sample_layouts(text_len, length, generator)
    if guidance != 1:
        hidden = hide_captions(config.vocabulary, batch, 1.0, seed=0).tokens.to(device)
        tokens, positions = torch.cat([tokens, hidden]), positions.repeat(2, 1)
        layouts = [layout and _twice(layout) for layout in layouts]
    cache = KVCache(config.model, len(tokens), length, dtype, device)
    allowed = allowed.to(device)
    done = torch.zeros(len(prompts), dtype=torch.bool, device=device)

    begin, end = 0, int(starts.min())
    while end < length:
        z = model(tokens[:, begin:end], positions[:, begin:end], layouts, cache)
        logits = model.logits(z[:, -1])
        if guidance != 1:
            captioned, free = logits.float().chunk(2)
            logits = free + guidance * (captioned - free)
        drawn = sample_tokens(logits, allowed, config.sampling, generator)
        # Longer prompts keep their own token; finished sequences keep padding.
        writes = (end >= starts) & (end < ends) & ~done
        for half in tokens.split(len(prompts)):
            half[:, end] = torch.where(writes, drawn, half[:, end])
        if stop_token is not None:
            done |= writes & (drawn == stop_token)
            if bool((done | (end + 1 >= ends)).all()):
                break
        begin, end = end, end + 1
        if progress is not None:
            progress.update()
    rows = [
        row[s:e] for row, s, e in zip(tokens.tolist(), starts.tolist(), ends.tolist(), strict=False)
    ]
    if stop_token is not None:
        rows = [row[: row.index(stop_token) + 1] if stop_token in row else row for row in rows]
    return rows


def draw_images(
    model: GPT,
    config: Config,
    texts: Sequence[Sequence[int]],
    seed: int = 0,
    beginnings: Sequence[Sequence[int]] | None = None,
    progress: bool = True,
) -> torch.Tensor:
    """Draws one image for each text.

    Args:
        texts: text pieces, numbered from 0.
        seed: the same seed gives the same images on the same device with the same batch size.
        beginnings: for each text the first codes of its image, row by row; the model draws the
            rest.
        progress: show a progress bar if standard error is a terminal.

    Returns:
        int64 (N, h, w) codes, on the CPU.

    Raises:
        ValueError: an empty text, a text that is too long, too many codes, or an id out of range.
    """
    vocab, num_codes, side = config.vocabulary, config.num_codes, config.image_tokenizer.code_size
    beginnings = [()] * len(texts) if beginnings is None else beginnings
    image_first = config.model.image_positions == "first"
    prompts = []
    for text, codes in zip(texts, beginnings, strict=True):
        if len(text) > config.max_text_len:
            raise ValueError(
                f"caption: expected at most {config.max_text_len} pieces beside an image, as "
                f"model.max_positions leaves, got {len(text)}; shorten it"
            )
        prompts.append(text_to_image(vocab, text, codes, num_codes, image_first))
    num_new = [num_codes - len(codes) for codes in beginnings]
    allowed, guidance = vocab.image_mask(), config.sampling.guidance
    drawn = _in_batches(
        model, config, prompts, num_new, allowed, seed, None, progress, "drawing", guidance
    )
    rows = [[*codes, *new] for codes, new in zip(beginnings, drawn, strict=True)]
    return torch.tensor(rows, dtype=torch.int64).view(-1, side, side)


def write_captions(
    model: GPT,
    config: Config,
    codes: torch.Tensor,
    seed: int = 0,
    max_len: int = 20,
    progress: bool = True,
) -> list[list[int]]:
    """Writes a caption for each image, with a model that was trained for the task `captioning`.

    Args:
        codes: int (N, h, w).
        seed: as for `draw_images`.
        max_len: largest number of text pieces in a caption.

    Returns:
        text pieces of each caption, numbered from 0.
    """
    vocab = config.vocabulary
    prompts = [captioning(vocab, image) for image in codes]
    num_new = [min(max_len, config.max_text_len)] * len(prompts)
    sep = vocab.command("SEP")
    rows = _in_batches(
        model, config, prompts, num_new, vocab.text_mask(), seed, sep, progress, "captions"
    )
    return [[token - vocab.codebook_size for token in row if token != sep] for row in rows]


def _in_batches(
    model: GPT,
    config: Config,
    prompts: list[TokenSequence],
    num_new: list[int],
    allowed: torch.Tensor,
    seed: int,
    stop_token: int | None,
    progress: bool,
    description: str,
    guidance: float = 1.0,
) -> list[list[int]]:
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed: expected 0 or more, below 2**63, got {seed}")
    size = config.sampling.batch_size
    generator = torch.Generator(model.word_embeddings.weight.device).manual_seed(seed)
    rows: list[list[int]] = []
    batches = range(0, len(prompts), size)
    for start in batches:
        chosen = slice(start, start + size)
        with tqdm(
            total=max(num_new[chosen]),
            desc=f"{description} {start // size + 1}/{len(batches)}",
            unit="token",
            disable=None if progress else True,
        ) as bar:
            rows += generate(
                model,
                config,
                prompts[chosen],
                num_new[chosen],
                allowed,
                generator,
                stop_token,
                bar,
                guidance,
            )
    return rows


def _twice(layout: ck.ThreeRegionLayout) -> ck.ThreeRegionLayout:
    """Of each sample of a batch, and the same again."""
    repeated: Any = {
        name: torch.cat([getattr(layout, name)] * 2) for name in ("text_len", "pivot_idx")
    }
    return dataclasses.replace(layout, **repeated)

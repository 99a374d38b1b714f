import dataclasses
import math

import pytest
import torch

from cogview.config import SamplingConfig, load_config
from cogview.model import GPT
from cogview.sample import draw_images, generate, sample_tokens, write_captions
from cogview.sequence import super_resolution, text_to_image

CONFIG = load_config(
    "digits",
    [
        "text_tokenizer.vocab_size=20",
        "image_tokenizer.image_size=16",
        "image_tokenizer.codebook_size=16",
        "model.num_layers=2",
        "model.hidden_size=32",
        "model.num_heads=2",
        "model.max_positions=40",
        "model.query_window=4",
        "model.num_pivots=4",
        "model.init_std=0.02",
        "model.sandwich_init=1.0",
        "sampling.temperature=1.0",
        "sampling.top_k=0",
    ],
)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = GPT(CONFIG.model, CONFIG.vocabulary.padded_size).eval()
    with torch.no_grad():  # far from uniform, so that the context matters
        model.word_embeddings.weight.mul_(20)
    return model


def shares(sampling, logits, allowed=None, num=20000):
    logits = torch.tensor(logits)
    allowed = (
        torch.ones(len(logits), dtype=torch.bool) if allowed is None else torch.tensor(allowed)
    )
    drawn = sample_tokens(
        logits.expand(num, -1), allowed, sampling, torch.Generator().manual_seed(0)
    )
    return (torch.bincount(drawn, minlength=len(logits)) / num).tolist()


LOGITS = torch.tensor([0.1, 0.5, 0.25, 0.15]).log().tolist()


@pytest.mark.parametrize(
    ("sampling", "allowed", "expected"),
    [
        (SamplingConfig(1.0, 0), None, [0.1, 0.5, 0.25, 0.15]),
        (SamplingConfig(0.5, 0), None, [0.029, 0.725, 0.181, 0.065]),
        (SamplingConfig(0.0, 0), None, [0, 1, 0, 0]),
        (SamplingConfig(1.0, 2), None, [0, 2 / 3, 1 / 3, 0]),
        (SamplingConfig(1.0, 0, 0.7), None, [0, 2 / 3, 1 / 3, 0]),
        (SamplingConfig(1.0, 0, 0.1), None, [0, 1, 0, 0]),
        (SamplingConfig(1.0, 2, 0.66), None, [0, 1, 0, 0]),
        (SamplingConfig(1.0, 0), [True, False, True, False], [0.1 / 0.35, 0, 0.25 / 0.35, 0]),
        (SamplingConfig(1.0, 3), [True, False, True, False], [0.1 / 0.35, 0, 0.25 / 0.35, 0]),
        (SamplingConfig(0.0), [True, False, False, False], [1, 0, 0, 0]),
    ],
)
def test_sample_tokens_follows_the_distribution(sampling, allowed, expected):
    assert shares(sampling, LOGITS, allowed) == pytest.approx(expected, abs=0.015)


@pytest.mark.parametrize("temperature", [1e-30, 1e-37, 1e-40, 1e-320])
def test_a_tiny_temperature_draws_the_likeliest(temperature):
    logits = [-30.0, 50.0, 49.0, 0.0]
    assert shares(SamplingConfig(temperature, 0), logits, num=20) == [0, 1, 0, 0]
    allowed = [True, False, True, True]
    assert shares(SamplingConfig(temperature, 2, 0.5), logits, allowed, 20) == [0, 0, 1, 0]


def greedy_without_cache(model, config, prompt, num_new, layouts, guidance=1.0):
    tokens, positions = list(prompt.tokens), list(prompt.positions)
    mask, first = config.vocabulary.command("MASK"), config.vocabulary.codebook_size
    for _ in range(num_new):
        hidden = [mask if first <= t < config.vocabulary.first_command else t for t in tokens]
        with_text, without = (
            model.logits(model(torch.tensor([row]), torch.tensor([positions]), layouts)[0, -1])
            for row in (tokens, hidden)
        )
        logits = guidance * with_text + (1 - guidance) * without
        tokens.append(int(logits.masked_fill(~config.vocabulary.image_mask(), -math.inf).argmax()))
        positions.append(positions[-1] + 1)
    return tokens[len(prompt) :]


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@torch.inference_mode()
def test_generation_equals_the_full_forward_at_every_token(model, guidance):
    config = dataclasses.replace(CONFIG, sampling=SamplingConfig(temperature=0.0))
    vocab = config.vocabulary
    prompts = [
        text_to_image(vocab, [1, 2, 3], (), 16),
        text_to_image(vocab, [4, 5, 6, 7, 8, 9], (), 16),
        text_to_image(vocab, [1, 2], [3, 1, 4, 1, 5], 16),
    ]
    num_new = [16, 16, 11]
    generator = torch.Generator().manual_seed(3)
    arguments = prompts, num_new, vocab.image_mask(), generator
    drawn = generate(model, config, *arguments, guidance=guidance)
    text_len = torch.tensor([prompt.text_len for prompt in prompts], dtype=torch.int32)
    length = max(len(prompt) + new for prompt, new in zip(prompts, num_new, strict=True))
    layouts = model.sample_layouts(text_len, length, torch.Generator().manual_seed(3))
    for i, (prompt, new) in enumerate(zip(prompts, num_new, strict=True)):
        own = [
            dataclasses.replace(
                layout, text_len=layout.text_len[i : i + 1], pivot_idx=layout.pivot_idx[i : i + 1]
            )
            for layout in layouts
        ]
        assert drawn[i] == greedy_without_cache(model, config, prompt, new, own, guidance)
    assert len(set(map(tuple, drawn))) == 3


def test_positions_continue_those_of_the_prompt_in_super_resolution(model):
    config = dataclasses.replace(CONFIG, sampling=SamplingConfig(temperature=0.0))
    vocab = config.vocabulary
    # 22 + 4 tokens; the positions after [ROI2] run from 0 to 33.
    prompt = super_resolution(vocab, [1, 2], [3] * 16, num_fine_codes=30)
    with torch.inference_mode():
        drawn = generate(
            model, config, [prompt], [30], vocab.image_mask(), torch.Generator().manual_seed(3)
        )
        layouts = model.sample_layouts(
            torch.tensor([5], dtype=torch.int32), 56, torch.Generator().manual_seed(3)
        )
        assert drawn[0] == greedy_without_cache(model, config, prompt, 30, layouts)


def test_images_hold_image_codes_only_and_follow_the_seed(model):
    texts = [[1, 2, 3], [4], [5, 6], [7]]
    codes = draw_images(model, CONFIG, texts, seed=1, progress=False)
    assert codes.shape == (4, 4, 4) and codes.dtype == torch.int64
    assert 0 <= codes.min() and codes.max() < 16
    assert torch.equal(codes, draw_images(model, CONFIG, texts, seed=1, progress=False))
    assert not torch.equal(codes, draw_images(model, CONFIG, texts, seed=2, progress=False))
    small = dataclasses.replace(CONFIG, sampling=dataclasses.replace(CONFIG.sampling, batch_size=3))
    assert draw_images(model, small, texts, seed=1, progress=False).shape == (4, 4, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_half_precision_draw_the_same_first_codes(model, dtype):
    greedy = dataclasses.replace(CONFIG, sampling=SamplingConfig(temperature=0.0))
    texts = [[i, 19 - i] for i in range(16)]
    whole = draw_images(model, greedy, texts, progress=False).flatten(1)
    half = draw_images(model.to(dtype), greedy, texts, progress=False).flatten(1)
    assert (half[:, 0] == whole[:, 0]).sum() >= 15 and len(half[:, 0].unique()) > 4
    assert 0 <= half.min() and half.max() < 16


def test_a_partial_image_is_completed(model):
    beginnings = [[3, 1, 4, 1, 5, 9], [], [2] * 16]
    codes = draw_images(
        model, CONFIG, [[1], [2], [3]], beginnings=beginnings, progress=False
    ).flatten(1)
    assert codes[0, :6].tolist() == [3, 1, 4, 1, 5, 9]
    assert codes[2].tolist() == [2] * 16


def test_captions_hold_text_only_and_end_at_sep(model):
    codes = torch.randint(16, (6, 4, 4), generator=torch.Generator().manual_seed(0))
    captions = write_captions(model, CONFIG, codes, seed=1, max_len=12, progress=False)
    assert len(captions) == 6
    assert all(0 <= piece < 20 for caption in captions for piece in caption)
    with torch.no_grad():  # a model that always ends at once
        model.transformer.final_layernorm.weight.zero_()
        sep = model.word_embeddings.weight[CONFIG.vocabulary.command("SEP")]
        model.transformer.final_layernorm.bias.copy_(sep)
    greedy = dataclasses.replace(CONFIG, sampling=SamplingConfig(temperature=0.0))
    assert write_captions(model, greedy, codes, progress=False) == [[]] * 6


def test_prompts_that_do_not_fit_are_named(model):
    with pytest.raises(
        ValueError, match="caption: expected at most 20 pieces beside an image, .* got 21"
    ):
        draw_images(model, CONFIG, [[1] * 21], progress=False)
    for seed in (-1, 2**63):
        with pytest.raises(ValueError, match=f"seed: expected 0 or more, .* got {seed}"):
            draw_images(model, CONFIG, [[1]], seed, progress=False)
    with pytest.raises(ValueError, match="at least one piece"):
        draw_images(model, CONFIG, [[]], progress=False)
    with pytest.raises(ValueError, match="image code: expected 0 .. 15, got 16 .. 16"):
        draw_images(model, CONFIG, [[1]], beginnings=[[16]], progress=False)
    prompt = text_to_image(CONFIG.vocabulary, [1], (), 64)
    with pytest.raises(ValueError, match="at most 40 positions in all, got 68"):
        generate(model, CONFIG, [prompt], [64], CONFIG.vocabulary.image_mask())

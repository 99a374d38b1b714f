import numpy as np
import pytest
import torch

from cogview.sequence import (
    COMMANDS,
    Vocabulary,
    captioning,
    collate,
    hide_captions,
    loss_weights,
    super_resolution,
    text_to_image,
)

COGVIEW = Vocabulary(8192, 50000)
SMALL = Vocabulary(16, 10)


def names(vocab, tokens):
    """Kinds of ids: "i" for an image code, "t" for a text piece, the name of a command token."""
    by_id = {vocab.command(name): name for name in COMMANDS}
    return [
        "i" if t < vocab.codebook_size else "t" if t < vocab.first_command else by_id[t]
        for t in tokens
    ]


def test_ids_of_cogview():
    assert (COGVIEW.size, COGVIEW.padded_size) == (58219, 58240)
    expected = {
        "PAD": 58192,
        "BOI1": 58193,
        "EOI1": 58196,
        "ROI1": 58199,
        "ROI2": 58200,
        "SEP": 58202,
        "BASE": 58208,
    }
    assert {name: COGVIEW.command(name) for name in expected} == expected
    assert COGVIEW.command("POS8") == 58218
    assert COGVIEW.text_ids([0, 49999]) == [8192, 58191]


def test_text_to_image_sequence():
    sequence = text_to_image(COGVIEW, [5, 6], np.arange(1024).reshape(32, 32))
    assert names(COGVIEW, sequence.tokens) == ["ROI1", "t", "t", "BASE", "BOI1"] + ["i"] * 1024 + [
        "EOI1"
    ]
    assert sequence.tokens[5:-1] == list(range(1024))
    assert sequence.positions == list(range(1030))
    assert sequence.text_len == 5


def test_the_size_of_the_image_is_announced():
    for side, name in ((4, "TINY"), (8, "TINY"), (16, "SMALL"), (32, "BASE"), (64, "BIG")):
        assert names(SMALL, text_to_image(SMALL, [1], torch.zeros(side, side)).tokens)[2] == name


def test_a_prompt_ends_with_the_codes_that_are_given():
    prompt = text_to_image(SMALL, [1], [3, 4], num_codes=16)
    assert names(SMALL, prompt.tokens) == ["ROI1", "t", "TINY", "BOI1", "i", "i"]
    assert prompt.text_len == 4


def test_an_image_may_have_the_same_positions_under_every_caption():
    codes = [3, 4, 5, 6]
    for text in ([1], [1, 2, 3]):
        whole = text_to_image(SMALL, text, codes, image_first=True)
        other = captioning(SMALL, codes, text)
        of = dict(zip(names(SMALL, other.tokens), other.positions, strict=True))
        assert whole.positions[: len(text) + 1] == [of["ROI1"] + i for i in range(len(text) + 1)]
        assert whole.positions[len(text) + 1 :] == other.positions[: len(codes) + 3]
        prompt = text_to_image(SMALL, text, codes[:1], num_codes=4, image_first=True)
        assert prompt.positions == whole.positions[: len(prompt)]


def test_super_resolution_restarts_positions_at_roi2():
    sequence = super_resolution(SMALL, [1, 2], [3] * 4, [5] * 16)
    head = ["ROI1", "t", "t", "BASE", "BOI1"] + ["i"] * 4 + ["EOI1"]
    assert names(SMALL, sequence.tokens) == head + ["ROI2", "POS0", "BASE", "BOI2"] + ["i"] * 16 + [
        "EOI2"
    ]
    assert sequence.positions == [*range(10), *range(21)]
    prompt = super_resolution(SMALL, [1, 2], [3] * 4, num_fine_codes=16)
    assert prompt.tokens == sequence.tokens[:14] and prompt.positions == sequence.positions[:14]


def test_captioning_ends_with_sep():
    sequence = captioning(SMALL, [3] * 4, [1, 2])
    assert names(SMALL, sequence.tokens) == ["TINY", "BOI1"] + ["i"] * 4 + [
        "EOI1",
        "ROI1",
        "t",
        "t",
        "SEP",
    ]
    assert sequence.text_len == 2
    assert captioning(SMALL, [3] * 4).tokens == sequence.tokens[:8]


def test_wrong_ids_are_named():
    with pytest.raises(ValueError, match=r"text piece: expected 0 .. 9, got 3 .. 10"):
        text_to_image(SMALL, [3, 10], [0])
    with pytest.raises(ValueError, match=r"image code: expected 0 .. 15, got -1 .. 2"):
        text_to_image(SMALL, [3], [2, -1])
    with pytest.raises(ValueError, match="at least one piece, got none"):
        text_to_image(SMALL, [], [0])
    with pytest.raises(ValueError, match=r"at most 4 .* got 5"):
        text_to_image(SMALL, [1], [0] * 5, num_codes=4)
    with pytest.raises(ValueError, match="at least one code, got none"):
        captioning(SMALL, [])


def test_collate_pads_at_the_end():
    short, long = text_to_image(SMALL, [1], [0] * 4), text_to_image(SMALL, [1, 2, 3], [0] * 4)
    batch = collate(SMALL, [short, long])
    assert batch.tokens.shape == batch.positions.shape == (2, len(long))
    assert names(SMALL, batch.tokens[0].tolist())[-3:] == ["EOI1", "PAD", "PAD"]
    assert batch.text_len.tolist() == [4, 6] and batch.text_len.dtype == torch.int32
    with pytest.raises(ValueError, match="at most 10 tokens, got 11"):
        collate(SMALL, [short, long], length=10)


def test_loss_weights_follow_the_type_of_the_target():
    batch = collate(
        SMALL, [text_to_image(SMALL, [1], [0] * 2), text_to_image(SMALL, [1, 2], [0] * 2)]
    )
    weights = loss_weights(SMALL, batch.tokens, text_weight=5.0, image_weight=2.0)
    assert weights.tolist() == [[1, 5, 1, 1, 2, 2, 1, 0], [1, 5, 5, 1, 1, 2, 2, 1]]
    hidden = hide_captions(SMALL, batch, 1.0, seed=0)
    assert names(SMALL, hidden.tokens[1].tolist())[:5] == ["ROI1", "MASK", "MASK", "TINY", "BOI1"]
    assert torch.equal(hidden.tokens == batch.tokens, weights != 5)
    weights[weights == 5] = 0
    assert torch.equal(loss_weights(SMALL, hidden.tokens, 5.0, 2.0), weights)


def test_masks_separate_the_types():
    image, text = SMALL.image_mask(), SMALL.text_mask()
    assert image.shape == text.shape == (SMALL.padded_size,)
    assert image.nonzero().flatten().tolist() == list(range(16))
    assert text.nonzero().flatten().tolist() == [*range(16, 26), SMALL.command("SEP")]

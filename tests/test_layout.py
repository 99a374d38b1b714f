"""ThreeRegionLayout and sample_pivots: which keys a query may attend to."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from typing import Any

import pytest
import torch
from helpers import (
    int32,
    layouts,
    region_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import cogview_kernels as ck


def test_regions_worked_by_hand() -> None:
    # 12 keys in blocks of 2, window of 2 blocks: rows 4 and 5 start at 2, row 11 starts at 8.
    layout = ck.ThreeRegionLayout(3, int32([[5, 7, 9]]), query_window=2, key_window_times=2)
    window, text, pivot = layout.regions(1, 12, 12)

    def keys(region: Tensor, row: int) -> list[int]:
        return region[0, row].nonzero().flatten().tolist()

    assert [keys(r, 0) for r in (window, text, pivot)] == [[0], [], []]
    assert [keys(r, 3) for r in (window, text, pivot)] == [[0, 1, 2, 3], [], []]
    assert [keys(r, 4) for r in (window, text, pivot)] == [[2, 3, 4], [0, 1], []]
    assert [keys(r, 5) for r in (window, text, pivot)] == [[2, 3, 4, 5], [0, 1], []]
    assert [keys(r, 8) for r in (window, text, pivot)] == [[6, 7, 8], [0, 1, 2], [5]]
    assert [keys(r, 11) for r in (window, text, pivot)] == [[8, 9, 10, 11], [0, 1, 2], [5, 7]]


@given(st.data())
@settings(max_examples=60)
def test_dense_mask_is_the_definition(data: st.DataObject) -> None:
    batch, k_len = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 30))
    q_len = data.draw(st.integers(0, k_len))
    layout = data.draw(layouts(batch, k_len, num_kv_heads=2))
    regions = layout.regions(batch, q_len, k_len)
    mask = layout.dense_mask(batch, q_len, k_len)
    text_len, pivot_idx = layout.tensors(batch, torch.device("cpu"))
    assert mask.shape == (*pivot_idx.shape[:-1], q_len, k_len) and mask.dtype == torch.bool
    assert torch.equal(mask, torch.stack(regions).sum(0) == 1), "regions overlap"
    w, n = layout.query_window, layout.key_window_times
    for at in itertools.product(*map(range, pivot_idx.shape[:-1])):  # sample, and head
        prefix, pivots = int(text_len[at[0]]), pivot_idx[at].tolist()
        for r in range(q_len):
            i = r + k_len - q_len
            assert mask[at][r, i], "a query sees itself"
            for j in range(k_len):
                expected = region_of(i, j, prefix, pivots, w, n)
                found = [
                    name
                    for name, region in zip(("window", "text", "pivot"), regions, strict=True)
                    if region[at][r, j]
                ]
                assert found == ([expected] if expected else [])


@pytest.mark.parametrize(
    "w, n", [(2**40, 2**40), (128, 2**60), (1, 2**63 - 1), (2**63 - 1, 2**63 - 1), (2**62, 1)]
)
def test_large_window_covers_the_sequence(w: int, n: int) -> None:
    layout = ck.ThreeRegionLayout(3, int32([[4, 5]]), w, n)
    assert torch.equal(layout.dense_mask(1, 9, 9)[0], torch.ones(9, 9, dtype=torch.bool).tril())


def test_from_cogview() -> None:
    # CogView lists text and random positions together, in any order.
    listed = torch.tensor([[9, 0, 2, 1, 6], [7, 1, 0, 5, 11]])
    layout = ck.ThreeRegionLayout.from_cogview(listed, int32([3, 2]), 2, 1, seqlen=16)
    assert layout.pivot_idx.tolist() == [[0, 1, 2, 6, 9], [0, 1, 5, 7, 11]]
    assert layout.pivot_idx.dtype == torch.int32
    assert layout.text_bias == layout.pivot_bias == math.log(16 // 5)
    row = layout.dense_mask(2, 16, 16)[:, 10]
    assert row[0].nonzero().flatten().tolist() == [0, 1, 2, 6, 9, 10]
    assert row[1].nonzero().flatten().tolist() == [0, 1, 5, 7, 10]
    same = ck.ThreeRegionLayout.from_cogview(listed, torch.tensor([3, 2]), 2, 1, seqlen=16)
    assert torch.equal(same.dense_mask(2, 16, 16), layout.dense_mask(2, 16, 16))


def test_layouts_copy_and_pickle() -> None:
    layout = ck.ThreeRegionLayout(int32([3, 0]), int32([[4, 6], [5, 9]]), 2, 1, 0.5, -0.5)
    for twin in (copy.deepcopy(layout), pickle.loads(pickle.dumps(layout))):
        assert twin.pivot_idx is not layout.pivot_idx
        assert torch.equal(twin.dense_mask(2, 7, 12), layout.dense_mask(2, 7, 12))
        assert (twin.text_bias, twin.pivot_bias) == (0.5, -0.5)
    with pytest.raises(AttributeError):
        layout.query_window = 3  # type: ignore[misc]


def test_batch_size() -> None:
    assert ck.ThreeRegionLayout(3, None).batch_size is None
    assert ck.ThreeRegionLayout(int32([3]), int32([[4]])).batch_size is None
    assert ck.ThreeRegionLayout(int32([3, 4]), int32([[4]])).batch_size == 2
    assert ck.ThreeRegionLayout(int32([3]), int32([[4], [5]])).batch_size == 2


PIVOTS = int32([[4, 6], [5, 9]])


@pytest.mark.parametrize(
    "arguments, error, match",
    [
        ({"text_len": -1}, ValueError, "text_len: expected at least 0.*got -1"),
        ({"text_len": int32([2, -3])}, ValueError, "text_len: .*got -3 in sample 1"),
        ({"text_len": True}, TypeError, "text_len: expected an int, got bool True"),
        ({"text_len": 2.0}, TypeError, "text_len: expected an int, got float"),
        ({"text_len": None}, TypeError, "text_len: expected an int, got NoneType"),
        ({"text_len": torch.tensor([1.0])}, TypeError, "text_len: expected dtype int32"),
        ({"text_len": torch.tensor([1, 2])}, TypeError, "text_len: expected dtype int32.*int64"),
        ({"text_len": int32([[1], [2]])}, ValueError, r"text_len: expected shape \(B,\).*\(2, 1\)"),
        ({"text_len": int32([1, 2, 3])}, ValueError, r"text_len: expected \(2,\).*got \(3,\)"),
        ({"text_len": int32([1, 2]).to("meta")}, ValueError, "text_len: expected device cpu"),
        ({"pivot_idx": [[4, 6]]}, TypeError, "pivot_idx: expected an int32 tensor.*list"),
        ({"pivot_idx": PIVOTS.double()}, TypeError, "pivot_idx: expected dtype int32, .*float64"),
        ({"pivot_idx": PIVOTS.long()}, TypeError, "pivot_idx: expected dtype int32, .*int64"),
        (
            {"pivot_idx": PIVOTS[0]},
            ValueError,
            r"pivot_idx: expected shape \(B, P\) or .*got \(2,\)",
        ),
        ({"pivot_idx": PIVOTS.view(2, 1, 1, 2)}, ValueError, r"pivot_idx: .*got \(2, 1, 1, 2\)"),
        (
            {"pivot_idx": torch.stack([PIVOTS, PIVOTS.flip(1)], 1)},
            ValueError,
            "pivot_idx: expected sorted.* 4 after 6 in sample 0, head 1, column 1",
        ),
        ({"pivot_idx": PIVOTS.flip(1)}, ValueError, "pivot_idx: expected sorted.* 4 after 6"),
        ({"pivot_idx": int32([[4, 4, 7]])}, ValueError, "pivot_idx: expected unique.* 4 after 4"),
        ({"query_window": 0}, ValueError, "query_window: expected at least 1.*got 0"),
        ({"query_window": 2**63}, ValueError, "query_window: .*int64"),
        ({"query_window": 4.0}, TypeError, "query_window: expected an int, got float 4.0"),
        ({"query_window": True}, TypeError, "query_window: expected an int, got bool"),
        ({"key_window_times": 0}, ValueError, "key_window_times: expected at least 1.*got 0"),
        ({"key_window_times": -2}, ValueError, "key_window_times: expected at least 1.*got -2"),
        ({"text_bias": math.nan}, ValueError, "text_bias: expected .*finite.*got nan"),
        ({"text_bias": math.inf}, ValueError, "text_bias: expected .*finite.*got inf"),
        ({"pivot_bias": 1e39}, ValueError, "pivot_bias: expected .*finite in float32, got 1e"),
        ({"pivot_bias": "0"}, TypeError, "pivot_bias: expected a float, got str"),
    ],
)
def test_bad_layouts(arguments: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        ck.ThreeRegionLayout(**{"text_len": int32([1, 2]), "pivot_idx": PIVOTS, **arguments})


def test_padding_may_repeat_but_keys_may_not() -> None:
    padded = ck.ThreeRegionLayout(4, int32([[-1, 4, 2, 2, 6, 8, 8]]), 1, 1)
    padded.validate(8)  # 8 is padding for 8 keys
    assert padded.dense_mask(1, 8, 8)[0, 7].nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 6, 7]
    with pytest.raises(ValueError, match="pivot_idx: expected unique positions.* got 8 after 8"):
        padded.validate(9)
    with pytest.raises(ValueError, match="k_len: expected at least 0"):
        padded.validate(-1)


@pytest.mark.parametrize(
    "arguments, error, match",
    [
        ((PIVOTS, 1, 4, 2, 0), ValueError, "seqlen: expected at least 1"),
        ((PIVOTS, 1, 4, 2, 1), ValueError, "pivot_idx: expected between 1 and seqlen = 1"),
        ((PIVOTS[:, :0], 1, 4, 2, 16), ValueError, "pivot_idx: expected between 1 and seqlen"),
        ((PIVOTS.float(), 1, 4, 2, 16), TypeError, "pivot_idx: expected dtype int32 or int64"),
        (([[1]], 1, 4, 2, 16), TypeError, "pivot_idx: expected an integer tensor"),
        ((int32([[6, 4, 6]]), 1, 4, 2, 16), ValueError, "pivot_idx: expected unique"),
        ((PIVOTS, torch.tensor([1.0]), 4, 2, 16), TypeError, "text_len: expected dtype int32 or"),
    ],
)
def test_bad_cogview_lists(arguments: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        ck.ThreeRegionLayout.from_cogview(*arguments)


def test_dense_mask_refuses_bad_sizes() -> None:
    layout = ck.ThreeRegionLayout(1, PIVOTS)
    with pytest.raises(ValueError, match="q_len: expected at most k_len = 4, got 5"):
        layout.dense_mask(2, 5, 4)
    with pytest.raises(ValueError, match=r"layout.pivot_idx: expected \(3, 2\).*got \(2, 2\)"):
        layout.dense_mask(3, 4, 4)
    with pytest.raises(ValueError, match="batch: expected at least 0"):
        layout.dense_mask(-1, 4, 4)


# sample_pivots


@given(
    st.lists(st.integers(0, 40), max_size=4),
    st.integers(0, 30),
    st.integers(0, 40),
    st.integers(0, 2**16),
)
@settings(max_examples=100)
def test_pivots_are_sorted_unique_and_after_the_text(
    text_lens: list[int], seqlen: int, num_pivots: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    pivots = ck.sample_pivots(torch.tensor(text_lens).int(), seqlen, num_pivots, generator)
    assert pivots.shape == (len(text_lens), num_pivots) and pivots.dtype == torch.int32
    for text_len, row in zip(text_lens, pivots.tolist(), strict=True):
        real = [p for p in row if p != seqlen]
        assert real == sorted(set(real))
        assert row == real + [seqlen] * (num_pivots - len(real)), "padding stands last"
        assert len(real) == min(num_pivots, max(0, seqlen - text_len))
        assert all(text_len <= p < seqlen for p in real)
    again = ck.sample_pivots(
        torch.tensor(text_lens).int(), seqlen, num_pivots, torch.Generator().manual_seed(seed)
    )
    assert torch.equal(pivots, again)
    layout = ck.ThreeRegionLayout(int32(text_lens), pivots, 1, 1)
    layout.validate(seqlen)


def test_pivots_are_uniform() -> None:
    text_len, seqlen, num_pivots, draws = 7, 71, 16, 4000
    generator = torch.Generator().manual_seed(1)
    pivots = ck.sample_pivots(torch.full((draws,), text_len), seqlen, num_pivots, generator)
    cells = seqlen - text_len
    counts = torch.bincount(pivots.flatten(), minlength=seqlen)[text_len:].double()
    expected = draws * num_pivots / cells
    # Without replacement each count varies (1 - num_pivots / cells) times as much.
    chi2 = ((counts - expected) ** 2 / expected).sum().item() / (1 - num_pivots / cells)
    spread = math.sqrt(2 * (cells - 1))
    assert abs(chi2 - (cells - 1)) < 4 * spread
    # Pairs: how often the first and the last position are drawn together.
    both = (pivots[:, 0] == text_len) & (pivots[:, -1] == seqlen - 1)
    probability = num_pivots * (num_pivots - 1) / (cells * (cells - 1))
    deviation = math.sqrt(draws * probability * (1 - probability))
    assert abs(both.sum().item() - draws * probability) < 4 * deviation


def test_pivots_do_not_depend_on_the_default_dtype() -> None:
    """bfloat16 random numbers have 8 bits: too many of them would be equal."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        pivots = ck.sample_pivots(3, 1000, 50, torch.Generator().manual_seed(1))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(pivots, ck.sample_pivots(3, 1000, 50, torch.Generator().manual_seed(1)))


def test_pivots_differ_between_samples_and_calls() -> None:
    first = ck.sample_pivots(torch.tensor([5, 5]), 1000, 50)
    second = ck.sample_pivots(torch.tensor([5, 5]), 1000, 50)
    assert not torch.equal(first[0], first[1]) and not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(first, ck.sample_pivots(torch.tensor([5, 5]), 1000, 50))
    torch.manual_seed(0)
    assert torch.equal(ck.sample_pivots(5, 1000, 50)[0], first[0]), "int: one sample"


def test_pivots_are_sampled_without_reading_the_device() -> None:
    """Reading a value of a fake tensor raises, so nothing here waits for the GPU."""
    with FakeTensorMode():
        text_len = torch.zeros(3, dtype=torch.int32, device="cuda")
        pivots = ck.sample_pivots(text_len, 64, 8)
        assert pivots.shape == (3, 8) and pivots.device.type == "cuda"
        assert ck.sample_pivots(4, 64, 8, device="cuda").device.type == "cuda"
        assert ck.ThreeRegionLayout(text_len, pivots, 4, 2).batch_size == 3


@pytest.mark.parametrize(
    "arguments, error, match",
    [
        ((-1, 8, 2), ValueError, "text_len: expected at least 0"),
        ((torch.tensor([3, -2]), 8, 2), ValueError, "text_len: .*got -2"),
        ((torch.tensor([3.0]), 8, 2), TypeError, "text_len: expected dtype int32 or int64"),
        ((torch.tensor(3), 8, 2), ValueError, r"text_len: expected shape \(B,\), got \(\)"),
        ((3, -8, 2), ValueError, "seqlen: expected at least 0"),
        ((3, 8.0, 2), TypeError, "seqlen: expected an int"),
        ((3, 8, -2), ValueError, "num_pivots: expected at least 0"),
        ((3, 8, True), TypeError, "num_pivots: expected an int"),
    ],
)
def test_bad_samples(arguments: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        ck.sample_pivots(*arguments)

"""What a query may attend to: text prefix, pivots and local window of each sample."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from cogview_kernels.checks import check_float, check_int, describe, values_readable
from cogview_kernels.operators import in_plain_eager_mode, is_plain


class LayoutOfCall:
    """A layout as the operators of one call take it, or of several calls that share it.

    ``text_len (B,)`` and ``pivot_idx``, ``(B, P)`` or with pivots for each key/value head
    ``(B, G, P)``, are int32 on the device of the queries.
    """

    def __init__(self, text_len: Tensor, pivot_idx: Tensor, k_len: int, key: Any) -> None:
        self.text_len = text_len
        self.pivot_idx = pivot_idx
        self.k_len = k_len
        self.key = key  # what it holds for; None: for this call alone
        self._far_keys: Tensor | None = None

    def far_keys(self, pack: Callable[[Tensor, Tensor, int], Tensor]) -> Tensor:
        """What the kernels read; packed once."""
        if self._far_keys is not None:
            return self._far_keys
        far_keys = pack(self.text_len, self.pivot_idx, self.k_len)
        if self.key is not None:
            self._far_keys = far_keys
        return far_keys


@dataclasses.dataclass(frozen=True, eq=False)
class ThreeRegionLayout:
    """The three regions of CogView's sparse attention, shared by all heads of a call.

    A query at position ``i`` of block ``c = i // query_window`` attends to

    * window: ``start <= j <= i``, ``start = max(0, (c - key_window_times + 1) * query_window)``,
    * text: ``j < min(text_len, start)``,
    * pivots: the entries ``p`` of ``pivot_idx`` with ``text_len <= p < start``.

    The regions are disjoint and the query itself always stands in its window.

    Args:
        text_len: length of the text prefix in tokens, one ``int`` for all samples or an int32
            tensor ``(B,)``; not negative. A length beyond the sequence means "all of it".
        pivot_idx: int32, positions of the pivots, ascending and unique in each row, or ``None`` for
            no pivots. ``(B, P)``: all heads share them; ``(B, G, P)``: each key/value head has its
            own, for the query heads that read it. ``G`` is the number of heads of k, or 1. Entries
            outside ``[text_len, k_len)`` are padding and ignored, so ragged counts need no second
            tensor. One sample's pivots serve a batch of any size.
        query_window: block size ``w`` in tokens, any positive integer.
        key_window_times: number of blocks ``n`` in the local window, the query's own included.
        text_bias: added to the logit of every text key, in nats.
        pivot_bias: added to the logit of every pivot key, in nats.

    In eager mode a layout keeps what its last call made from it (checked values, packed keys), so
    that calls with the same layout and key length share the work: all layers of a step, or a
    forward and its recomputation. The tensors may be changed in place between calls, as torch
    counts such changes (``Tensor._version``). Where it does not count them (``.data``, NumPy, a
    collective, a Triton kernel, the replay of a CUDA graph), make another layout
    (``dataclasses.replace(layout)``). Nothing is kept for inference tensors, nor while a CUDA graph
    is captured: its replay packs the keys again. A copy or a pickle of a layout starts without.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device. Values of
            tensors (negative lengths, unsorted or repeated pivots) are read and checked when the
            tensors are on the CPU; on a GPU that would cost a synchronisation, so call
            :meth:`validate` there while debugging. Whatever the values, the attention never
            touches memory outside its tensors.

    Source: CogView (arXiv 2105.13290), section 4.1 of the appendix and its released
    ``sparse_attention``.
    """

    text_len: int | Tensor
    pivot_idx: Tensor | None
    query_window: int = 128
    key_window_times: int = 2
    text_bias: float = 0.0
    pivot_bias: float = 0.0

    # No fields: of no interest to comparison, replace and pickle. Each is swapped as a whole, so
    # that threads may share a layout.
    _last_call: ClassVar[LayoutOfCall | None] = None
    # The versions of the tensors at which they were found right for every key length.
    _valid_at: ClassVar[tuple[int | None, ...] | None] = None

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def __post_init__(self) -> None:
        check_int("query_window", self.query_window, minimum=1)
        check_int("key_window_times", self.key_window_times, minimum=1)
        object.__setattr__(self, "text_bias", check_float("text_bias", self.text_bias))
        object.__setattr__(self, "pivot_bias", check_float("pivot_bias", self.pivot_bias))
        if isinstance(self.text_len, Tensor):
            _check_index_tensor("text_len", self.text_len, 1, "(B,)")
        else:
            check_int("text_len", self.text_len, minimum=0)
        if self.pivot_idx is not None:
            if not isinstance(self.pivot_idx, Tensor):
                raise TypeError(
                    "pivot_idx: expected an int32 tensor (B, P) or (B, G, P), or None, "
                    f"got {describe(self.pivot_idx)}"
                )
            ndim = 3 if self.pivot_idx.ndim == 3 else 2
            _check_index_tensor("pivot_idx", self.pivot_idx, ndim, "(B, P) or (B, G, P)")
            if isinstance(self.text_len, Tensor):
                if self.text_len.device != self.pivot_idx.device:
                    raise ValueError(
                        f"text_len: expected device {self.pivot_idx.device} as pivot_idx, "
                        f"got {self.text_len.device}"
                    )
                sizes = self.text_len.shape[0], self.pivot_idx.shape[0]
                if 1 not in sizes and sizes[0] != sizes[1]:
                    raise ValueError(
                        f"text_len: expected ({self.pivot_idx.shape[0]},) to match the batch of "
                        f"pivot_idx, got {tuple(self.text_len.shape)}"
                    )
        if values_readable(self.text_len) and values_readable(self.pivot_idx):
            self._check_values(k_len=None)

    @classmethod
    def from_cogview(
        cls,
        pivot_idx: Tensor,
        text_len: int | Tensor,
        query_window: int,
        key_window_times: int,
        seqlen: int,
    ) -> ThreeRegionLayout:
        """CogView's training setting from CogView's own pivot list.

        CogView lists the text positions together with the random ones and adds
        ``log(seqlen // num_pivots)`` to the logit of every listed key, ``num_pivots`` being the
        length of that list.

        Args:
            pivot_idx: int32 or int64 ``(B, num_pivots)`` in any order, text positions included;
                a position may appear once per row.
            text_len: length of the text prefix, ``int`` or int32/int64 ``(B,)``.
            query_window, key_window_times: as in :class:`ThreeRegionLayout`.
            seqlen: the training sequence length ``S``; at least ``num_pivots``.
        """
        check_int("seqlen", seqlen, minimum=1)
        if not isinstance(pivot_idx, Tensor):
            raise TypeError(
                f"pivot_idx: expected an integer tensor (B, P), got {describe(pivot_idx)}"
            )
        _check_index_tensor("pivot_idx", pivot_idx, 2, "(B, P)", (torch.int32, torch.int64))
        num_pivots = pivot_idx.shape[1]
        if not 1 <= num_pivots <= seqlen:
            raise ValueError(
                f"pivot_idx: expected between 1 and seqlen = {seqlen} pivots per row, "
                f"got shape {tuple(pivot_idx.shape)}"
            )
        if isinstance(text_len, Tensor):
            _check_index_tensor("text_len", text_len, 1, "(B,)", (torch.int32, torch.int64))
            text_len = text_len.to(torch.int32)
        bias = math.log(seqlen // num_pivots)
        ordered = pivot_idx.clamp(-1, seqlen).sort(dim=1).values.to(torch.int32)
        layout = cls(text_len, ordered, query_window, key_window_times, bias, bias)
        if values_readable(text_len) and values_readable(ordered):
            layout.validate(seqlen)
        return layout

    @property
    def batch_size(self) -> int | None:
        """Number of samples described, ``None`` where the layout serves a batch of any size."""
        sizes = [t.shape[0] for t in (self.text_len, self.pivot_idx) if isinstance(t, Tensor)]
        return next((size for size in sizes if size != 1), None)

    def of_call(
        self, batch: int, num_kv_heads: int, k_len: int, device: torch.device
    ) -> LayoutOfCall:
        """The layout for a call, its values checked where that costs no synchronisation.

        Raises:
            ValueError: the layout describes another batch size or number of heads or lies on
                another device, or pivots are not as :meth:`validate` wants them.
        """
        by_head = self.pivot_idx is not None and self.pivot_idx.ndim == 3
        if by_head:
            self._check_heads(num_kv_heads)
        versions = self._versions()
        key = None
        if versions is not None and (stream := _stream_of(device)) is not None:
            # Memory made on a stream is in order there alone; inference tensors cannot be saved
            # for a backward.
            inference = torch.is_inference_mode_enabled()
            key = versions, batch, k_len, device, stream, inference
            last = self._last_call
            if last is not None and last.key == key:
                return last
        text_len, pivot_idx = self.tensors(batch, device)
        if by_head and pivot_idx.shape[1] == 1:
            pivot_idx = pivot_idx.squeeze(1)
        if versions is None or versions != self._valid_at:
            if values_readable(self.text_len) and values_readable(self.pivot_idx):
                self.validate(k_len)
        call = LayoutOfCall(text_len, pivot_idx, k_len, key)
        if key is not None:
            object.__setattr__(self, "_last_call", call)
        return call

    def _check_heads(self, num_kv_heads: int) -> None:
        assert self.pivot_idx is not None
        batch, heads, num_pivots = self.pivot_idx.shape
        if heads not in (1, num_kv_heads):
            raise ValueError(
                f"layout.pivot_idx: expected {(batch, num_kv_heads, num_pivots)} to match the "
                f"heads of k, got {(batch, heads, num_pivots)}"
            )

    def _versions(self) -> tuple[int | None, ...] | None:
        """What tells whether the tensors were changed; ``None`` where nothing does, or where
        nothing may be kept."""
        if not in_plain_eager_mode():
            return None
        versions: list[int | None] = []
        for tensor in (self.text_len, self.pivot_idx):
            if not isinstance(tensor, Tensor):
                versions.append(None)
            elif not is_plain(tensor) or tensor.is_inference():
                return None
            else:
                versions.append(tensor._version)
        return tuple(versions)

    def tensors(self, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """``text_len (batch,)`` and ``pivot_idx``, ``(batch, P)`` or ``(batch, G, P)``, both int32
        on ``device``.

        Raises:
            ValueError: the layout describes another batch size or lies on another device.
        """
        text_len, pivot_idx = self.text_len, self.pivot_idx
        if isinstance(text_len, Tensor):
            _check_batch_and_device("text_len", text_len, batch, device)
            text_len = text_len.expand(batch)
        else:
            text_len = torch.full(
                (batch,), min(text_len, 2**31 - 1), dtype=torch.int32, device=device
            )
        if pivot_idx is None:
            return text_len, torch.empty(batch, 0, dtype=torch.int32, device=device)
        _check_batch_and_device("pivot_idx", pivot_idx, batch, device)
        return text_len, pivot_idx.expand(batch, *pivot_idx.shape[1:])

    def validate(self, k_len: int) -> None:
        """Read the tensors' values and check them for keys of length ``k_len``.

        Synchronises with the device. Raises ``ValueError`` for a negative text length and for
        pivots that are not ascending or not unique among the entries that count.
        """
        check_int("k_len", k_len, minimum=0)
        self._check_values(k_len)

    def _check_values(self, k_len: int | None) -> None:
        text_len = self.text_len
        if isinstance(text_len, Tensor):
            negative = text_len < 0
            if negative.any():
                sample = int(negative.nonzero()[0])
                raise ValueError(
                    "text_len: expected lengths that are not negative, "
                    f"got {int(text_len[sample])} in sample {sample}"
                )
            if self.pivot_idx is not None:
                text_len = text_len.view(-1, *[1] * (self.pivot_idx.ndim - 1))
        if self.pivot_idx is None or not _any_out_of_order(self.pivot_idx):
            object.__setattr__(self, "_valid_at", self._versions())
            return
        # Every counted entry must lie above the largest counted entry before it. With k_len
        # unknown the largest entry of a row may be padding (k_len itself), so it may repeat.
        pivots = self.pivot_idx.long()
        counts = (pivots >= text_len) & (pivots >= 0)
        if k_len is not None:
            counts &= pivots < k_len
        running = torch.where(counts, pivots, -1).cummax(dim=-1).values
        previous = torch.nn.functional.pad(running, (1, 0), value=-1)[..., :-1]
        repeated = pivots == previous
        if k_len is None:
            repeated &= pivots < pivots.amax(dim=-1, keepdim=True)
        wrong = counts & ((pivots < previous) | repeated)
        if wrong.any():
            first = tuple(wrong.nonzero()[0].tolist())
            value, before = int(pivots.expand_as(wrong)[first]), int(previous[first])
            what = "unique" if value == before else "sorted ascending"
            sample, *head, column = first
            of_head = f"head {head[0]}, " if head else ""
            raise ValueError(
                f"pivot_idx: expected {what} positions in each row, got {value} after {before} "
                f"in sample {sample}, {of_head}column {column}"
            )

    def regions(
        self, batch: int, q_len: int, k_len: int, kv_lens: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The disjoint masks ``(window, text, pivot)``; dense. Each bool ``(B, Sq, Sk)``, or
        ``(B, G, Sq, Sk)`` with ``pivot_idx (B, G, P)``."""
        check_int("batch", batch, minimum=0)
        check_int("q_len", q_len, minimum=0)
        check_int("k_len", k_len, minimum=0)
        if q_len > k_len:
            raise ValueError(f"q_len: expected at most k_len = {k_len}, got {q_len}")
        if kv_lens is not None:
            check_kv_lens(kv_lens, batch, k_len)
        device = next(
            (t.device for t in (self.text_len, self.pivot_idx) if isinstance(t, Tensor)),
            torch.device("cpu"),
        )
        text_len, pivot_idx = self.tensors(batch, device)
        i = torch.arange(k_len - q_len, k_len, device=device).view(1, -1, 1)
        if kv_lens is not None:
            i = i - (k_len - kv_lens.to(device)).view(-1, *[1] * pivot_idx.ndim)
        j = torch.arange(k_len, device=device).view(1, 1, -1)
        start = window_start(i, self.query_window, self.key_window_times)
        prefix = text_len.view(-1, *[1] * pivot_idx.ndim)

        counts = (pivot_idx >= prefix[..., 0]) & (pivot_idx >= 0) & (pivot_idx < k_len)
        column = torch.where(counts, pivot_idx, k_len).long()
        rows = pivot_idx.shape[:-1]  # (B,) or (B, G)
        is_pivot = torch.zeros(*rows, k_len + 1, dtype=torch.bool, device=device)
        is_pivot = is_pivot.scatter(-1, column, True)[..., None, :k_len]

        window, text = (start <= j) & (j <= i), (j < prefix) & (j < start)
        shape = *rows, q_len, k_len
        return window.expand(shape), text.expand(shape), is_pivot & (j < start)

    def dense_mask(
        self, batch: int, q_len: int, k_len: int, kv_lens: Tensor | None = None
    ) -> Tensor:
        """Which keys each query may attend to: bool, ``True`` where it may. ``(B, Sq, Sk)``, or
        ``(B, G, Sq, Sk)`` with ``pivot_idx (B, G, P)``.

        For people and tests; the attention itself never builds it (``reference`` apart).
        ``kv_lens``: as for the attention.
        """
        window, text, pivot = self.regions(batch, q_len, k_len, kv_lens)
        return window | text | pivot


def check_kv_lens(kv_lens: Any, batch: int, k_len: int) -> None:
    """Its values too, where that costs no synchronisation."""
    if not isinstance(kv_lens, Tensor) or kv_lens.dtype != torch.int32:
        raise TypeError(f"kv_lens: expected an int32 tensor (B,), got {describe(kv_lens)}")
    if kv_lens.shape != (batch,):
        raise ValueError(f"kv_lens: expected ({batch},), got {tuple(kv_lens.shape)}")
    if values_readable(kv_lens) and kv_lens.numel() > 0:
        for number in (int(kv_lens.min()), int(kv_lens.max())):
            if not 0 <= number <= k_len:
                raise ValueError(f"kv_lens: expected lengths of 0 to Sk = {k_len}, got {number}")


def _check_batch_and_device(name: str, tensor: Tensor, batch: int, device: torch.device) -> None:
    if tensor.shape[0] not in (1, batch):
        raise ValueError(
            f"layout.{name}: expected {(batch, *tensor.shape[1:])} to match the batch, "
            f"got {tuple(tensor.shape)}"
        )
    if tensor.device != device:
        raise ValueError(
            f"layout.{name}: expected device {device} as the queries, got {tensor.device}"
        )


def _any_out_of_order(pivot_idx: Tensor) -> bool:
    """Whether some entry, padding included, is not above the one before it."""
    return not bool((pivot_idx[..., 1:] > pivot_idx[..., :-1]).all())


def _stream_of(device: torch.device) -> int | None:
    """What orders work on ``device``; ``None`` where nothing may be kept from one call to the next:
    while a CUDA graph is captured, and on devices whose streams are not known here."""
    if device.type == "cpu":
        return 0
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return None
    return torch._C._cuda_getCurrentRawStream(device.index)


def window_start(position: Tensor, query_window: int, key_window_times: int) -> Tensor:
    """First key of the local window of queries at ``position`` (same shape)."""
    block = torch.div(position, query_window, rounding_mode="floor")
    return (block - (key_window_times - 1)).clamp_min(0) * query_window


def sample_pivots(
    text_len: int | Tensor,
    seqlen: int,
    num_pivots: int,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw random pivots behind the text, uniformly and without replacement.

    Never synchronises with the device, so it can be captured in a CUDA graph.

    Args:
        text_len: length of the text prefix, ``int`` (one sample) or an integer tensor ``(B,)``.
        seqlen: sequence length; pivots lie in ``[text_len, seqlen)``.
        num_pivots: pivots per sample. Where fewer positions exist, the row ends in padding
            (``seqlen``).
        generator: source of randomness, on ``device``.
        device: where the result lies; default: the generator's, else ``text_len``'s, else the CPU.

    Returns:
        int32 ``(B, num_pivots)``, ascending and unique in each row, padding last.
    """
    check_int("seqlen", seqlen, minimum=0)
    check_int("num_pivots", num_pivots, minimum=0)
    if isinstance(text_len, Tensor):
        _check_index_tensor("text_len", text_len, 1, "(B,)", (torch.int32, torch.int64))
        if values_readable(text_len) and bool((text_len < 0).any()):
            raise ValueError(f"text_len: expected no negative length, got {int(text_len.min())}")
    else:
        check_int("text_len", text_len, minimum=0)
    if device is None:
        if generator is not None:
            device = generator.device
        else:
            device = text_len.device if isinstance(text_len, Tensor) else torch.device("cpu")
    if isinstance(text_len, Tensor):
        prefix = text_len.to(device).unsqueeze(1)
    else:
        prefix = torch.full((1, 1), min(text_len, seqlen), device=device)
    # Random keys in [0, 1) for positions that may be drawn, 2 for text: the smallest win.
    shape = prefix.shape[0], seqlen
    keys = torch.rand(shape, generator=generator, dtype=torch.float32, device=device)
    keys = keys.masked_fill(torch.arange(seqlen, device=device) < prefix, 2.0)
    drawn, position = keys.topk(min(num_pivots, seqlen), dim=1, largest=False, sorted=False)
    pivots = torch.where(drawn < 1.5, position, seqlen).sort(dim=1).values
    pivots = torch.nn.functional.pad(pivots, (0, num_pivots - pivots.shape[1]), value=seqlen)
    return pivots.to(torch.int32)


def _check_index_tensor(
    name: str,
    tensor: Tensor,
    ndim: int,
    shape: str,
    dtypes: tuple[torch.dtype, ...] = (torch.int32,),
) -> None:
    if tensor.dtype not in dtypes:
        expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name}: expected dtype {expected}, got {describe(tensor)}")
    if tensor.ndim != ndim:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(tensor.shape)}")

"""What the suite times: shapes, and the work and bytes that no implementation can do without."""

from __future__ import annotations

import dataclasses
import functools

import torch

import cogview_kernels as ck
from cogview_kernels.attention.layout import window_start

WORKS = ("forward", "backward", "forward+backward")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class AttentionCase:
    """One call of the attention. All samples have the same text length, each its own pivots."""

    seqlen: int
    query_window: int
    key_window_times: int
    num_pivots: int
    batch: int = 1
    num_heads: int = 40
    num_kv_heads: int = 0  # 0: num_heads
    head_dim: int = 64
    text_len: int = 64
    q_len: int = 0  # 1: the last query alone, as in decoding; 0: all of them
    dtype: str = "bfloat16"

    @property
    def op(self) -> str:
        return "decode" if self.q_len else "attention"

    @property
    def works(self) -> tuple[str, ...]:
        return ("forward",) if self.q_len else WORKS

    @property
    def queries(self) -> int:
        return self.q_len or self.seqlen

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def name(self) -> str:
        heads = f"H{self.num_heads}" + (f" G{self.num_kv_heads}" if self.num_kv_heads else "")
        queries = f"Sq{self.q_len} " if self.q_len else ""
        return (
            f"B{self.batch} {heads} {queries}S{self.seqlen} D{self.head_dim} "
            f"w{self.query_window} n{self.key_window_times} P{self.num_pivots} T{self.text_len} "
            f"{self.dtype}"
        )

    def layout(self, device: torch.device | str) -> ck.ThreeRegionLayout:
        """Seeded: the same pivots on every device."""
        text_len = torch.full((self.batch,), self.text_len, dtype=torch.int32)
        generator = torch.Generator().manual_seed(0)
        pivots = ck.sample_pivots(text_len, self.seqlen, self.num_pivots, generator)
        return ck.ThreeRegionLayout(
            text_len.to(device), pivots.to(device), self.query_window, self.key_window_times
        )

    @functools.cached_property
    def pairs(self) -> int:
        """Visible pairs of query and key, of all samples, one head."""
        layout = self.layout("cpu")
        assert layout.pivot_idx is not None
        position = torch.arange(self.seqlen - self.queries, self.seqlen)
        start = window_start(position, self.query_window, self.key_window_times)
        window_and_text = position - start + 1 + start.clamp(max=self.text_len)
        pairs = self.batch * int(window_and_text.sum())
        for pivots in layout.pivot_idx.long():
            pivots = pivots[(pivots >= self.text_len) & (pivots < self.seqlen)]
            pairs += int(torch.searchsorted(pivots, start).sum())  # those in front of the window
        return pairs

    @property
    def attended_fraction(self) -> float:
        """Visible pairs over those of causal attention."""
        first = self.seqlen - self.queries + 1
        return self.pairs / (self.batch * (first + self.seqlen) * self.queries / 2)

    def flops(self, work: str) -> int:
        """Products of visible pairs alone, two each: QK^T and PV forward, five backward."""
        products = {"forward": 2, "backward": 5, "forward+backward": 7}[work]
        return 2 * products * self.head_dim * self.num_heads * self.pairs

    def bytes(self, work: str) -> int:
        """Each input read once and each output written once, lse (float32) among them; of the keys
        and values those that some query sees."""
        element = self.torch_dtype.itemsize
        queries = self.batch * self.num_heads * self.queries
        rows = queries * self.head_dim * element
        seen = self.pairs if self.q_len else self.batch * self.seqlen
        keys = seen * self.kv_heads * self.head_dim * element
        forward = 2 * rows + 2 * keys + 4 * queries  # q, out; k, v; lse
        backward = 4 * rows + 4 * keys + 4 * queries  # q, out, dout, dq; k, v, dk, dv; lse
        both = {"forward": forward, "backward": backward}
        return both.get(work, forward + backward)


@dataclasses.dataclass(frozen=True)
class NormCase:
    """One call of a norm or of the sandwich, everything in one dtype."""

    op: str  # layer_norm, sandwich_residual
    rows: int
    hidden: int
    dtype: str = "bfloat16"
    works = WORKS

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def name(self) -> str:
        return f"{self.rows}x{self.hidden} {self.dtype}"

    def flops(self, work: str) -> int:
        return 0  # a few for each element: bytes are what counts

    def bytes(self, work: str) -> int:
        """Each tensor once. LayerNorm: x, y; x, dy, dx. Sandwich: f, residual, h, z; f, h, dh, dz,
        df, dresidual. And the parameters and their gradients."""
        norms = {"layer_norm": 1, "sandwich_residual": 2}[self.op]
        forward = 2 * norms * (self.rows + 1) * self.hidden
        backward = 3 * norms * (self.rows + 1) * self.hidden
        elements = {"forward": forward, "backward": backward}.get(work, forward + backward)
        return elements * self.torch_dtype.itemsize


@dataclasses.dataclass(frozen=True)
class StepCase:
    """One whole training step of CogView's model: forward, loss, backward, optimizer."""

    num_layers: int
    attention: AttentionCase  # of each layer; autocast to its dtype, unless that is float32
    vocab_size: int = 58240
    op = "training_step"
    works = ("step",)

    @property
    def hidden_size(self) -> int:
        return self.attention.num_heads * self.attention.head_dim

    @property
    def name(self) -> str:
        return f"L{self.num_layers} V{self.vocab_size} {self.attention.name}"

    @property
    def tokens(self) -> int:
        return self.attention.batch * self.attention.seqlen

    @property
    def matrix_parameters(self) -> int:
        """Weights that every token is multiplied with: 12 hidden^2 a layer, and the tied head."""
        return 12 * self.num_layers * self.hidden_size**2 + self.vocab_size * self.hidden_size

    def flops(self, work: str) -> int:
        attention = self.num_layers * self.attention.flops("forward+backward")
        return 6 * self.matrix_parameters * self.tokens + attention

    def bytes(self, work: str) -> int:
        """AdamW's: parameter, gradient and two moments read, three of them written, float32."""
        return 28 * self.matrix_parameters


Case = AttentionCase | NormCase | StepCase

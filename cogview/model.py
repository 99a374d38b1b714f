"""The CogView GPT, all of it in this file.

Features:
- Sandwich-LN: `h + LN(f(LN(h)))` around attention and MLP (or plain Pre-LN, for comparison)
- PB-relax LayerNorm: divides the input by its largest magnitude first, so that float16 does not
  overflow
- three-region sparse attention: all text, random pivots (drawn anew for each layer and step), and a
  block-wise local window (or dense causal attention, for comparison)
- MLP with tanh-GELU and four times the width, learned positions, output head tied to the embedding
- a cross entropy that never holds the logits of a whole batch; activation checkpointing;
  `torch.compile` of the layers
- smaller gradient for the embedding: `e * a + e.detach() * (1 - a)`
- initialisation N(0, init_std = 0.02), and init_std / sqrt(2 L) for the projections that write to
  the residual stream
- decoding with a preallocated key/value cache
- parameter names and shapes of the released CogView checkpoints
- other operators in the place of the fused ones, for comparison: `Operators`
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import cogview_kernels as ck
from cogview.config import ModelConfig

# Logits beyond the first size, in bytes of float32, are computed in parts of the second. More parts
# than this would cost accuracy: under float16 and bfloat16, the gradients of the parts are summed
# in half precision.
WHOLE_LOGITS = 2**26
PART_OF_LOGITS = 2**25
MAX_PARTS_OF_LOGITS = 16


def causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Dense attention of (B, H, Sq, D) queries, the last positions, to (B, H, Sk, D) keys."""
    if q.shape[2] == k.shape[2]:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.tril(k.shape[2] - q.shape[2]))


@dataclasses.dataclass(frozen=True)
class Operators:
    """The functions that the model's layers call; by default those of cogview_kernels.

    Others may stand in for them, to compare implementations or to look inside. Parameters,
    initial weights and checkpoints stay the same.

    Attributes:
        three_region_attention: called with `(q, k, v, layout)`.
        causal_attention: called with `(q, k, v)`, where the model's attention is dense.
        layer_norm: called with `(x, weight, bias, eps, relax)`. Computes the first norm, and with
            Pre-LN all others.
        sandwich_residual: called with `(f, residual, post_weight, post_bias, pre_weight, pre_bias,
            eps=, relax=, dropout_p=)`. Computes all norms of Sandwich-LN but the first.
    """

    three_region_attention: Callable[..., torch.Tensor] = ck.three_region_attention
    causal_attention: Callable[..., torch.Tensor] = causal_attention
    layer_norm: Callable[..., torch.Tensor] = ck.pb_relax_layer_norm
    sandwich_residual: Callable[..., tuple[torch.Tensor, torch.Tensor]] = ck.sandwich_residual


class KVCache:
    """Keys and values of every layer, and the number of positions that are filled.

    Args:
        batch, length: capacity: `batch` sequences of `length` tokens.
        dtype, device: dtype and device of the model's keys and values.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        length: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        head_dim = config.hidden_size // config.num_heads
        shape = (config.num_layers, 2, batch, config.num_heads, length, head_dim)
        self.keys_values = torch.empty(shape, dtype=dtype, device=device)
        self.length = length
        self.filled = 0

    def extend(
        self, layer: int, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends (B, H, Sq, D) to the filled positions; returns views of all filled ones."""
        end = self.filled + k.shape[2]
        if end > self.length:
            raise ValueError(f"cache: expected at most {self.length} tokens, got {end}")
        k_cache, v_cache = self.keys_values[layer]
        k_cache[:, :, self.filled : end] = k
        v_cache[:, :, self.filled : end] = v
        return k_cache[:, :, :end], v_cache[:, :, :end]


class SelfAttention(nn.Module):
    def __init__(self, config: ModelConfig, operators: Operators) -> None:
        super().__init__()
        self.operators = operators
        self.num_heads = config.num_heads
        # Rows of the weight: those of Q, then K, then V.
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        z: torch.Tensor,
        layout: ck.ThreeRegionLayout | None,
        cache: KVCache | None,
        layer: int,
    ) -> torch.Tensor:
        batch, length, hidden = z.shape
        qkv = self.query_key_value(z).view(
            batch, length, 3, self.num_heads, hidden // self.num_heads
        )
        # Each (B, H, S, D), a view of the packed projection.
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        if layout is not None:
            out = self.operators.three_region_attention(q, k, v, layout)
        else:
            out = self.operators.causal_attention(q, k, v)
        return self.dense(out.transpose(1, 2).reshape(batch, length, hidden))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, 4 * config.hidden_size)
        self.dense_4h_to_h = nn.Linear(4 * config.hidden_size, config.hidden_size)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(z), approximate="tanh"))


class Norm(ck.PBRelaxLayerNorm):
    def __init__(self, config: ModelConfig, operators: Operators) -> None:
        relax = None if config.relax == "none" else config.relax
        super().__init__(config.hidden_size, config.layernorm_eps, relax)
        self.operators = operators

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.operators.layer_norm(x, self.weight, self.bias, self.eps, self.relax)


class PreNorm(Norm):
    """The norm before a sub-layer. In one pass it also adds the branch that came before it."""

    def forward(  # type: ignore[override]
        self,
        h: torch.Tensor,
        f: torch.Tensor | None = None,
        post: Norm | None = None,
        dropout_p: float = 0.0,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """The norm of `h`. With the output `f` of a branch, the new `h` and its norm: Sandwich-LN
        `h + post(dropout(f))`, or Pre-LN `h + dropout(f)` where `post` is None.

        Under autocast f has half precision, while the residual stream stays float32.
        """
        if f is None:
            return super().forward(h)
        if post is None:
            h = h + F.dropout(f, dropout_p)
            return h, super().forward(h)
        parameters = post.weight, post.bias, self.weight, self.bias
        return self.operators.sandwich_residual(
            f, h, *parameters, eps=self.eps, relax=self.relax, dropout_p=dropout_p
        )


class Layer(nn.Module):
    """Attention and MLP.

    Takes and returns the residual stream `h` and its normalised form `z`, which is the input of the
    next sub-layer. The fused kernel computes both in one pass; a layer therefore ends with the
    first norm of the next layer: `next_norm`.
    """

    def __init__(self, config: ModelConfig, index: int, operators: Operators) -> None:
        super().__init__()
        self.index = index
        self.dropout = config.dropout
        self.input_layernorm = PreNorm(config, operators)
        self.attention = SelfAttention(config, operators)
        self.post_attention_layernorm = PreNorm(config, operators)
        self.mlp = MLP(config)
        sandwich = config.norm == "sandwich"
        self.third_layernorm = Norm(config, operators) if sandwich else None  # after attention
        self.fourth_layernorm = Norm(config, operators) if sandwich else None  # after the MLP

    def forward(
        self,
        h: torch.Tensor,
        z: torch.Tensor,
        next_norm: PreNorm,
        layout: ck.ThreeRegionLayout | None,
        cache: KVCache | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        p = self.dropout if self.training else 0.0
        f = self.attention(z, layout, cache, self.index)
        h, z = self.post_attention_layernorm(h, f, self.third_layernorm, p)
        return next_norm(h, self.mlp(z), self.fourth_layernorm, p)


class Transformer(nn.Module):
    def __init__(self, config: ModelConfig, operators: Operators) -> None:
        super().__init__()
        self.position_embeddings = nn.Embedding(config.max_positions, config.hidden_size)
        self.layers = nn.ModuleList(
            Layer(config, index, operators) for index in range(config.num_layers)
        )
        self.final_layernorm = PreNorm(config, operators)

    def layers_with_next_norm(self) -> list[tuple[Layer, PreNorm]]:
        """The layers, each with the norm that it ends with: the first one of the next layer."""
        layers: list[Layer] = list(self.layers)  # type: ignore[arg-type]
        norms = [layer.input_layernorm for layer in layers[1:]] + [self.final_layernorm]
        return list(zip(layers, norms, strict=True))


class GPT(nn.Module):
    """The model: the top of this file lists its features, `ModelConfig` its settings.

    Args:
        config: settings that contradict each other are a ValueError of `ModelConfig`.
        vocab_size: number of token ids.
        operators: what the layers call.

    Attributes:
        max_hidden: (num_layers,), the largest magnitude in the residual stream after each layer,
            of the last call in training mode. Under float16 it must stay below 65504.
    """

    max_hidden: torch.Tensor

    def __init__(
        self, config: ModelConfig, vocab_size: int, operators: Operators = Operators()
    ) -> None:
        super().__init__()
        self.config = config
        self.word_embeddings = nn.Embedding(vocab_size, config.hidden_size)
        self.transformer = Transformer(config, operators)
        self.dropout = nn.Dropout(config.dropout)
        self.call_layer = _call_layer
        for name, parameter in self.named_parameters():
            if name.endswith(("attention.dense.weight", "mlp.dense_4h_to_h.weight")):
                nn.init.normal_(parameter, std=config.init_std / math.sqrt(2 * config.num_layers))
            elif name.endswith(("third_layernorm.weight", "fourth_layernorm.weight")):
                nn.init.constant_(parameter, config.sandwich_init)
            elif parameter.ndim == 2:
                nn.init.normal_(parameter, std=config.init_std)
            elif "layernorm" not in name:
                nn.init.zeros_(parameter)

    def sample_layouts(
        self, text_len: torch.Tensor, length: int, generator: torch.Generator | None = None
    ) -> list[ck.ThreeRegionLayout | None]:
        """Draws the pivots of every layer.

        Args:
            text_len: int32 (B,), the number of tokens before the first image code.
            length: tokens of the whole sequence, including those still to be generated.
            generator: on the device of `text_len`.

        Returns:
            One layout per layer; None for dense attention.
        """
        config = self.config
        if config.attention == "dense":
            return [None] * config.num_layers
        layouts: list[ck.ThreeRegionLayout | None] = []
        for _ in range(config.num_layers):
            pivots = ck.sample_pivots(
                text_len, length, config.num_pivots, generator=generator, device=text_len.device
            )
            window, times = config.query_window, config.key_window_times
            biased = config.pivot_bias == "cogview"
            if biased:
                pivots = _leave_room_for_text(pivots, text_len, length, generator)
            if biased and self.training:  # CogView's inference adds no bias
                layout = ck.ThreeRegionLayout.from_cogview(pivots, text_len, window, times, length)
            else:
                layout = ck.ThreeRegionLayout(
                    text_len, pivots, query_window=window, key_window_times=times
                )
            layouts.append(layout)
        return layouts

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        layouts: list[ck.ThreeRegionLayout | None],
        cache: KVCache | None = None,
    ) -> torch.Tensor:
        """The final hidden states; `logits` turns them into scores.

        Args:
            tokens, positions: int64 (B, S). With a cache, the tokens after the cached ones.
            layouts: from `sample_layouts`.
            cache: this call appends its keys and values.

        Returns:
            (B, S, hidden_size)
        """
        alpha = self.config.embedding_gradient_scale
        h = self.word_embeddings(tokens) + self.transformer.position_embeddings(positions)
        if alpha != 1.0:
            h = h * alpha + h.detach() * (1.0 - alpha)
        h = self.dropout(h)
        steps = self.transformer.layers_with_next_norm()
        z = steps[0][0].input_layernorm(h)
        max_hidden = []
        for (layer, next_norm), layout in zip(steps, layouts, strict=True):
            if cache is not None:
                h, z = layer(h, z, next_norm, layout, cache)
            elif self.config.activation_checkpointing and torch.is_grad_enabled():
                h, z = checkpoint(
                    self.call_layer, layer, h, z, next_norm, layout, None, use_reentrant=False
                )
            else:
                h, z = self.call_layer(layer, h, z, next_norm, layout, None)
            if self.training:
                max_hidden.append(torch.linalg.vector_norm(h.detach(), math.inf))
        if self.training:
            self.max_hidden = torch.stack(max_hidden)
        if cache is not None:
            cache.filled += tokens.shape[1]
        return z

    def logits(self, z: torch.Tensor) -> torch.Tensor:
        """Scores of every id, from the tied head: (..., hidden_size) to (..., vocab_size)."""
        return F.linear(z, self.word_embeddings.weight)

    def losses(self, z: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Cross entropy of every target under `logits(z)`, in nats.

        The logits of a batch are by far the largest tensor of a training step: 253 MB in float32,
        and as much again for each of their gradient and their softmax, for one sequence of the
        4-billion-parameter model. Large ones are computed for a part of the positions at a time,
        once for the loss and once more in the backward pass. Torch has `linear_cross_entropy` for
        this; in version 2.13, with a loss for each target, it takes more memory and time.

        Args:
            z: (..., hidden_size).
            targets: int64 (...).

        Returns:
            (...), float32; float64 for float64.
        """
        weight = self.word_embeddings.weight
        if torch.is_autocast_enabled(z.device.type):  # once, not for each part
            weight = weight.to(torch.get_autocast_dtype(z.device.type))
        rows, ids = z.flatten(0, -2), targets.flatten()
        size = 4 * len(ids) * len(weight)
        if size <= WHOLE_LOGITS:
            return _cross_entropy(rows, weight, ids).view(targets.shape)
        parts = min(MAX_PARTS_OF_LOGITS, -(-size // PART_OF_LOGITS))
        losses = [
            checkpoint(_cross_entropy, *part, use_reentrant=False, preserve_rng_state=False)
            for part in zip(rows.chunk(parts), [weight] * parts, ids.chunk(parts), strict=False)
        ]
        return torch.cat(losses).view(targets.shape)

    def compile_layers(self, backend: str = "inductor") -> None:
        """Compiles the layers with `torch.compile`: once, because all have the same code. Drawing
        with a cache does not use the compiled ones, for which each new token would be another case.
        """
        self.call_layer = torch.compile(_call_layer, backend=backend)


def _call_layer(layer: Layer, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return layer(*arguments)


def _cross_entropy(z: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Losses (N,) of targets (N,), for hidden states (N, hidden_size)."""
    logits = F.linear(z, weight)
    return F.cross_entropy(
        logits if logits.dtype == torch.float64 else logits.float(), targets, reduction="none"
    )


def _leave_room_for_text(
    pivots: torch.Tensor, text_len: torch.Tensor, length: int, generator: torch.Generator | None
) -> torch.Tensor:
    """Replaces as many random pivots (B, P) as there are text tokens by padding, because CogView
    counts the text among its `num_pivots` entries."""
    order = torch.rand(pivots.shape, generator=generator, device=pivots.device).argsort(dim=1)
    dropped = order < text_len.unsqueeze(1)
    return pivots.masked_fill(dropped, length).sort(dim=1).values

"""A whole training step of CogView's model: pivots, forward, loss, backward, clipping, AdamW.

The model is cogview/model.py's whatever the method; a method decides whether its attention is dense
and which operators it calls. No dropout, with which ours would have one more thing fused.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cogview_kernels as ck
from benchmarks.suite import norms
from benchmarks.suite.attention import cogview_formulation, why_no_kernel
from benchmarks.suite.cases import StepCase
from benchmarks.suite.methods import Method, Prepare, kernels_on
from cogview.config import ModelConfig
from cogview.model import GPT, Operators

# The model's setting, by what is computed.
ATTENTION: dict[str, Any] = {"three-region": "three_region", "dense causal": "dense"}

MakeOperators = Callable[[StepCase, torch.device], Operators]


def on_backend(backend: str) -> Operators:
    return Operators(
        three_region_attention=functools.partial(ck.three_region_attention, backend=backend),
        layer_norm=functools.partial(ck.pb_relax_layer_norm, backend=backend),
        sandwich_residual=functools.partial(ck.sandwich_residual, backend=backend),
    )


def ours(case: StepCase, device: torch.device) -> Operators:
    return on_backend(kernels_on(device))


def definitions(case: StepCase, device: torch.device) -> Operators:
    return on_backend("reference")


def as_cogview_computes(case: StepCase, device: torch.device) -> Operators:
    """Plain PyTorch; nothing of cogview_kernels."""

    def attention(q: Tensor, k: Tensor, v: Tensor, layout: ck.ThreeRegionLayout) -> Tensor:
        return cogview_formulation(case.attention, layout, device)(q, k, v)

    def norm(x: Tensor, weight: Tensor, bias: Tensor, *_: Any) -> Tensor:
        return norms.pb_relax_layer_norm(x, weight, bias)

    def sandwich(*tensors: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        return norms.sandwich_of(norm)(*tensors)

    return Operators(three_region_attention=attention, layer_norm=norm, sandwich_residual=sandwich)


class Training:
    """A model, the tokens it learns and its optimizer, the same for a case and a device; a call is
    one step and returns its loss.

    Attributes:
        losses: of each target token, in the last step.
    """

    def __init__(
        self, case: StepCase, computes: str, make: MakeOperators, device: torch.device
    ) -> None:
        self.case, self.device = case, device
        shape = case.attention
        config = ModelConfig(
            num_layers=case.num_layers,
            hidden_size=case.hidden_size,
            num_heads=shape.num_heads,
            max_positions=shape.seqlen,
            dropout=0.0,
            layernorm_eps=norms.EPS,
            query_window=shape.query_window,
            key_window_times=shape.key_window_times,
            num_pivots=shape.num_pivots,
            attention=ATTENTION[computes],
        )
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices), device:
            torch.manual_seed(0)
            self.model = GPT(config, case.vocab_size, make(case, device))
            self.tokens = torch.randint(case.vocab_size, (shape.batch, shape.seqlen + 1))
            self.positions = torch.arange(shape.seqlen).expand(shape.batch, -1)
            self.text_len = torch.full((shape.batch,), shape.text_len, dtype=torch.int32)
        self.pivots = torch.Generator(device).manual_seed(0)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.04, fused=True
        )

    def forward(self) -> Tensor:
        """The losses of all target tokens in float32 (float64 for float64), with new pivots."""
        layouts = self.model.sample_layouts(self.text_len, self.case.attention.seqlen, self.pivots)
        z = self.model(self.tokens[:, :-1], self.positions, layouts)
        logits = self.model.logits(z).flatten(0, 1)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, self.tokens[:, 1:].flatten(), reduction="none")

    def __call__(self) -> Tensor:
        dtype = self.case.attention.torch_dtype
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32):
            losses = self.forward()
        loss = losses.mean()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)  # a step's memory begins without gradients
        self.losses = losses.detach()
        return loss.detach()


@functools.cache
def reference_losses(case: StepCase, computes: str, device: torch.device) -> Tensor:
    """What ``losses`` of the first step must be, by the definitions in float64."""
    training = Training(case, computes, definitions, device)
    training.model.double()
    with torch.no_grad():
        return training.forward()


def training(computes: str, operators: MakeOperators) -> Prepare:
    return lambda case, layout, device: Training(case, computes, operators, device)


def no_kernels(case: StepCase, device: torch.device) -> str | None:
    """Of the attention, the norms and the sandwich."""
    return why_no_kernel(case.attention, device)


OURS, DENSE = training("three-region", ours), training("dense causal", ours)  # with our norms
COGVIEW = training("three-region", as_cogview_computes)
STEP_METHODS: tuple[Method, ...] = (
    Method("cogview_kernels", "three-region", OURS, no_kernels, "ours"),
    Method("dense SDPA", "dense causal", DENSE, norms.no_kernel, "dense"),
    Method("CogView's formulation", "three-region", COGVIEW),
)

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
from benchmarks.suite.attention import cogview_formulation
from benchmarks.suite.cases import StepCase
from benchmarks.suite.methods import Method, kernels_on
from cogview.config import ModelConfig
from cogview.model import GPT, Operators

MakeOperators = Callable[[StepCase, torch.device], Operators]


def on_backend(backend: str) -> Operators:
    return Operators(
        three_region_attention=functools.partial(ck.three_region_attention, backend=backend),
        layer_norm=functools.partial(ck.pb_relax_layer_norm, backend=backend),
        sandwich_residual=functools.partial(ck.sandwich_residual, backend=backend),
    )


def ours(case: StepCase, device: torch.device) -> Operators:
    return on_backend(kernels_on(device))


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
    one step, which returns its loss and keeps ``losses``, those of each target token."""

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
            attention="dense" if computes == "dense causal" else "three_region",
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
    training = Training(case, computes, lambda *_: on_backend("reference"), device)
    training.model.double()
    with torch.no_grad():
        return training.forward()


def method(name: str, computes: str, operators: MakeOperators, role: str = "") -> Method:
    def prepare(case: StepCase, layout: None, device: torch.device) -> Training:
        return Training(case, computes, operators, device)

    return Method(name, computes, prepare, role)


STEP_METHODS: tuple[Method, ...] = (
    method("cogview_kernels", "three-region", ours, "ours"),
    method("dense SDPA", "dense causal", ours, "dense"),  # with our norms
    method("CogView's formulation", "three-region", as_cogview_computes),
)

"""A whole training step of CogView's model: pivots, forward, loss, backward, clipping, AdamW.

The model is cogview/model.py's whatever the method; a method decides which of its settings hold
and which functions it calls for cogview_kernels'. No dropout, with which ours would have one more
thing fused.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cogview.model
import cogview_kernels as ck
from benchmarks.suite import norms as norm_methods
from benchmarks.suite.cases import DTYPES, StepCase
from benchmarks.suite.methods import Method, anywhere, compiled
from cogview.config import ModelConfig
from cogview_kernels import extension

# What is computed, and the settings of the model that say so.
SETTINGS: dict[str, dict[str, Any]] = {
    "three-region": {},
    "dense causal": {"attention": "dense"},
    "dense causal, plain LayerNorm": {"attention": "dense", "relax": "none"},
}


def functions(attention: Any, norm: Any, sandwich: Any) -> ModuleType:
    """cogview_kernels for the model, with these functions for its own."""

    class Norm(ck.PBRelaxLayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = norm(x, self.weight, self.bias, eps=self.eps, relax=self.relax)
            return y

    module = ModuleType("cogview_kernels_for_the_model")
    module.__dict__.update(
        vars(ck),
        three_region_attention=attention,
        sandwich_residual=sandwich,
        PBRelaxLayerNorm=Norm,
    )
    return module


def ours(device: torch.device) -> ModuleType:
    return on_backend(norm_methods.kernels_on(device))


def portable(device: torch.device) -> ModuleType:
    return on_backend("portable")


def on_backend(backend: str) -> ModuleType:
    calls = ck.three_region_attention, ck.pb_relax_layer_norm, ck.sandwich_residual
    return functions(*(functools.partial(call, backend=backend) for call in calls))


def by_torch(device: torch.device) -> ModuleType:
    """Plain norms, each of its own; nothing of cogview_kernels."""

    def norm(x: Tensor, weight: Tensor, bias: Tensor, **options: Any) -> Tensor:
        return norm_methods.layer_norm(x, weight, bias)

    def sandwich(f: Tensor, residual: Tensor, *parameters: Tensor, **options: Any) -> Any:
        h = residual + norm(f, *parameters[:2])
        return h, norm(h, *parameters[2:])

    return functions(None, norm, sandwich)


def definitions() -> ModuleType:
    """In float64, the attention head by head: its memory grows with the square of the sequence."""
    reference = on_backend("reference")

    def attention(q: Tensor, k: Tensor, v: Tensor, layout: ck.ThreeRegionLayout) -> Tensor:
        heads = zip(*(x.split(1, dim=1) for x in (q, k, v)), strict=True)
        call = functools.partial(ck.three_region_attention, layout=layout, backend="reference")
        return torch.cat([call(*head) for head in heads], dim=1)

    reference.__dict__["three_region_attention"] = attention
    return reference


@contextlib.contextmanager
def model_calls(kernels: ModuleType) -> Iterator[None]:
    usual = cogview.model.ck
    cogview.model.__dict__["ck"] = kernels
    try:
        yield
    finally:
        cogview.model.__dict__["ck"] = usual


def token_losses(z: Tensor, embeddings: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of each target under the tied head, float32 (float64 for float64)."""
    logits = F.linear(z, embeddings).flatten(0, 1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, targets.flatten(), reduction="none")


class Training:
    """A model, the tokens it learns and its optimizer, the same for a case and a device; a call is
    one step and returns its loss.

    Attributes:
        losses: of each target token, in the last step.
    """

    def __init__(
        self, case: StepCase, computes: str, kernels: ModuleType, device: torch.device
    ) -> None:
        self.case, self.kernels, self.device = case, kernels, device
        config = ModelConfig(
            num_layers=case.num_layers,
            hidden_size=case.hidden_size,
            num_heads=case.num_heads,
            max_positions=case.seqlen,
            dropout=0.0,
            layernorm_eps=norm_methods.EPS,
            query_window=case.query_window,
            key_window_times=case.key_window_times,
            num_pivots=case.num_pivots,
            **SETTINGS[computes],
        )
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices), device, model_calls(kernels):
            torch.manual_seed(0)
            self.model = cogview.model.GPT(config, case.vocab_size)
            self.tokens = torch.randint(case.vocab_size, (case.batch, case.seqlen + 1))
            self.positions = torch.arange(case.seqlen).expand(case.batch, -1)
            self.text_len = torch.full((case.batch,), case.text_len, dtype=torch.int32)
        self.pivots = torch.Generator(device).manual_seed(0)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.04, fused=True
        )
        self.token_losses: Callable[[Tensor, Tensor, Tensor], Tensor] = token_losses

    def compile(self) -> None:
        """The loss, and each layer; all layers share what is compiled."""
        self.token_losses = compiled(token_losses)
        for layer in self.model.transformer.layers:
            layer.compile(dynamic=False, fullgraph=True)

    def forward(self) -> Tensor:
        """The losses of all target tokens, with pivots drawn anew."""
        layouts = self.model.sample_layouts(self.text_len, self.case.seqlen, self.pivots)
        with model_calls(self.kernels):
            z = self.model(self.tokens[:, :-1], self.positions, layouts)
        return self.token_losses(z, self.model.word_embeddings.weight, self.tokens[:, 1:])

    def __call__(self) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        half = self.case.dtype != "float32"
        with torch.autocast(self.device.type, dtype=DTYPES[self.case.dtype], enabled=half):
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
    training = Training(case, computes, definitions(), device)
    training.model.double()
    with torch.no_grad():
        return training.forward()


def method(
    name: str,
    computes: str,
    kernels: Callable[[torch.device], ModuleType],
    why_not: Callable[[StepCase, torch.device], str | None] = anywhere,
    compiles: bool = False,
) -> Method:
    def prepare(case: StepCase, layout: None, device: torch.device) -> Training:
        training = Training(case, computes, kernels(device), device)
        if compiles:
            training.compile()
        return training

    return Method(name, computes, prepare, why_not, compiles)


def no_kernels(case: StepCase, device: torch.device) -> str | None:
    """Of the attention, the norms and the sandwich."""
    head_dim = case.hidden_size // case.num_heads
    if device.type == "cuda" and case.dtype == "float32":
        return "the attention's kernels take float16 and bfloat16"
    if device.type != "cuda":
        return None
    return extension.why_no_attention_kernel(DTYPES[case.dtype], head_dim, device, "cuda")


def no_compiled_kernels(case: StepCase, device: torch.device) -> str | None:
    return no_kernels(case, device) or norm_methods.no_compiler(case, device)


_SPARSE, _DENSE, _PLAIN = SETTINGS
STEP_METHODS: tuple[Method, ...] = (
    method("cogview_kernels", _SPARSE, ours, no_kernels),
    method("cogview_kernels, compiled", _SPARSE, ours, no_compiled_kernels, compiles=True),
    method("portable", _SPARSE, portable, norm_methods.same_as_ours),
    method("dense SDPA", _DENSE, ours, norm_methods.no_kernel),
    method("dense SDPA, F.layer_norm", _PLAIN, by_torch),
    method("dense SDPA, F.layer_norm, compiled", _PLAIN, by_torch, norm_methods.no_compiler, True),
)

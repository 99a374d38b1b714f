"""What a training takes of each GPU, measured without a GPU: memory, and bytes that travel.

The training's own code runs one step with fake tensors, which have shapes and no memory, in a fake
group of processes; torch's memory tracker adds up what the tensors would take. Left out is what
does not stand in a tensor: the CUDA context, NCCL's buffers, fragmentation and the workspaces of
matrix products, together about 2 to 4 GiB.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from cogview import distributed
from cogview.checkpoint import is_sharded, training_state
from cogview.config import Config
from cogview.data.tokens import TokenDataset
from cogview.model import GPT, Operators
from cogview.train import Trainer

# What torch's trackers call it, and what a plan calls it.
_KINDS = {
    "Parameter": "parameters",
    "Sharded Param": "parameters",
    "Buffer": "parameters",
    "Gradient": "gradients",
    "Sharded Grad": "gradients",
    "Optstate": "optimizer",
    "OptState": "optimizer",
    "Unsharded Param": "gathered weights",
    "All Gather": "gathered weights",
    "Unsharded Grad": "gradients to reduce",
    "Reduce Scatter": "gradients to reduce",
    "Activation": "activations",
    "Inputs": "activations",
    "Other": "activations",
    "Temp": "temporary",
}
_RELAX = (None, "row", "tensor")  # their numbers in the operators' schemas


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a step takes of one GPU.

    Attributes:
        micro_batch_size: sequences per pass.
        passes: passes per step.
        memory: bytes at the moment of the peak, by what they hold.
        gathered: bytes of weights that arrive per step.
        reduced: bytes of gradients that arrive per step.
    """

    micro_batch_size: int
    passes: int
    memory: dict[str, int]
    gathered: int
    reduced: int

    @property
    def peak(self) -> int:
        """Bytes."""
        return sum(self.memory.values())


def plan(config: Config, gpus: int) -> Plan:
    """Measures one step of `config` on `gpus` GPUs, spread as `training.parallel` says.

    Precision `auto` is bfloat16. Every sequence has the full length.

    Raises:
        ValueError: the batch cannot be shared among so many GPUs.
    """
    training = dataclasses.replace(
        config.training,
        precision="float32" if config.training.precision == "float32" else "bfloat16",
    )
    config = dataclasses.replace(config, device="cpu", training=training)
    sharded = training.parallel == "fsdp" and gpus > 1
    per_gpu = dataclasses.replace(training, batch_size=training.batch_size // gpus)
    if training.batch_size % gpus:
        raise ValueError(
            f"training.batch_size: expected a multiple of {gpus} GPUs, got {training.batch_size}"
        )
    if not sharded:
        config = dataclasses.replace(config, training=per_gpu)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        if sharded:
            stack.enter_context(_fake_processes(gpus))
        stack.enter_context(FakeTensorMode())
        data = _longest_examples(config)
        make_model = functools.partial(GPT, operators=_operators())
        trainer = Trainer(config, folder, data, data, progress=False, make_model=make_model)
        size = trainer.micro_batch_size
        passes = per_gpu.batch_size // size
        training_state(trainer.model, trainer.optimizer)  # makes the optimizer's state
        if passes > 1:  # the passes before have left gradients
            for parameter in trainer.model.parameters():
                parameter.grad = torch.zeros_like(parameter)
        tracker: Any
        if is_sharded(trainer.model):
            # Without the optimizer's step: the tracker would count the whole tensors that DTensor
            # imagines. The step takes less than what the activations leave.
            tracker = FSDPMemTracker(trainer.model, trainer.optimizer)
        else:
            tracker = MemTracker()
            tracker.track_external(trainer.model, trainer.optimizer)
        traffic = _Traffic()
        with tracker:
            batch = trainer._batch(data, np.zeros(size, np.int64))
            with traffic:
                trainer._backward(batch, 0, 1.0)
            if not sharded:
                torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
                trainer.optimizer.step()
        snapshot = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
        whole = sum(p.numel() * p.element_size() for p in trainer.model.parameters())
    memory = dict.fromkeys(_KINDS.values(), 0)
    for kind, num_bytes in snapshot.items():
        if kind != "Total":
            memory[_KINDS[kind]] += int(num_bytes)
    share = (gpus - 1) / gpus  # of what is gathered or reduced, the part of the other GPUs
    gathered, reduced = traffic.gathered * passes, traffic.reduced * passes
    if not sharded:
        reduced = 2 * whole  # once per step: partial sums arrive, and then the sums of the others
    return Plan(size, passes, memory, int(gathered * share), int(reduced * share))


@contextlib.contextmanager
def _fake_processes(number: int) -> Iterator[None]:
    dist.init_process_group("fake", rank=0, world_size=number, store=FakeStore())
    try:
        distributed.mesh("cpu", number)  # holds real tensors: made before the others are fake
        yield
    finally:
        distributed.mesh.cache_clear()
        dist.destroy_process_group()


class _Traffic(TorchDispatchMode):
    """Adds up the bytes of whole tensors that are gathered and reduced."""

    gathered = 0
    reduced = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.c10d._allgather_base_.default:
            self.gathered += args[0].nbytes
        elif func is torch.ops.c10d._reduce_scatter_base_.default:
            self.reduced += args[1].nbytes
        return func(*args, **(kwargs or {}))


def _longest_examples(config: Config) -> TokenDataset:
    side = config.image_tokenizer.code_size
    length = config.max_text_len
    return TokenDataset(
        np.zeros(2 * length, np.int32),
        np.array([0, length, 2 * length]),
        np.zeros((2, side, side), np.int16),
        np.arange(2, dtype=np.uint64),
        config.text_tokenizer.vocab_size,
        config.image_tokenizer.codebook_size,
    )


def _operators() -> Operators:
    """The operators of the kernels, as a GPU runs them: fake tensors take them on any device."""
    ops: Any = torch.ops.cogview_kernels

    def attention(q: Tensor, k: Tensor, v: Tensor, layout: Any) -> Tensor:
        if torch.is_autocast_enabled(q.device.type):
            dtype = torch.get_autocast_dtype(q.device.type)
            q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        far_keys = ops.three_region_attention_far_keys(
            layout.text_len, layout.pivot_idx, k.shape[2]
        )
        window = layout.query_window, layout.key_window_times
        scale = layout.text_bias, layout.pivot_bias, q.shape[3] ** -0.5
        return ops.three_region_attention(q, k, v, far_keys, *window, *scale)[0]

    def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, relax: Any) -> Tensor:
        return ops.pb_relax_layer_norm(x, weight, bias, eps, _RELAX.index(relax))[0]

    def sandwich(
        f: Tensor, h: Tensor, *parameters: Tensor, eps: float, relax: Any, dropout_p: float
    ) -> tuple[Tensor, Tensor]:
        seed = torch.randint(2**63 - 1, (1,), device=f.device) if dropout_p else None
        dropout = round(dropout_p * 65536)
        return ops.sandwich_residual(
            f, h, True, *parameters, seed, dropout, eps, _RELAX.index(relax)
        )[:2]

    return Operators(
        three_region_attention=attention, layer_norm=layer_norm, sandwich_residual=sandwich
    )

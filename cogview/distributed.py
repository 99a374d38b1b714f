"""One training on several processes: how they find each other, and how a model spreads over them.

    torchrun --nproc_per_node=8 -m -- cogview train --run runs/mine

starts eight processes that each run the same command. `torch.distributed` does the rest: NCCL
between GPUs, Gloo between CPUs. A program that was not started by torchrun is one process, and
every function here then does nothing.

Two ways to spread a model (`training.parallel`):

    ddp     every process holds the whole model and optimizer; gradients are averaged
    fsdp    every process holds a part of each layer's weights, gradients and optimizer state, and
            gathers a layer while it computes
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from cogview.model import GPT

# Longest wait for the other processes. The first process saves and draws while the others wait.
TIMEOUT = datetime.timedelta(minutes=10)


@contextlib.contextmanager
def processes(device: str) -> Iterator[None]:
    """Joins the processes that torchrun started, if it did. Each one takes a GPU of its machine.

    Args:
        device: the setting: `auto`, `cuda` or `cpu`.

    Raises:
        ValueError: the setting names one GPU, or the machine has fewer GPUs than processes.
        RuntimeError: another process ended or did not answer within `TIMEOUT`.
    """
    if not dist.is_torchelastic_launched():
        yield
        return
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if on_gpu:
        local, num_gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if device not in ("auto", "cuda"):
            raise ValueError(f"device: expected cuda or auto under torchrun, got {device}")
        if local >= num_gpus:
            raise ValueError(
                f"--nproc_per_node: expected at most {num_gpus}, the number of GPUs of this "
                f"machine, got {os.environ['LOCAL_WORLD_SIZE']}"
            )
        torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=TIMEOUT)
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            reason = str(error).splitlines()[0]
            raise RuntimeError(
                "another process ended or does not answer; the same command resumes from the "
                f"newest checkpoint ({reason})"
            ) from error
        raise
    dist.destroy_process_group()


def size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_first() -> bool:
    """Whether this is the process that writes files, logs and prints."""
    return rank() == 0


@contextlib.contextmanager
def first_before_others() -> Iterator[None]:
    """The first process runs the block before the others do."""
    if not is_first():
        dist.barrier()
    yield
    if is_first() and size() > 1:
        dist.barrier()


def total(tensor: Tensor) -> Tensor:
    """The sum of the processes' tensors, on each of them. `tensor` is changed."""
    if size() > 1:
        dist.all_reduce(tensor)
    return tensor


def largest(number: int) -> int:
    """The largest of the processes' numbers, on each of them."""
    if size() == 1:
        return number
    tensor = torch.tensor(number)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor)


def largest_of(tensor: Tensor) -> Tensor:
    """The element-wise largest of the processes' tensors, on each of them. `tensor` is changed."""
    if size() > 1:
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor


@functools.cache
def background_group() -> dist.ProcessGroup:
    """All processes, for a thread that must not meet the others' messages."""
    return dist.new_group(backend="gloo", timeout=TIMEOUT)


def spread(model: GPT, parallel: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Spreads a model, the same one on each process, over all processes.

    Args:
        model: on the CPU; afterwards on `device`. Under fsdp its parameters become DTensors; an
            optimizer must be made afterwards.
        parallel: `ddp` or `fsdp`.
        dtype: of the computation. Under fsdp, matrices are gathered in it; what each process keeps,
            and sums of gradients, are float32.

    Returns:
        the module to call for training: its gradients are means over the processes.
    """
    if parallel == "fsdp" and size() > 1:
        _shard(model, mesh(device.type, size()), dtype)
        return model
    if device.type != "cpu":
        model.to(device)
    if size() == 1:
        return model
    ids = [device] if device.type == "cuda" else None
    return DistributedDataParallel(model, ids, gradient_as_bucket_view=True)


@functools.cache
def mesh(device_type: str, processes: int) -> DeviceMesh:
    """All processes in a row."""
    return init_device_mesh(device_type, (processes,))


def _shard(model: GPT, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """Shards the model over all processes, layer by layer.

    A layer ends with the first norm of the next layer: their norms are one group, which is gathered
    when the layer begins and freed when that norm has run. Attention and MLP are groups of their
    own, gathered in `dtype`. The embeddings, which are also the output head, stay gathered for the
    whole pass. Norms and embeddings are gathered in float32, as one process uses them.
    """
    matrices = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    # Torch 2.13 warns of every module whose result is a view, because a change of it in place would
    # lose the hook that gathers for the backward pass. A linear layer's result is a view of its
    # 2-dimensional product, and nothing here changes it in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
    steps = model.transformer.layers_with_next_norm()
    fully_shard(steps[0][0].input_layernorm, mesh=mesh)
    for layer, next_norm in steps:
        fully_shard(layer.attention, mesh=mesh, mp_policy=matrices)
        fully_shard(layer.mlp, mesh=mesh, mp_policy=matrices)
        fully_shard([layer, next_norm], mesh=mesh)
    fully_shard(model, mesh=mesh)


def accumulating(module: nn.Module, last: bool) -> contextlib.AbstractContextManager[Any]:
    """For the passes of a step: under ddp, gradients travel with the last pass only."""
    if isinstance(module, DistributedDataParallel) and not last:
        return module.no_sync()
    return contextlib.nullcontext()


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be spread over the processes."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

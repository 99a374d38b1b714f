"""Training on several processes: what torchrun starts, with Gloo on the CPU."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import test_train
from cogview.checkpoint import list_checkpoints, load_checkpoint, load_latest
from cogview.cli import main
from cogview.loop import read_metrics
from cogview.run import Run

ROOT = Path(__file__).resolve().parents[2]
EVERY = ("training.micro_batch_size=1", "training.save_every=3", "model.num_layers=3")


def torchrun(processes, *arguments, **variables):
    """Starts a module or a script; `communicate` waits for its end."""
    port = ("--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0")
    paths = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"} | variables
    command = [sys.executable, "-m", "torch.distributed.run", *port]
    return subprocess.Popen(
        [*command, f"--nproc_per_node={processes}", *map(str, arguments)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def train(processes, *jobs):
    """Each job: a folder, and settings of the run in it."""
    process = torchrun(processes, __file__, *(" ".join(map(str, job)) for job in jobs))
    out, err = process.communicate(timeout=280)
    assert process.returncode == 0, err
    return out


if __name__ == "__main__":  # one process of `train`
    from cogview import distributed

    torch.set_num_threads(1)
    with distributed.processes("cpu"):
        for job in sys.argv[1:]:
            folder, *settings = job.split()
            run = test_train.trainer(test_train.config(*EVERY, *settings), folder)
            run.run()
            held = sum(parameter.numel() for parameter in run.model.parameters())
            local = sum(
                getattr(parameter, "_local_tensor", parameter).numel()
                for parameter in run.model.parameters()
            )
            print(f"process {distributed.rank()} started at {run.step}: {local} of {held}")


def metrics(folder):
    return test_train.without_seconds(folder)


def assert_close(ours, theirs):
    """Losses and gradient norms of all steps, up to the rounding of sums."""
    assert len(ours) == len(theirs) == 6
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert a[name] == pytest.approx(b[name], rel=2e-5), (a["step"], name)


def test_several_processes_compute_what_one_does(tmp_path):
    one, ddp, fsdp, pre = (tmp_path / name for name in ("one", "ddp", "fsdp", "pre"))
    test_train.trainer(test_train.config(*EVERY), one).run()
    expected = metrics(one)
    assert len({row["grad_norm"] for row in expected}) == 6
    out = train(
        2,
        (ddp, "training.parallel=ddp"),
        (fsdp, "training.parallel=fsdp", "training.async_checkpoints=true"),
        (pre, "training.parallel=fsdp", "model.norm=pre"),
    )
    # With dropout and pivots: they depend on the micro batch, not on the process.
    assert_close(metrics(ddp), expected)
    assert_close(metrics(fsdp), expected)
    counts = [tuple(map(int, line.split(": ")[1].split(" of "))) for line in out.splitlines()]
    assert {count for count in counts if count[0] == count[1]} and all(
        local == whole or local < 0.6 * whole for local, whole in counts
    )

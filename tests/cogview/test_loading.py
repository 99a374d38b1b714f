"""Reading ahead changes nothing but the time."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cogview.data.captions import CaptionedImages
from cogview.data.loading import Reader, load, num_workers
from cogview.data.order import read_order
from cogview.data.sources import open_source


def squares(indices: list[int]) -> torch.Tensor:
    if 13 in indices:
        raise ValueError("13.png: damaged")
    return torch.tensor(indices) ** 2


def processes(indices: list[int]) -> tuple[int, list[int]]:
    return os.getpid(), indices


def test_batches_do_not_depend_on_workers_or_restarts() -> None:
    def read(workers: int, firsts: list[int]) -> list[list[int]]:
        reader = Reader(processes, 10, seed=3, batch_size=4, workers=workers)
        batches = [reader.read(first) for first in firsts]
        reader.close()
        assert {pid == os.getpid() for pid, _ in batches} == {workers == 0}
        return [indices for _, indices in batches]

    whole = read(0, [0, 4, 8, 12, 16])
    assert whole == [read_order(3, first, 4, 10).tolist() for first in (0, 4, 8, 12, 16)]
    assert read(2, [0, 4, 8, 12, 16]) == whole
    assert read(2, [8, 12, 0]) == [whole[2], whole[3], whole[0]]  # resumed, and set back


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_comes_at_its_batch_and_as_it_was(workers: int) -> None:
    batches = load(squares, [[1, 2], [3], [13]], workers)
    assert next(batches).tolist() == [1, 4] and next(batches).tolist() == [9]
    with pytest.raises(ValueError, match=r"^13\.png: damaged$"):
        next(batches)


def test_signals_do_not_end_the_workers() -> None:
    """A terminal and a batch system send them to all processes of a group."""
    reader = Reader(processes, 100, 0, 1, workers=1)
    worker, _ = reader.read(0)
    for name in ("INT", "TERM"):
        subprocess.run(["kill", f"-{name}", str(worker)], check=True)
    time.sleep(0.1)
    assert [reader.read(first)[0] for first in range(1, 9)] == [worker] * 8
    reader.close()
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)


UNCLOSED = """
from cogview.data.loading import Reader
reader = Reader(list, 10, 0, 1, workers=2)
reader.read(0)
raise ValueError("as a step may")
"""


def test_an_error_ends_the_workers() -> None:
    command = [sys.executable, "-c", UNCLOSED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr.endswith("ValueError: as a step may\n")


def test_reading_ahead_leaves_the_random_numbers_alone() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    reader = Reader(list, 10, 0, 2, workers=1)
    reader.read(0)
    assert torch.equal(torch.get_rng_state(), state)
    reader.close()


def test_number_of_workers() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert num_workers(3, cpu) == num_workers(3, gpu) == 3
    assert num_workers(-1, cpu) == 0 and 1 <= num_workers(-1, gpu) <= 8


def test_images_are_read_by_workers(tmp_path: Path) -> None:
    for i in range(8):
        Image.fromarray(np.full((20, 30, 3), 30 * i, np.uint8)).save(tmp_path / f"{i}.jpg")
        (tmp_path / f"{i}.txt").write_text(f"grey {i}")
    images = CaptionedImages(open_source(tmp_path), 16, progress=False)
    train, _ = images.split(0.2, 0)
    alone, helped = (Reader(train.__getitem__, len(train), 0, 3, workers) for workers in (0, 2))
    for first in (0, 3, 6, 9):
        assert torch.equal(alone.read(first), helped.read(first))
    helped.close()

"""Batches in the order of training, read ahead by worker processes.

What a batch holds is a function of the seed and of how many examples were read before it
(`cogview.data.order.read_order`). Neither the number of workers nor a restart changes it.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from cogview.data.order import read_order

PREFETCHED = 4  # batches that each worker reads ahead
MAX_WORKERS = 8  # that are started without being asked for

T = TypeVar("T")


class Reader(Generic[T]):
    """The batches of a training run.

    Args:
        fetch: makes a batch of a list of indices; it runs in the worker processes.
        num_examples: indices are below this.
        seed, batch_size: of the run.
        workers: processes that read ahead; 0: batches are read when they are asked for.
    """

    def __init__(
        self,
        fetch: Callable[[list[int]], T],
        num_examples: int,
        seed: int,
        batch_size: int,
        workers: int = 0,
    ) -> None:
        self.fetch = fetch
        self.num_examples, self.seed, self.batch_size = num_examples, seed, batch_size
        self.workers = workers
        self._next = -1  # examples read before the next batch of `_batches`
        self._batches = load(fetch, ())

    def read(self, first: int) -> T:
        """The batch after `first` examples; the ones behind it are read ahead.

        Raises:
            what `fetch` raises; RuntimeError: a worker was killed.
        """
        if first != self._next:
            self.close()
            self._batches = load(self.fetch, self._indices(first), self.workers)
        self._next = first + self.batch_size
        return next(self._batches)

    def close(self) -> None:
        """Ends the workers; the next `read` starts new ones."""
        self._next = -1
        self._batches.close()
        self._batches = load(self.fetch, ())

    def _indices(self, first: int) -> Iterator[list[int]]:
        for start in itertools.count(first, self.batch_size):
            yield read_order(self.seed, start, self.batch_size, self.num_examples).tolist()


def load(
    fetch: Callable[[list[int]], T], batches: Iterable[list[int]], workers: int = 0
) -> Generator[T, None, None]:
    """`map(fetch, batches)`, with `workers` processes that work ahead; the order is the same.

    The processes end with the generator, or with the one that started them. They ignore SIGINT and
    SIGTERM that others send to a whole group of processes: the one that trains finishes its step.
    """
    if workers == 0:
        for indices in batches:
            yield fetch(indices)
        return
    loader = DataLoader(
        _Batches(fetch),
        batch_size=None,
        sampler=batches,
        num_workers=workers,
        prefetch_factor=PREFETCHED,
        worker_init_fn=_follow_the_parent,
        generator=torch.Generator(),  # the default one belongs to the step that is running
        # Without a copy of the data. Elsewhere fork is not safe.
        multiprocessing_context="fork" if sys.platform == "linux" else None,
    )
    for batch in loader:
        if isinstance(batch, Exception):
            raise batch
        yield batch


def num_workers(setting: int, device: torch.device) -> int:
    """The setting `data.workers`; -1 means none on a CPU, which the model needs for itself, and up
    to `MAX_WORKERS` beside a GPU."""
    if setting >= 0:
        return setting
    if device.type == "cpu":
        return 0
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # as torchrun sets it
    return min(MAX_WORKERS, max(1, cores // processes - 1))


class _Batches(Dataset[Any]):
    def __init__(self, fetch: Callable[[list[int]], Any]) -> None:
        self.fetch = fetch

    def __getitem__(self, indices: list[int]) -> Any:
        try:
            return self.fetch(indices)
        except Exception as error:  # DataLoader would put a traceback into the message
            return error


def _follow_the_parent(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_wait_for_the_parent, daemon=True).start()


def _wait_for_the_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)

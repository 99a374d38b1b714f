"""Settings of all tests: seeded randomness, one thread per process, and which tests run.

``pytest`` leaves out what is marked ``slow``. Of a test marked ``thinned`` it runs parametrisations
that together show every pair of parameter values on each backend; the others are slow.
``--sample N`` draws N parametrisations of each test and backend, and fewer examples in the sweeps;
its seed is ``--hypothesis-seed``.
"""

from __future__ import annotations

import itertools
import os
import random
from collections import defaultdict
from collections.abc import Generator, Iterable

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile(
    "cogview", derandomize=True, deadline=None, database=None, print_blob=False
)
hypothesis.settings.register_profile(
    "sample", derandomize=False, deadline=None, database=None, max_examples=10
)
hypothesis.settings.load_profile("cogview")
# Threads that wait for each other cost more than tensors of this size gain from them.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--sample", type=int, metavar="N", help="draw N parametrisations of each test")


def pytest_configure(config: pytest.Config) -> None:
    # A pytest that a test starts is no worker of pytest-xdist.
    os.environ.pop("PYTEST_XDIST_WORKER", None)
    if not config.option.markexpr:
        config.option.markexpr = "not slow"
    if config.option.sample is not None:
        if config.option.hypothesis_seed is None:
            raise pytest.UsageError("--sample needs --hypothesis-seed, so that a failure repeats")
        hypothesis.settings.load_profile("sample")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> Generator[None]:
    for of_one_test in by_test(items):
        mark_all_but_a_few_as_slow(of_one_test)
    yield  # here -m and -k take effect
    if config.option.sample is not None:
        generator = random.Random(config.option.hypothesis_seed)
        drawn: set[pytest.Item] = set()
        for of_one_test in by_test(items):
            drawn.update(generator.sample(of_one_test, min(config.option.sample, len(of_one_test))))
        config.hook.pytest_deselected(items=[item for item in items if item not in drawn])
        items[:] = [item for item in items if item in drawn]


def by_test(items: Iterable[pytest.Item]) -> list[list[pytest.Item]]:
    """The parametrisations of each test and backend, without those that always skip."""
    tests = defaultdict(list)
    for item in items:
        if not any(mark.args[:1] == (True,) for mark in item.iter_markers("skipif")):
            tests[item.nodeid.partition("[")[0], backend(item)].append(item)
    return list(tests.values())


def mark_all_but_a_few_as_slow(of_one_test: list[pytest.Item]) -> None:
    """Greedy cover: each parametrisation that stays shows the most pairs not shown before. All stay
    of a test with one parameter."""
    pairs = {
        item: set(itertools.combinations(values, min(2, len(values))))
        for item in of_one_test
        for values in [[(name, id(value)) for name, value in parameters(item).items()]]
        if item.get_closest_marker("thinned")
        and backend(item) != "cuda"  # a GPU is fast enough for all
    }
    missing = set().union(*pairs.values())
    while missing:
        best = max(pairs, key=lambda item: len(pairs[item] & missing))
        missing -= pairs.pop(best)
    for item in pairs:
        item.add_marker("slow")


def backend(item: pytest.Item) -> str:
    return str(parameters(item).get("backend") or parameters(item).get("implementation"))


def parameters(item: pytest.Item) -> dict[str, object]:
    return item.callspec.params if hasattr(item, "callspec") else {}

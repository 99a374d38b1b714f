"""Settings of all tests: seeded randomness, one thread per process, and which tests run.

``pytest`` leaves out what is marked ``slow``. Of a test marked ``thinned`` it runs a few
parametrisations, which together show every value of every parameter; the others are slow.
``--sample N`` draws N parametrisations of each test, and fewer examples in the sweeps; its seed is
``--hypothesis-seed``.
"""

from __future__ import annotations

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
    "sample", derandomize=False, deadline=None, database=None, max_examples=4
)
hypothesis.settings.load_profile("cogview")
# Threads that wait for each other cost more than tensors of this size gain from them.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--sample", type=int, metavar="N", help="N parametrisations of each test")


def pytest_configure(config: pytest.Config) -> None:
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
    """The parametrisations of each test, without those that always skip."""
    tests = defaultdict(list)
    for item in items:
        if not any(mark.args[:1] == (True,) for mark in item.iter_markers("skipif")):
            tests[item.nodeid.partition("[")[0]].append(item)
    return list(tests.values())


def mark_all_but_a_few_as_slow(of_one_test: list[pytest.Item]) -> None:
    """Greedy cover: each parametrisation that stays shows the most values not shown before."""
    values = {
        item: {(name, id(value)) for name, value in parameters(item).items()}
        for item in of_one_test
        if item.get_closest_marker("thinned")
        and "cuda" not in map(str, parameters(item).values())  # a GPU runs all of them
    }
    missing = set().union(*values.values())
    while missing:
        best = max(values, key=lambda item: len(values[item] & missing))
        missing -= values.pop(best)
    for item in values:
        item.add_marker("slow")


def parameters(item: pytest.Item) -> dict[str, object]:
    return item.callspec.params  # type: ignore[attr-defined]

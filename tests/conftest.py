"""Settings of all tests: seeded randomness, one thread (threads that wait for each other on a busy
machine cost more than such small tensors gain), and slow sweeps only when asked for."""

from __future__ import annotations

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile(
    "cogview", derandomize=True, deadline=None, database=None, print_blob=False
)
hypothesis.settings.load_profile("cogview")
torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """Without ``-m``, leave out the exhaustive sweeps; ``pytest -m slow`` runs them."""
    if not config.option.markexpr:
        config.option.markexpr = "not slow"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)

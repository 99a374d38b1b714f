"""Tests that need a GPU are skipped, with the reason, where none can be used."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cogview_kernels import extension


@pytest.fixture(scope="session")
def cuda() -> None:
    """For tests that run the extension's kernels."""
    reason = extension.why_not_usable()
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[[str, object], None]:
    """Add a number to the test's entry in the record that check.py writes."""
    return lambda name, value: request.node.user_properties.append((name, value))

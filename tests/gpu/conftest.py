"""Tests that need a GPU skip with the reason where none can be used."""

from __future__ import annotations

import pytest

from cogview_kernels import extension


@pytest.fixture(scope="session")
def cuda() -> None:
    """For tests that run the extension's kernels."""
    reason = extension.why_not_usable()
    if reason is not None:
        pytest.skip(reason)

"""What the documentation says is so."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_example_of_the_readme_runs() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names: dict[str, object] = {}
    exec(example, names)
    assert names["out"].shape == names["q"].shape  # type: ignore[attr-defined]
    assert names["k"].grad.abs().sum() > 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("https://"):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_figures_have_a_record(page: Path) -> None:
    """Every table of measurements names a record that is committed and holds its commit."""
    text = page.read_text()
    for block in re.findall(r"<!-- (?:measured|demo): begin -->\n(.*?)<!--", text, re.DOTALL):
        records = re.findall(r"record: `([^`]+)`", block)
        assert records, f"{page.name}: a table without a record"
        for record in records:
            content = json.loads((ROOT / record).read_text())
            commit = content.get("commit") or content["commit_info"]["id"]
            assert commit[:7] in block

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


def blocks_of(text: str) -> dict[str, str]:
    """What stands between a page's marks, by their name."""
    pairs = re.findall(r"<!-- ([\w ]+): begin -->\n(.*?)<!-- \1: end -->", text, re.DOTALL)
    return dict(pairs)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_figures_have_a_record(page: Path) -> None:
    """Every block of measurements names records that are committed, and their commits."""
    for name, block in blocks_of(page.read_text()).items():
        records = re.findall(r"record: `([^`]+)`", block)
        if "|" in block and name in ("measured", "demo", "quality", "instability"):
            assert records, f"{page.name}, {name}: a table without a record"
        for record in records:
            content = json.loads((ROOT / record).read_text())
            commit = content.get("commit") or content.get("commit_info", {}).get("id", "")
            assert commit[:7] in block


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs" / "benchmarks.md"], ids=str)
def test_no_figure_stands_outside_of_the_blocks(page: Path) -> None:
    text = page.read_text()
    for block in blocks_of(text).values():
        text = text.replace(block, "")
    unit = r"\d ?(?:ns|us|µs|ms|[GT]B/s|[GT]FLOP/s|tokens/s|x faster|times faster)\b"
    assert re.findall(rf".*{unit}.*", text) == []

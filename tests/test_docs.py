"""The documentation is true: examples run, links resolve, figures have records."""

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
def test_links_and_pictures_exist(page: Path) -> None:
    text = page.read_text()
    for target in [*re.findall(r"\]\(([^)#]+)\)", text), *re.findall(r'src="([^"]+)"', text)]:
        if not target.startswith("https://"):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def blocks_of(text: str) -> dict[str, str]:
    """The generated blocks of a page, by name."""
    pairs = re.findall(r"<!-- ([\w ]+): begin -->\n(.*?)<!-- \1: end -->", text, re.DOTALL)
    return dict(pairs)


RECORDED = {"measured", "demo", "quality", "instability", "quantizers", "photographs", "emoji"}
RECORDED |= {"loading", "memory"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_figures_have_a_record(page: Path) -> None:
    """Every block of measurements names committed records, and the commits they measured."""
    for name, block in blocks_of(page.read_text()).items():
        records = re.findall(r"record: `([^`]+)`", block)
        if "|" in block and name in RECORDED:
            assert records, f"{page.name}, {name}: a table without a record"
        for record in records:
            content = json.loads((ROOT / record).read_text())
            assert (content.get("commit") or content["commit_info"]["id"])[:7] in block


FIGURE = re.compile(
    r"\d[\d.,]* ?(?:"
    r"ns|us|µs|ms|s|(?:micro|milli)?seconds?|min|minutes|[GT]B/s|[GT]FLOPS?(?:/s)?|tokens/s|"
    r"[KMG]i?B|x|%|times (?:faster|slower|less|more))(?![\w/])"
)
# Figures that explain a unit and are no results.
EXPLANATIONS = (
    "50% of the floor is twice its time",
    '"2x" is twice our time',
)


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs" / "benchmarks.md"], ids=str)
def test_there_are_no_figures_outside_the_generated_blocks(page: Path) -> None:
    text = page.read_text()
    for block in blocks_of(text).values():
        text = text.replace(block, "")
    for explanation in EXPLANATIONS:
        text = text.replace(explanation, "")
    assert [line for line in text.splitlines() if FIGURE.search(line)] == []


@pytest.mark.parametrize(
    "claim",
    [
        "Attention is 2.5x dense SDPA's speed.",
        "It takes 40 % less memory.",
        "reaches 92% of the floor",
        "a step in 0.3 seconds",
        "1.2 GiB less",
        "142 microseconds",
        "390 TFLOPS",
        "12 us",
        "ours is 3 times faster",
    ],
)
def test_figures_are_recognised(claim: str) -> None:
    assert FIGURE.search(claim)


def outcomes(text: str) -> list[str]:
    """The cells of the column "outcome", which is the last of its table."""
    found, inside = [], False
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        inside = line.startswith("|") and (inside or cells[-1] == "outcome")
        if inside and cells[-1] != "outcome" and set(cells[-1]) - set("-:"):
            found.append(cells[-1])
    return found


def test_every_outcome_has_a_record_or_says_where_it_is_from() -> None:
    text = (ROOT / "docs" / "perf-notes.md").read_text()
    assert len(outcomes(text)) > 8
    for outcome in outcomes(text):
        records = re.findall(r"`(benchmarks/results/[^`]+)`", outcome)
        assert all((ROOT / record).exists() for record in records)
        assert records or outcome.startswith(("not measured", "counted", "by the model")), outcome


def test_pages_say_that_no_gpu_has_run_the_kernels_until_one_has() -> None:
    folder = ROOT / "benchmarks" / "results"
    suites = [json.loads(path.read_text()) for path in folder.glob("suite-*.json")]
    checked = any(folder.glob("gpu-check-*.json"))
    timed = any(record["machine_info"]["device_type"] == "cuda" for record in suites)
    assert ("not yet run on a GPU" in PAGES[0].read_text()) == (not checked)
    notes = (ROOT / "docs" / "perf-notes.md").read_text()
    assert ("No GPU has run any of these kernels yet" in notes) == (not checked and not timed)

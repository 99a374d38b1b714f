"""Makes the tables and plots of README.md, docs/benchmarks.md, docs/training.md and docs/scaling.md
from the newest record of each device and experiment, and from nothing else.

    python -m benchmarks.report          # write them
    python -m benchmarks.report --check  # exit status 1 and a list, if pages differ
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.experiments import emoji, loading, memory
from benchmarks.report import plots, tables
from benchmarks.report.records import OPS, Record, newest
from cogview.files import atomic_write

ROOT = Path(__file__).resolve().parents[2]
README, PAGE = "README.md", "docs/benchmarks.md"
TRAINING, SCALING = "docs/training.md", "docs/scaling.md"
PICTURES = "docs/benchmarks"
EMOJI = "docs/emoji/metrics.json"
# By module: the anchors of their parts of the page.
EXPERIMENTS = {
    "quality": "the-same-performance",
    "instability": "why-the-norm-is-a-sandwich",
    "quantizers": "how-a-codebook-is-trained",
    "photographs": "a-preset-on-real-photographs",
}
NO_GPU = "No GPU figures have been measured yet."

Pages = dict[str, str]  # whole texts, by path
Pictures = dict[str, Callable[[Path], None]]  # by path, named after their records: draws it


def report(root: Path) -> tuple[Pages, Pictures]:
    pages = {name: (root / name).read_text() for name in (README, PAGE, TRAINING, SCALING)}
    pictures: Pictures = {}

    def put(page: str, name: str, parts: list[str]) -> None:
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
        before, rest = pages[page].split(begin)
        text = "\n\n".join(filter(None, parts))
        pages[page] = f"{before}{begin}{text}\n{end}{rest.split(end)[1]}"

    def picture(record_path: str, name: str, caption: str, draw: Callable[[Path], None]) -> str:
        file = f"{Path(record_path).stem}{name}.png"
        pictures[f"{PICTURES}/{file}"] = draw
        return f"![{caption}]({Path(PICTURES).name}/{file})"

    records = newest(root, "suite")
    page = [] if any(record.on_cuda for record in records) else [NO_GPU]
    page += [] if records else ["No record yet: `make bench` makes one."]
    readme = [*page, *map(tables.readme_table, records[:1])]
    readme += [f"{tables.losses(record)} {record.source}" for record in records[1:]]
    for record in records:
        page += [f"## {record.device}", tables.conditions(record)]
        page += [tables.case_table(record, op, "fixed") for op in OPS]
        if drawn := plots.can_draw(record):
            caption = "Time of attention for each token, against the sequence length"
            draw = partial(plots.draw, record)
            page.append(picture(record.path, f"-{plots.SWEEP}", caption, draw))
            readme += [page[-1].replace("(", "(docs/")] if record is records[0] else []
        sweeps = dict.fromkeys((row.op, sweep) for row in record.rows for sweep in row.sweeps)
        for op, sweep in sweeps:
            if sweep != "fixed" and not (drawn and (op, sweep) == (plots.OP, plots.SWEEP)):
                page.append(tables.case_table(record, op, sweep))
        page.append(tables.not_measured(record))
    put(PAGE, "measured", page)
    links = []
    for name, anchor in EXPERIMENTS.items():
        module, parts = importlib.import_module(f"benchmarks.experiments.{name}"), []
        title = anchor.replace("-", " ")
        for record in newest(root, name):
            link = picture(record.path, "", title, partial(module.draw, record.content))
            parts += [module.table(record.content).strip(), link]
            parts += [getattr(module, "HOW_TO_READ", ""), record.source]
        put(PAGE, name, parts or [f"No record yet: `make {name}` makes one."])
        links += [f"[{title}]({PAGE}#{anchor})"] if parts else []
    if (root / EMOJI).is_file():
        of_emoji = Record(EMOJI, json.loads((root / EMOJI).read_text()))
        put(TRAINING, "emoji", [emoji.table(of_emoji.content), of_emoji.source])
    for where, name, table in (
        (TRAINING, "loading", loading.table),
        (SCALING, "memory", memory.table),
    ):
        parts = []
        for record in newest(root, name):
            parts += [table(record.content), record.source]
        put(where, name, parts)
    readme += [f"Experiments: {', '.join(links)}"] if links else []
    put(README, "measured", readme)
    return pages, pictures


def pictures_of(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in (root / PICTURES).glob("*.png")}


def differences(root: Path, pages: Pages, pictures: Pictures) -> list[str]:
    """Where pages and pictures are not what the records give."""
    found = [
        f"{page}: differs from the records"
        for page, text in pages.items()
        if (root / page).read_text() != text
    ]
    for path in sorted(pictures_of(root) ^ {*pictures}):
        found.append(f"{path}: {'not drawn yet' if path in pictures else 'no record gives it'}")
    return found


def write(root: Path, pages: Pages, pictures: Pictures) -> None:
    for page, text in pages.items():
        with atomic_write(root / page) as temporary:
            temporary.write_text(text)
    for path, draw in pictures.items():
        with atomic_write(root / path) as temporary:
            draw(temporary)
    for path in pictures_of(root) - {*pictures}:
        (root / path).unlink()


def main() -> None:
    made = report(ROOT)
    if "--check" in sys.argv:
        sys.exit("\n".join(differences(ROOT, *made)) or None)
    write(ROOT, *made)


if __name__ == "__main__":
    main()

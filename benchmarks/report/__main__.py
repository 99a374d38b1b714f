"""Makes the tables and plots of README.md and docs/benchmarks.md from the newest record of each
device and experiment, and from nothing else.

    python -m benchmarks.report          # write them
    python -m benchmarks.report --check  # exit status 1 and the lines, if a page differs
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from itertools import groupby
from pathlib import Path

from benchmarks.kernels import attention_costs
from benchmarks.report import plots, tables
from benchmarks.report.records import OPS, newest
from cogview.files import atomic_write

ROOT = Path(__file__).resolve().parents[2]
README, PAGE = "README.md", "docs/benchmarks.md"
PICTURES = "docs/benchmarks"
COUNTED = "docs/kernel_costs.json"
# By module: the anchors of their parts of the page.
EXPERIMENTS = {"quality": "the-same-performance", "instability": "why-the-norm-is-a-sandwich"}
NO_GPU = "No GPU has run the suite yet: there are no GPU figures."

Blocks = dict[tuple[str, str], str]  # by page and mark
Pictures = dict[str, Callable[[Path], None]]  # by path, named after their records: draws it


def report(root: Path) -> tuple[Blocks, Pictures]:
    pictures: Pictures = {}

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
        page += [tables.fixed_table(record, op) for op in OPS]
        for name, plot in plots.PLOTS.items():
            if plot.groups(record):
                drawn = partial(plots.draw, plot, record)
                page.append(picture(record.path, f"-{name}", plot.caption, drawn))
                if name == "seqlen" and record is records[0]:
                    readme.append(page[-1].replace("(", "(docs/"))
        page.append(tables.not_measured(record))
    blocks = {(PAGE, "counted"): counted(root), (PAGE, "measured"): joined(page)}
    links = []
    for name, anchor in EXPERIMENTS.items():
        module, parts = importlib.import_module(f"benchmarks.experiments.{name}"), []
        title = anchor.replace("-", " ")
        for record in newest(root, name):
            link = picture(record.path, "", title, partial(module.draw, record.content))
            parts += [module.table(record.content).strip(), link]
            parts += [getattr(module, "HOW_TO_READ", ""), record.source]
        blocks[PAGE, name] = joined(parts) or f"No record yet: `make {name}` makes one."
        links += [f"[{title}]({PAGE}#{anchor})"] if parts else []
    readme += [f"Experiments: {', '.join(links)}"] if links else []
    blocks[README, "measured"] = joined(readme)
    return blocks, pictures


def joined(parts: list[str]) -> str:
    return "\n\n".join(filter(None, parts))


def counted(root: Path) -> str:
    """What the host model counted, in short."""
    record = json.loads((root / COUNTED).read_text())
    lines, norms = [], defaultdict[str, dict[str, str]](dict)
    for case, group in groupby(record["attention"], lambda row: row["case"]):
        rows = list(group)
        for row in (rows[0], attention_costs.backward(rows)):
            products = f"{row['products'] / row['useful_products']:.2f}"
            moved = f"{attention_costs.moved(row) / row['must_touch']:.2f}"
            cells = {"attention": case, "kernels": row["kernel"]}
            cells |= {"products issued / useful": products, "bytes moved / needed": moved}
            lines.append(cells)
    for row in record["norms"]:
        norms[row["operator"]]["activations moved / needed"] = row["operator"]
        norms[row["operator"]][row["case"]] = f"{row['activations'] / row['floor']:.2f}"
    source = f"<sub>record: `{COUNTED}`</sub>"
    return joined([tables.table(lines, left=2), source, tables.table([*norms.values()]), source])


def page_texts(root: Path, blocks: Blocks) -> dict[str, str]:
    """The pages with the blocks between their marks."""
    texts = {page: (root / page).read_text() for page, _ in blocks}
    for (page, name), content in blocks.items():
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
        before, _, rest = texts[page].partition(begin)
        texts[page] = f"{before}{begin}{content}\n{end}{rest.partition(end)[2]}"
    return texts


def pictures_of(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in (root / PICTURES).glob("*.png")}


def differences(root: Path, blocks: Blocks, pictures: Pictures) -> Iterator[str]:
    """Where pages and pictures are not what the records give."""
    for page, text in page_texts(root, blocks).items():
        shown = (root / page).read_text().splitlines()
        yield from difflib.unified_diff(shown, text.splitlines(), page, "records", n=0, lineterm="")
    for path in sorted(pictures_of(root) ^ {*pictures}):
        yield f"{path}: {'not drawn yet' if path in pictures else 'no record gives it'}"


def write(root: Path, blocks: Blocks, pictures: Pictures) -> None:
    for page, text in page_texts(root, blocks).items():
        with atomic_write(root / page) as temporary:
            temporary.write_text(text)
    for path, draw in pictures.items():
        with atomic_write(root / path) as temporary:
            draw(temporary)
    for path in pictures_of(root) - {*pictures}:
        (root / path).unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="only say whether pages differ")
    check = parser.parse_args().check
    blocks, pictures = report(ROOT)
    if check:
        sys.exit("\n".join(differences(ROOT, blocks, pictures)))
    write(ROOT, blocks, pictures)
    print(blocks[README, "measured"])


if __name__ == "__main__":
    main()

"""The report shows what the records contain."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from matplotlib.figure import Figure

from benchmarks.kernels.cycles.launches import CASES
from benchmarks.report import __main__ as report
from benchmarks.report import plots, records, tables
from benchmarks.suite.entries import Entry, entries, predicted_seconds

ROOT = Path(__file__).resolve().parents[1]
Raw = dict[str, Any]

DEVICES = {"cuda": "NVIDIA H200", "cpu": "AMD EPYC"}
RATES = {"float32": 2e11, "float16": 2e14, "bfloat16": 2e14}
CEILINGS: Raw = {"matmul_flops": RATES, "copy_bytes_per_s": 3e12}
FORMULATION, FLEX = "CogView's formulation", "FlexAttention, gathered pivots, 64x64"
# Times over ours; 3 for the others.
RELATIVE = {"cogview_kernels": 1.0, FLEX: 1.3, "SDPA cuDNN": 0.5, "PyTorch PB-relax": 1.4}


def row(entry: Entry) -> Raw:
    """Ours takes twice as long as its floor; what a replay of a graph, half of its time."""
    info: Raw = entry.info()
    name = entry.method.name.removesuffix(records.REPLAY)
    products = info["flops"] / RATES[info["case"]["dtype"]]
    floor = max(products, info["bytes"] / CEILINGS["copy_bytes_per_s"])
    median = 2 * floor * RELATIVE.get(name, 3.0) * (0.5 if entry.method.graph else 1)
    seconds = {"minimum": 0.9 * median, "median": median, "iqr": 0.1 * median}
    return info | {"name": entry.id, "extra_bytes": 1 << 20, "seconds": seconds}


def made_up(device_type: str) -> Raw:
    """Every entry of the suite's plan, timed."""
    rows = [row(entry) for entry in entries(device_type)]
    machine = {"device": DEVICES[device_type], "device_type": device_type, "threads": 2}
    drift = {"after_stage": "norms", "name": "x", "first_median": 1e-3}
    made: Raw = {
        "machine_info": machine | {"torch": "2.13.0"},
        "commit_info": {"id": "0123456789abcdef", "dirty": False},
        "datetime": "2026-11-25T04:00:00+00:00",
        "ceilings": CEILINGS,
        "controls": [
            {"name": "empty kernel", "median": 2.1e-6},
            {"name": "A/A: x", "median": 1e-3, "other_median": 0.98e-3},
        ],
        "drift": [drift | {"median": 0.99e-3}, drift | {"median": 1.02e-3}],
        "not_measured": [{"method": "FA3", "reason": "a | b", "failed": True}] * 2,
        "not_reached": ["a", "b", "c"],
    }
    if device_type == "cuda":
        return made | {"rows": rows}
    benchmarks = []  # as pytest-benchmark has them
    for facts in rows:
        timed = facts.pop("seconds")
        stats = {"median": timed["median"], "min": timed["minimum"], "iqr": timed["iqr"]}
        benchmarks.append({"name": facts.pop("name"), "extra_info": facts, "stats": stats})
    return made | {"benchmarks": benchmarks}


def cells(text: str, line: int) -> dict[str, str]:
    """Of a line of the first table of a text, by head."""
    shown = [row.split("|")[1:-1] for row in text.splitlines() if row.startswith("|")]
    return {h.strip(): c.strip() for h, c in zip(shown[0], shown[2 + line], strict=True)}


def test_the_pages_match_the_records() -> None:
    """Renders every number between marks in this repository again."""
    assert report.differences(ROOT, *report.report(ROOT)) == []


def test_numbers_as_text() -> None:
    texts = {0.5e-6: "0.5 us", 999.6e-6: "1,000 us", 1.2345e-3: "1.23 ms", 12345: "12,300 s"}
    assert {seconds: tables.time_text(seconds) for seconds in texts} == texts
    assert [tables.bytes_text(x) for x in (1536, 2**20, 5 * 2**30)] == ["1.5 KiB", "1 MiB", "5 GiB"]
    assert [tables.percent(x) for x in (0.095, 0.0949)] == ["10%", "9.5%"]


def test_a_line_of_a_table_worked_by_hand() -> None:
    """The best of each role counts; dense is credited with all the products that it computes."""
    record = records.Record("x", made_up("cuda"))
    attention = tables.case_table(record, "attention", "fixed")
    dense_products = 5 * 16 * 40 * 64 * 1088 * 1089  # half of the pairs, times two operations
    useful = next(r.flops for r in record.rows if r.work == "backward")
    predicted = predicted_seconds(CASES["A"], "backward")
    assert predicted is not None
    assert cells(attention, 1) == {
        "case": "A, 16x1088",
        "work": "backward",
        "keys": "56%",
        "median": tables.time_text(useful / 1e14),
        "minimum": tables.time_text(0.9 * useful / 1e14),
        "spread": "10%",
        "predicted": tables.time_text(predicted),
        "of the floor": "50%",
        "useful rate": "100 TFLOP/s",
        "GB/s": cells(attention, 1)["GB/s"],
        "best rival": f"{tables.time_text(1.3 * useful / 1e14)}, 1.30x ({FLEX})",
        "best dense †": f"{tables.time_text(0.5 * useful / 1e14)}, **0.50x** (SDPA cuDNN)",
        "its own rate": tables.rate_text(dense_products / (0.5 * useful / 1e14)),
        "fastest that computes the same": cells(attention, 1)["best rival"],
        "extra memory": "1 MiB / 1 MiB / 1 MiB",
    }
    norms = tables.case_table(record, "layer_norm", "fixed")
    replay = next(line for line in (cells(norms, i) for i in range(6)) if "," in line["work"])
    assert replay["work"] == "forward, graph replay" and replay["of the floor"] == "100%"
    assert "(F.layer_norm, graph replay)" in replay["fastest plain LayerNorm †"]
    assert "its own rate" not in cells(tables.case_table(record, "training_step", "fixed"), 0)
    on_cpu = tables.case_table(records.Record("x", made_up("cpu")), "attention", "fixed")
    assert cells(on_cpu, 1)["useful rate"] == "100 GFLOP/s" and cells(on_cpu, 1)["spread"] == "10%"


def test_the_readme_says_where_ours_loses() -> None:
    record = records.Record("x", made_up("cuda"))
    shown = tables.readme_table(record)
    assert cells(shown, 0)["dense, plain LayerNorm †"] == "**0.50x**, **0.50x**"
    assert cells(shown, 0)["fastest that computes the same"] == "1.30x, 1.30x"
    assert f"The same: {FLEX};" in shown
    lost = "**Ours loses on NVIDIA H200** where a ratio is bold: A, B, C, D, decode"
    assert tables.losses(record) == f"{lost}."

    content = made_up("cuda")
    for raw in content["rows"]:
        if raw["method"] == FORMULATION and raw["op"] == "training_step":
            raw["seconds"]["median"] /= 4
    assert tables.losses(records.Record("x", content)) == f"{lost}, training step."
    content["rows"] = [raw for raw in content["rows"] if raw["role"] == "ours"]
    assert "no method is faster than ours" in tables.losses(records.Record("x", content))
    nothing = tables.readme_table(records.Record("x", content | {"rows": []}))
    assert "|" not in nothing
    assert nothing.endswith("None of the fixed cases has been measured on NVIDIA H200.")


def test_conditions_and_what_was_not_measured() -> None:
    record = records.Record("x", made_up("cuda"))
    text = tables.conditions(record)
    assert "in float32 200 GFLOP/s;" in text and "copy 3,000 GB/s; empty kernel 2.1 us;" in text
    assert 'A/A: x 2.0% apart; ours again after "norms" -1.0% to +2.0%' in text
    lines = tables.not_measured(record).splitlines()
    assert lines[2:4] == ["| FA3 | 2 | failed: a \\| b |", "| not reached | 3 | no time was left |"]


def test_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA first; every table names its record; what was written passes the check, what is changed
    by hand or left over does not."""
    for name in report.EXPERIMENTS:
        experiment = SimpleNamespace(
            table=lambda record: f"| digits |\n| ---: |\n| {record['digits']} |",
            draw=lambda record, path: path.write_bytes(b"drawn"),
            HOW_TO_READ="As it stands.",
        )
        monkeypatch.setitem(sys.modules, f"benchmarks.experiments.{name}", experiment)
    monkeypatch.setattr(plots, "draw", lambda record, path: path.write_bytes(b"drawn"))
    for folder in (records.RESULTS, report.PICTURES):
        (tmp_path / folder).mkdir(parents=True)
    names = report.README, report.PAGE, report.TRAINING, report.SCALING
    pages = [tmp_path / name for name in names]
    readme, page, *_ = pages
    for path in pages:
        shutil.copy(ROOT / path.relative_to(tmp_path), path)

    def save(name: str, record: Raw) -> None:
        (tmp_path / records.RESULTS / f"{name}.json").write_text(json.dumps(record))
        report.write(tmp_path, *report.report(tmp_path))

    report.write(tmp_path, *report.report(tmp_path))
    assert "`make bench` makes one" in readme.read_text() and report.NO_GPU in page.read_text()
    assert "`make quality` makes one" in page.read_text()
    on_cpu = made_up("cpu")
    save("suite-a", on_cpu)
    save("suite-older", {**on_cpu, "datetime": "2026-11-24", "benchmarks": [{}]})
    assert report.NO_GPU in readme.read_text()
    save("suite-b", made_up("cuda"))
    left = tmp_path / report.PICTURES / "left.png"
    left.touch()
    save("quality-a", {**on_cpu, "digits": "72.5%"})
    assert report.differences(tmp_path, *report.report(tmp_path)) == [] and not left.exists()

    text = page.read_text()
    assert text.index("## NVIDIA H200") < text.index("## AMD EPYC")
    assert report.NO_GPU not in text + readme.read_text()
    # What no plot shows.
    assert "### Attention by head dim" in text and "### Layer norm by hidden" in text
    assert "in these cases. <sub>AMD EPYC, 2 threads" in readme.read_text()
    picture = "![the same performance](benchmarks/quality-a.png)"
    assert f"| 72.5% |\n\n{picture}\n\nAs it stands.\n\n<sub>AMD EPYC" in text
    assert f"{report.PAGE}#the-same-performance" in readme.read_text()
    assert "\n## The same performance?\n" in text
    for block in (readme.read_text(), text):
        generated = block.split("<!-- measured: begin -->")[1].split("<!-- measured: end -->")[0]
        paragraphs = [part for part in generated.split("\n\n") if not part.startswith("![")]
        for this, following in zip(paragraphs, [*paragraphs[1:], ""], strict=True):
            assert not this.startswith("|") or "record: `" in following

    readme.write_text(readme.read_text().replace("**0.50x**", "0.60x", 1))
    left.with_name("suite-b-seqlen.png").rename(left)
    found = report.differences(tmp_path, *report.report(tmp_path))
    assert found == [
        "README.md: differs from the records",
        "docs/benchmarks/left.png: no record gives it",
        "docs/benchmarks/suite-b-seqlen.png: not drawn yet",
    ]


def test_the_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines through three points or more, a gap where there is no time, every series apart."""
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    content = made_up("cuda")
    lost = {("dense", 8192), ("rival", 65536)}
    content["rows"] = [
        raw for raw in content["rows"] if (raw["role"], raw["case"].get("seqlen")) not in lost
    ]
    plots.draw(records.Record("x", content), tmp_path)
    (figure,) = figures
    title, drawn = figure.get_suptitle(), [line for axis in figure.axes for line in axis.lines]
    for fact in ("NVIDIA H200, torch", "dtype bfloat16", "num_heads 40"):
        assert fact in title
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    looks = {(line.get_color(), line.get_marker()) for line in drawn}
    assert len(looks) == len(labels) and "computes another function: SDPA cuDNN" in labels
    for axis in figure.axes:
        ours, rival, dense, floor = axis.lines  # the formulation is not among the sweeps
        assert list(ours.get_ydata()) == pytest.approx([2 * y for y in floor.get_ydata()])
        assert [math.isnan(y) for y in dense.get_ydata()] == [False] * 3 + [True] + [False] * 3
        styles = [line.get_linestyle() == "None" for line in axis.lines]
        assert styles == [False, True, False, False]  # the rival has two points
    ours = figure.axes[0].lines[0].get_ydata()
    seconds = [r["seconds"]["median"] for r in content["rows"] if r["sweeps"] == ["seqlen"]]
    assert ours[0] * 1e-6 * 16384 == pytest.approx(seconds[0])


def test_tables_need_only_the_standard_library() -> None:
    """``make gpu-bench`` prints one on machines that have torch and little else."""
    hidden = "import sys; sys.modules |= dict.fromkeys(['numpy', 'torch', 'matplotlib', 'PIL'])"
    program = f"{hidden}; import benchmarks.report.tables"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)

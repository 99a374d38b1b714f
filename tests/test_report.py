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
from test_docs import blocks_of

from benchmarks.report import __main__ as report
from benchmarks.report import plots, records, tables

ROOT = Path(__file__).resolve().parents[1]
Raw = dict[str, Any]

NORM_OPS = "layer_norm", "sandwich_residual"
FORMULATION = "CogView's formulation"
# Methods: name, role, what it computes, time over ours.
ATTENTION = [
    ("cogview_kernels", "ours", "three-region", 1.0),
    ("FlexAttention, 128x128", "rival", "three-region", 1.7),
    ("FlexAttention, 64x64", "rival", "three-region", 1.3),
    (FORMULATION, "", "three-region", 4.0),
    ("SDPA cuDNN", "dense", "dense causal", 0.5),
    ("SDPA flash", "dense", "dense causal", 1.6),
]
NORMS = [
    ("cogview_kernels", "ours", "PB-relax LayerNorm", 1.0),
    ("cogview_kernels, graph replay", "ours", "PB-relax LayerNorm", 0.5),
    ("PyTorch PB-relax", "rival", "PB-relax LayerNorm", 1.4),
    ("F.layer_norm", "", "plain LayerNorm", 1.2),
    ("F.layer_norm, graph replay", "", "plain LayerNorm", 0.4),
]
H200 = {"device": "NVIDIA H200", "device_type": "cuda", "threads": 8, "torch": "2.11.0"}
EPYC = {"device": "AMD EPYC", "device_type": "cpu", "threads": 2, "torch": "2.13.0+cpu"}


def attention(seqlen: int, times: int, pivots: int, q_len: int = 0) -> Raw:
    shape = {"seqlen": seqlen, "query_window": 128, "key_window_times": times, "q_len": q_len}
    return shape | {"num_pivots": pivots, "batch": 2, "num_heads": 4, "dtype": "float32"}


def norm(hidden: int) -> Raw:
    return {"rows": 2048, "hidden": hidden, "dtype": "float32"}


# Sweep, operation, case, seconds of our forward.
CASES = [
    ("fixed", "attention", attention(1088, 4, 192), 1e-3),
    ("fixed", "attention", attention(4224, 2, 256), 4e-3),
    ("fixed", "decode", attention(4224, 2, 256, q_len=1), 1e-5),
    ("fixed", "training_step", {"num_layers": 4, "attention": attention(1088, 4, 192)}, 0.3),
    *(("seqlen", "attention", attention(n, 2, 256), 1e-6 * n) for n in (1024, 2048, 4096, 8192)),
    *(("window", "attention", attention(4224, n, 256), 1e-3 * n) for n in (1, 2, 4, 8)),
    *(("pivots", "attention", attention(4224, 2, n), 1e-3 + 1e-6 * n) for n in (0, 2048)),
    *(("hidden", op, norm(n), 1e-3) for op in NORM_OPS for n in (512, 8192)),
    *(("fixed", op, norm(2560), 3e-3) for op in NORM_OPS),
]


def rows(sweep: str, op: str, case: Raw, seconds: float) -> list[Raw]:
    """Ours is at half of the rate of a matrix product, and at a third of that of a copy."""
    found = []
    works = {"decode": ["forward"], "training_step": ["step"]}.get(op, ["forward", "backward"])
    for work in works:
        for name, role, computes, relative in NORMS if op in NORM_OPS else ATTENTION:
            base = seconds * (2 if work == "backward" else 1)
            facts = {"op": op, "work": work, "case": case, "case_name": f"{op} {case}"}
            facts |= {"sweeps": [sweep], "method": name, "role": role, "computes": computes}
            facts |= {"flops": 1e11 * base * (op not in NORM_OPS), "bytes": 1e10 * base}
            if "num_pivots" in case:
                keys = case["key_window_times"] / 32 + case["num_pivots"] / 4096
                facts["attended_fraction"] = keys
            median = base * relative
            facts["seconds"] = {"median": median, "minimum": 0.9 * median, "iqr": 0.1 * median}
            # CogView's formulation has no time at one length: a gap.
            if (name, sweep, case.get("seqlen")) != (FORMULATION, "seqlen", 4096):
                found.append(facts | {"extra_bytes": 1 << 20, "host_seconds": None})
    return found


def made_up(machine: Raw) -> Raw:
    """A record as ``make gpu-bench`` writes it."""
    found = [row for case in CASES for row in rows(*case)]
    missing = {**found[0], "method": "FA3", "reason": "a | b", "failed": True}
    drift = {"after_stage": "norms", "name": "x", "first_median": 1e-3}
    return {
        "machine_info": machine,
        "commit_info": {"id": "0123456789abcdef", "dirty": False},
        "datetime": "2026-11-25T04:00:00+00:00",
        "ceilings": {"matmul_flops": {"float32": 2e11}, "copy_bytes_per_s": 3e10},
        "controls": [
            {"name": "empty kernel", "median": 2.1e-6},
            {"name": "A/A: x", "median": 1e-3, "other_median": 0.98e-3},
        ],
        "drift": [drift | {"median": 0.99e-3}, drift | {"median": 1.02e-3}],
        "not_measured": [missing, missing],
        "not_reached": ["a", "b", "c"],
        "rows": found,
    }


def as_pytest_benchmark(record: Raw) -> Raw:
    made = []
    for facts in record.pop("rows"):
        timed = facts.pop("seconds")
        stats = {"median": timed["median"], "min": timed["minimum"], "iqr": timed["iqr"]}
        made.append({"name": "x", "extra_info": facts, "stats": stats})
    return record | {"benchmarks": made}


def save(root: Path, name: str, record: Raw) -> None:
    (root / records.RESULTS / name).write_text(json.dumps(record))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository without records."""
    (tmp_path / records.RESULTS).mkdir(parents=True)
    (tmp_path / report.PICTURES).mkdir(parents=True)
    for page in (report.README, report.PAGE, report.COUNTED):
        shutil.copy(ROOT / page, tmp_path / page)
    return tmp_path


def test_the_pages_match_the_records() -> None:
    """Renders every number between marks in this repository again."""
    assert list(report.differences(ROOT, *report.report(ROOT))) == []


def cells(text: str, line: int) -> dict[str, str]:
    """Of a line of the first table of a text, by head."""
    shown = [row.split("|")[1:-1] for row in text.splitlines() if row.startswith("|")]
    return {h.strip(): c.strip() for h, c in zip(shown[0], shown[2 + line], strict=True)}


def test_numbers_as_text() -> None:
    texts = {0.5e-6: "0.5 us", 999.6e-6: "1,000 us", 1.2345e-3: "1.23 ms", 12345: "12,300 s"}
    assert {seconds: tables.time_text(seconds) for seconds in texts} == texts
    assert [tables.bytes_text(x) for x in (1536, 2**20, 5 * 2**30)] == ["1.5 KiB", "1 MiB", "5 GiB"]
    assert [tables.percent(x) for x in (0.095, 0.0949)] == ["10%", "9.5%"]


@pytest.mark.parametrize("convert", [dict, as_pytest_benchmark])
def test_a_line_of_a_table_worked_by_hand(convert: Any) -> None:
    """The best of each role counts; the floor is the later of products (half of our time here) and
    bytes (a third)."""
    record = records.Record("x", convert(made_up(EPYC)))
    heads, _, _, backward = tables.fixed_table(record, "attention").splitlines()[2:6]
    rival = "2.6 ms, 1.30x (FlexAttention, 64x64)"
    expected = ["A, 2x1088", "backward", "17%", "2 ms", "1.8 ms", "10%", "50%"]
    expected += ["100 GFLOP/s", "10", rival, "1 ms, **0.50x** (SDPA cuDNN)", "1.16 TFLOP/s", rival]
    expected += ["1 MiB / 1 MiB / 1 MiB"]
    assert backward == f"| {' | '.join(expected)} |"
    assert "| keys | median | minimum | spread | of the floor | useful rate | GB/s | best" in heads
    assert "| its own rate | fastest that computes the same | extra memory |" in heads
    norms = tables.fixed_table(record, "layer_norm")
    assert cells(norms, 0)["of the floor"] == "33%"  # has no products, only bytes
    assert cells(norms, 1)["work"] == "forward, graph replay"
    fastest = "1.2 ms, **0.80x** (F.layer_norm, graph replay)"
    assert cells(norms, 1)["fastest plain LayerNorm †"] == fastest
    assert "its own rate" not in cells(tables.fixed_table(record, "training_step"), 0)


def test_the_readme_says_where_ours_loses() -> None:
    record = records.Record("x", made_up(H200))
    shown = tables.readme_table(record)
    assert cells(shown, 0)["dense, plain LayerNorm †"] == "**0.50x**<br>**0.50x**"
    assert cells(shown, 0)["rival"] == "1.30x<br>1.30x" and "rival: FlexAttention, 64x64;" in shown
    lost = "A forward, A backward, B forward, B backward, decode forward"
    assert tables.losses(record) == f"**Ours loses on NVIDIA H200** to SDPA cuDNN on {lost}."
    record.content["rows"] = [row for row in record.content["rows"] if row["role"] != "dense"]
    assert "no method is faster than ours" in tables.losses(record)


def test_conditions_and_what_was_not_measured() -> None:
    record = records.Record("x", made_up(H200))
    text = tables.conditions(record)
    assert "in float32 200 GFLOP/s; copy 30 GB/s; empty kernel 2.1 us; A/A: x 2.0% apart" in text
    assert 'ours again after "norms" -1.0% to +2.0%' in text
    lines = tables.not_measured(record).splitlines()
    assert lines[2:4] == ["| FA3 | 2 | failed: a \\| b |", "| not reached | 3 | no time was left |"]


def test_a_report_of_two_devices(root: Path) -> None:
    """CUDA first; every table names its record; what was written passes the check, what is changed
    by hand or left over does not."""
    save(root, "suite-a.json", made_up(EPYC))
    save(root, "suite-a-older.json", {**made_up(EPYC), "datetime": "2026-11-24", "rows": [{}]})
    assert report.NO_GPU in report.report(root)[0][report.README, "measured"]
    save(root, "suite-b.json", made_up(H200))
    made = report.report(root)
    page, readme = (made[0][name, "measured"] for name in (report.PAGE, report.README))
    assert page.index("## NVIDIA H200") < page.index("## AMD EPYC")
    assert report.NO_GPU not in page + readme and "loses on AMD EPYC" in readme
    for text in made[0].values():
        paragraphs = [part for part in text.split("\n\n") if not part.startswith("![")]
        for this, following in zip(paragraphs, [*paragraphs[1:], ""], strict=True):
            assert not this.startswith("|") or "record: `" in following
    left = root / report.PICTURES / "left.png"
    left.touch()
    report.write(root, *made)
    assert list(report.differences(root, *report.report(root))) == [] and not left.exists()
    assert len(made[1]) == 2 * len(plots.PLOTS)
    assert len((root / report.PAGE).read_text().splitlines()) <= 250
    text = (root / report.README).read_text()
    (root / report.README).write_text(text.replace("**0.50x**", "0.60x", 1))
    left.with_name("suite-a-norms.png").rename(left)
    found = "\n".join(report.differences(root, *report.report(root)))
    assert "README.md" in found and "0.60x" in found
    assert "left.png: no record gives it" in found and "suite-a-norms.png: not drawn yet" in found


def test_no_record_at_all(root: Path) -> None:
    report.write(root, *report.report(root))
    assert "`make bench` makes one" in (root / report.README).read_text()
    assert "`make quality` makes one" in blocks_of((root / report.PAGE).read_text())["quality"]


def test_records_of_unknown_origin_or_another_suite_are_refused(root: Path) -> None:
    save(root, "suite-a.json", {**made_up(EPYC), "commit_info": {"id": "unknown"}})
    with pytest.raises(ValueError, match="^benchmarks/results/suite-a.json: commit unknown"):
        report.report(root)
    record = made_up(EPYC)
    del record["rows"][3]["role"]
    save(root, "suite-a.json", record)
    with pytest.raises(ValueError, match="^benchmarks/results/suite-a.json: .*'role'"):
        report.report(root)


def test_an_experiment(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = SimpleNamespace(
        table=lambda record: f"| digits |\n| ---: |\n| {record['digits']} |",
        draw=lambda record, path: path.write_bytes(b"drawn"),
        HOW_TO_READ="As it stands.",
    )
    monkeypatch.setitem(sys.modules, "benchmarks.experiments.quality", experiment)
    save(root, "quality-a.json", {**made_up(EPYC), "digits": "72.5%"})
    report.write(root, *report.report(root))
    page, readme = ((root / name).read_text() for name in (report.PAGE, report.README))
    picture = "![the same performance](benchmarks/quality-a.png)"
    assert f"| 72.5% |\n\n{picture}\n\nAs it stands.\n\n<sub>AMD EPYC" in page
    assert (root / report.PICTURES / "quality-a.png").read_bytes() == b"drawn"
    assert f"{report.PAGE}#the-same-performance" in readme
    assert "\n## The same performance?\n" in page


def test_plots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines through three points or more, a gap where there is no time, every series apart."""
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    record = records.Record("x", made_up(EPYC))
    for plot in plots.PLOTS.values():
        plots.draw(plot, record, tmp_path)
    seqlen, keys, norms = figures
    assert "num_heads 4" in seqlen.get_suptitle() and len(keys.axes) == len(norms.axes) == 4
    for figure in figures:
        title, drawn = figure.get_suptitle(), [line for axis in figure.axes for line in axis.lines]
        assert "AMD EPYC, 2 threads" in title and "dtype float32" in title
        looks = {(line.get_color(), line.get_marker()) for line in drawn}
        assert len(looks) == len(figure.legends[0].get_texts())
        for line in drawn:
            points = sum(map(math.isfinite, line.get_ydata()))
            assert (line.get_linestyle() == "None") == (points < plots.MIN_POINTS_OF_A_LINE)
    by_colour = {line.get_color(): line.get_ydata() for line in seqlen.axes[0].lines}
    ours, _, other, *_ = (by_colour[style["color"]] for style in plots.STYLES.values())
    assert list(ours) == pytest.approx([0.5] * 4)  # 1 us a position of two sequences
    assert [math.isnan(y) for y in other] == [False, False, True, False]
    labels = [text.get_text() for text in seqlen.legends[0].get_texts()]
    assert f"other that computes the same: {FORMULATION}" in labels


def test_tables_need_only_the_standard_library() -> None:
    """``make gpu-bench`` prints one on machines that have torch and little else."""
    hidden = "import sys; sys.modules |= dict.fromkeys(['numpy', 'torch', 'matplotlib', 'PIL'])"
    program = f"{hidden}; import benchmarks.report.tables"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)

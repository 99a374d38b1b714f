"""The report shows what the records contain."""

from __future__ import annotations

import copy
import functools
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_docs import blocks_of

from benchmarks.report import pages as report
from benchmarks.report import plots as report_plots
from benchmarks.suite import cases

ROOT = Path(__file__).resolve().parents[1]

# A peer: name, function it computes, speed relative to ours, and whether its time grows with the
# attended keys or with all keys.
ATTENTION = [
    ("cogview_kernels", "three-region", 1.0, True),
    ("portable", "three-region", 0.2, True),
    ("SDPA flash", "dense causal", 1.1, False),
    ("SDPA efficient", "dense causal", 0.7, False),
    ("SDPA cuDNN", "dense causal", 1.4, False),
    ("SDPA math", "dense causal", 0.1, False),
    ("SDPA, dense mask", "three-region", 0.5, False),
    ("FlexAttention, plain mask", "three-region", 0.9, False),
    ("FlexAttention, gathered pivots", "three-region", 0.75, True),
    ("FlexAttention, gathered pivots, autotuned", "three-region", 0.8, True),
    ("CogView's formulation", "three-region", 0.15, True),
    ("window + pivots, merged by lse", "three-region", 0.6, True),
    ("FlashAttention-4", "dense causal", 1.5, False),
    ("NATTEN", "local window", 1.3, True),
]
NORMS = [
    ("cogview_kernels", "PB-relax LayerNorm", 1.0, True),
    ("portable", "PB-relax LayerNorm", 0.2, True),
    ("cogview_kernels, relax=None", "plain LayerNorm", 1.02, True),
    ("F.layer_norm", "plain LayerNorm", 0.7, True),
    ("F.layer_norm, compiled", "plain LayerNorm", 0.8, True),
    ("PyTorch PB-relax", "PB-relax LayerNorm", 0.25, True),
    ("PyTorch PB-relax, compiled", "PB-relax LayerNorm", 0.6, True),
    ("liger-kernel", "plain LayerNorm", 0.75, True),
]
STEPS = [
    ("cogview_kernels", "three-region", 1.0, True),
    ("dense SDPA", "dense causal", 0.8, True),
    ("dense SDPA, F.layer_norm", "dense causal, plain LayerNorm", 0.7, True),
]
METHODS = {"layer_norm": NORMS, "sandwich_residual": NORMS, "training_step": STEPS}
CEILINGS = {
    "matmul_flops": {"bfloat16": 790e12, "float16": 780e12, "float32": 50e12},
    "copy_bytes_per_s": 4.3e12,
}
H200 = {
    "device": "NVIDIA H200",
    "device_type": "cuda",
    "threads": 8,
    "torch": "2.11.0",
    "versions": {"triton": "3.6.0", "cuda": "13.0", "nvcc": "13.0.48"},
    "driver": "580.1",
    "clocks": {"clocks.sm": "1980 MHz"},
    "l2_bytes": 50 << 20,
    "multiprocessors": 132,
    "python": "3.11.7",
}
EPYC = {"device": "AMD EPYC", "device_type": "cpu", "threads": 2, "torch": "2.13.0+cpu"}


def row(op: str, method: str, seconds: list[float], **info: Any) -> dict[str, Any]:
    extra_info = {"op": op, "method": method, "work": "forward", "computes": "three-region"}
    extra_info |= {"case": {"dtype": "bfloat16"}, "case_name": "a case", "sweeps": ["fixed"]}
    return {"stats": {"data": seconds}, "extra_info": extra_info | info}


@functools.cache
def made_up_rows(device_type: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of every case, with times computed from flops and bytes, and rows not measured."""
    found, missing = [], []
    for planned in cases.cases_of(device_type):
        case = planned.case
        for method, computes, speed, sparse in METHODS.get(case.op, ATTENTION):
            for work in case.works:
                if work == "forward+backward" and "fixed" not in planned.sweeps:
                    continue
                info = {
                    "op": case.op,
                    "work": work,
                    "case": cases.describe(case),
                    "case_name": case.name,
                    "sweeps": list(planned.sweeps),
                    "method": method,
                    "computes": computes,
                    "flops": case.flops(work),
                    "bytes": case.bytes(work),
                }
                if isinstance(case, cases.AttentionCase):
                    info["attended_fraction"] = case.attended_fraction
                if isinstance(case, cases.StepCase):
                    info["tokens"] = case.tokens
                if method == "NATTEN" or (method == "SDPA math" and "32768" in case.name):
                    reason = "NATTEN is not installed" if method == "NATTEN" else "out of memory"
                    missing.append({**info, "reason": reason})
                    continue
                floor = max(info["flops"] / 400e12, info["bytes"] / 3.6e12)
                seconds = floor / speed / (1 if sparse else info["attended_fraction"]) + 4e-6
                data = [seconds * (1 + 0.03 * (i % 7) / 7) for i in range(15)]
                info |= {
                    "errors": {"out": 2e-3, "dq": 3e-3},
                    "errors_allowed": {"out": 3e-2, "dq": 6e-2},
                    "extra_bytes": int(info["bytes"] * (1 + len(method) / 20)),
                    "prepare_seconds": 3e-3 if "Flex" in method else None,
                    "first_call_seconds": 21.0 if "Flex" in method else 0.01,
                    "host_seconds": 2e-5,
                }
                found.append({"stats": {"data": data}, "extra_info": info})
    return found, missing


def made_up(machine: dict[str, Any]) -> dict[str, Any]:
    """A record in the suite's format."""
    found, missing = made_up_rows(machine["device_type"])
    return copy.deepcopy(
        {
            "machine_info": machine,
            "commit_info": {"id": "0123456789abcdef", "dirty": False},
            "datetime": "2026-11-25T04:00:00+00:00",
            "ceilings": CEILINGS,
            "benchmarks": found,
            "not_measured": missing,
        }
    )


def save(root: Path, name: str, record: dict[str, Any]) -> None:
    (root / report.RESULTS / name).write_text(json.dumps(record))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository without records; its pages are empty between the marks."""
    (tmp_path / report.RESULTS).mkdir(parents=True)
    for page in (report.README, report.PAGE):
        text = (ROOT / page).read_text()
        for name in blocks_of(text):
            if (page, name) != (report.README, "demo"):
                text = report.inserted(text, name, "")
        (tmp_path / page).parent.mkdir(exist_ok=True)
        (tmp_path / page).write_text(text)
    shutil.copy(ROOT / report.COUNTED, tmp_path / report.COUNTED)
    return tmp_path


# The pages.


def test_the_pages_match_the_records() -> None:
    """Renders every number between marks in this repository again."""
    assert list(report.differences(ROOT, report.report(ROOT))) == []


# The arithmetic, worked by hand.

ROW = row("attention", "a", [3e-3, 1e-3, 2e-3], flops=4e11, bytes=2e9, tokens=1000)
HAND = {"matmul_flops": {"bfloat16": 4e14}, "copy_bytes_per_s": 1e12}


def test_rates() -> None:
    assert report.median(ROW) == 2e-3
    assert report.tflops(ROW) == pytest.approx(200)
    assert report.gigabytes_per_second(ROW) == pytest.approx(1000)
    assert report.tokens_per_second(ROW) == pytest.approx(500_000)
    assert report.tflops(row("layer_norm", "a", [1.0], flops=0)) is None


def test_floor() -> None:
    # 4e11 flop at 4e14 per second take 1 ms; 2e9 bytes at 1e12 per second take 2 ms
    assert report.floor_parts(ROW, HAND) == pytest.approx({"arithmetic": 1e-3, "memory": 2e-3})
    assert report.floor_seconds(ROW, HAND) == pytest.approx(2e-3)
    assert report.fraction_of_floor(ROW, HAND) == pytest.approx(1)
    fast = {**HAND, "copy_bytes_per_s": 4e12}
    assert report.floor_seconds(ROW, fast) == pytest.approx(1e-3)
    assert report.fraction_of_floor(ROW, fast) == pytest.approx(0.5)


def test_no_floor_without_its_ceiling_or_its_counts() -> None:
    other = row("attention", "a", [1.0], flops=1, bytes=1, case={"dtype": "float16"})
    assert report.floor_seconds(other, HAND) is None
    assert report.fraction_of_floor(row("attention", "a", [1.0]), HAND) is None
    # A norm counts bytes only and needs no matrix-product rate.
    norm = row("layer_norm", "a", [1.0], flops=0, bytes=1e12, case={"dtype": "float16"})
    assert report.floor_seconds(norm, HAND) == pytest.approx(1)


def test_ratio_and_spread() -> None:
    assert report.ratio(row("attention", "b", [5e-3]), ROW) == pytest.approx(2.5)
    assert report.ratio(ROW, None) is None
    eleven = row("attention", "a", [float(i) for i in range(11)])
    assert report.spread(eleven) == (1, 9)
    assert report.spread(row("attention", "a", [4.0])) == (4, 4)


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0.5e-6, "0.500 us"),
        (12.34e-6, "12.3 us"),
        (999.6e-6, "1,000 us"),
        (1.234e-3, "1.23 ms"),
        (0.1, "100 ms"),
        (83.0, "83.0 s"),
        (12345.0, "12,345 s"),
    ],
)
def test_times_have_three_digits(seconds: float, text: str) -> None:
    assert report.time_text(seconds) == text


def test_numbers_as_text() -> None:
    texts = [report.bytes_text(2**20), report.bytes_text(1536), report.bytes_text(5 * 2**30)]
    assert texts == ["1.00 MiB", "1.50 KiB", "5.00 GiB"]
    assert [report.percent(x) for x in (0.5, 0.095, 0.0949, 1.0)] == ["50%", "10%", "9.5%", "100%"]
    assert [report.times(x) for x in (0.5, 1, 9.994, 12.3)] == ["0.50x", "1.00x", "9.99x", "12x"]


# Tables.


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]


def test_empty_columns_are_left_out() -> None:
    table = report.table(("a", "b", "c"), [("x", "", "1"), ("", "", "2")])
    assert cells(table) == [["a", "c"], ["---", "---:"], ["x", "1"], ["", "2"]]


def one_case_record(*rows: dict[str, Any]) -> report.Record:
    content = {**made_up(EPYC), "benchmarks": list(rows), "not_measured": [], "ceilings": HAND}
    return report.Record("benchmarks/results/suite-x.json", content, "")


def test_rows_are_ours_then_same_function_then_other_functions() -> None:
    given = [
        row("attention", "dense", [1e-3], computes="dense causal"),
        row("attention", "slow peer", [9e-3]),
        row("attention", "peer", [2e-3]),
        row(
            "attention", report.OURS, [4e-3], flops=4e11, bytes=2e9, errors={"out": 0.1, "dq": 0.2}
        ),
    ]
    record = one_case_record(*given)
    ((case, work, group),) = report.groups(record, "attention")
    assert (case, work) == ("a case", "forward")
    head, _, *lines = cells(report.group_table(group, record))
    columns = dict(zip(head, zip(*lines, strict=True), strict=True))
    assert columns["method"] == (f"**{report.OURS}**", "peer", "slow peer", "dense †")
    assert columns["time / ours"] == ("1.00x", "0.50x", "2.25x", "0.25x")
    assert columns["GFLOP/s"] == ("100,000", "", "", "")
    assert columns["of the floor"] == ("50%", "", "", "")
    assert columns["error"] == ("2.0e-01", "", "", "")


def test_without_our_row_there_is_no_ratio_and_no_mark() -> None:
    record = one_case_record(row("attention", "dense", [1e-3], computes="dense causal"))
    ((_, _, group),) = report.groups(record, "attention")
    table = report.group_table(group, record)
    assert "time / ours" not in table and "†" not in table


def test_a_sweep_lists_what_varies_besides_its_variable() -> None:
    both = [
        row(
            "attention",
            method,
            [seconds * batch],
            case={
                "op": "attention",
                "dtype": "bfloat16",
                "seqlen": 1 << 20 - batch,
                "batch": batch,
                "num_heads": 4,
            },
            sweeps=["seqlen"],
            case_name=str(batch),
            attended_fraction=0.5,
        )
        for batch in (2, 1)
        for method, seconds in ((report.OURS, 1.0), ("peer", 3.0))
    ]
    record = one_case_record(*both[:-1])  # the peer's last one is missing
    (by,) = report.sweep_groups(record, "attention", "seqlen").values()
    assert cells(report.sweep_table(by, "seqlen", record)) == [
        ["sequence length (tokens)", "262144", "524288"],
        ["---", "---:", "---:"],
        ["batch", "2", "1"],
        ["keys attended", "50%", "50%"],
        [f"**{report.OURS}**", "2.00 s", "1.00 s"],
        ["peer", "6.00 s, 3.00x", ""],
    ]
    assert report.common(by.values()) == "dtype bfloat16, num_heads 4"


def test_a_sweep_shows_our_distance_from_the_floor() -> None:
    both = [
        row(
            "attention",
            report.OURS,
            [4e-3],
            flops=4e11,
            bytes=2e9,
            extra_bytes=1 << 20,
            case={"op": "attention", "dtype": "bfloat16", "seqlen": seqlen},
            case_name=str(seqlen),
            sweeps=["seqlen"],
        )
        for seqlen in (1, 2)
    ]
    record = one_case_record(*both)
    (by,) = report.sweep_groups(record, "attention", "seqlen").values()
    lines = {line[0]: line[1:] for line in cells(report.sweep_table(by, "seqlen", record))}
    assert lines[f"{report.OURS}: of the floor"] == ["50%"] * 2
    assert lines[f"{report.OURS}: GFLOP/s"] == ["100,000"] * 2
    assert lines[f"{report.OURS}: GB/s"] == ["500"] * 2
    assert lines[f"{report.OURS}: extra memory"] == ["1.00 MiB"] * 2


def test_an_overview_names_the_fastest_others() -> None:
    names = (report.OURS, f"{report.OURS}, compiled", "slow peer", "peer", "SDPA flash")
    group = [
        row("attention", name, [x], computes="dense causal" if name[:4] == "SDPA" else "same")
        for x, name in zip((4.0, 1.0, 9.0, 8.0, 2.0), names, strict=True)
    ]
    record = one_case_record(*group)
    _, _, line = cells(report.overview(list(report.groups(record, "attention")), record))
    assert line == [
        "a case",
        "forward",
        "4.00 s",
        "8.00 s, 2.00x (peer)",
        "2.00 s, 0.50x (SDPA flash)",
    ]


def test_entries_not_reached_are_counted() -> None:
    record = one_case_record(row("attention", report.OURS, [1.0]))
    assert "Not reached" not in report.device_part(record)
    record.content["not_reached"] = ["a", "b"]
    assert "Not reached in the time that there was: 2 rows." in report.device_part(record)


def test_a_line_has_a_gap_where_a_method_has_no_time() -> None:
    by = {
        x: [row("attention", name, [float(x)]) for name in (report.OURS, "peer")[: 1 + (x != 2)]]
        for x in (1, 2, 3)
    }
    found = report.curves(by, report.median, str, floor=lambda row: 0.5)
    assert found[report.OURS] == [(1, 1.0), (2, 2.0), (3, 3.0)]
    (_, one), (_, gap), (_, three) = found["peer"]
    assert (one, three) == (1.0, 3.0) and math.isnan(gap)
    assert found[report.FLOOR] == [(1, 0.5), (2, 0.5), (3, 0.5)]


def test_clocks_under_load_are_separate_from_idle_clocks() -> None:
    record = one_case_record(row("attention", report.OURS, [1.0]))
    record.content["machine_info"] = {**H200, "clocks": {"clocks.sm": "345 MHz"}}
    record.content["ceilings"] = {**HAND, "clocks": {"clocks.sm": "1980 MHz"}}
    lines = cells(report.machine_table(record))
    assert ["clocks.sm, at rest", "345 MHz"] in lines
    assert ["clocks.sm, under load", "1980 MHz"] in lines


def test_the_best_peer_is_not_ours() -> None:
    names = (report.OURS, f"{report.OURS}, compiled", "portable", "slow peer", "peer", "dense")
    group = [
        row("attention", name, [float(i)], computes="dense causal" if name == "dense" else "same")
        for i, name in zip((5, 1, 2, 9, 8, 3), names, strict=True)
    ]
    best = report.best_same(group, one_case_record(*group))
    assert best is not None and report.info(best)["method"] == "peer"


def test_the_methods_the_readme_compares_with_are_in_the_suite() -> None:
    from benchmarks.suite import entries as suite

    methods = [
        row("attention", method.name, [1.0], computes=method.computes)
        for method in suite.METHODS["attention"]
    ]
    for name, rival in report.RIVALS.items():
        assert rival(methods) is not None, name
    best = report.best_dense(
        [
            row("attention", "SDPA flash", [2.0], computes="dense causal"),
            row("attention", "SDPA cuDNN", [1.0], computes="dense causal"),
            row("attention", "SDPA, dense mask", [0.5]),
        ]
    )
    assert best is not None and report.info(best)["method"] == "SDPA cuDNN"


# Complete reports.


def test_several_devices(root: Path) -> None:
    """CUDA comes first; every table names its record, commit, device and date."""
    save(root, "suite-a.json", made_up(EPYC))
    save(root, "suite-b.json", made_up(H200))
    save(root, "attention-old.json", {"of": "another format"})
    made = report.report(root)
    text = made.blocks[report.PAGE, "measured"]
    assert text.index("## NVIDIA H200") < text.index("## AMD EPYC")
    assert report.NO_GPU not in text + made.blocks[report.README, "measured"]
    for page in (report.PAGE, report.README):
        paragraphs = made.blocks[page, "measured"].split("\n\n")
        for this, following in zip(paragraphs, [*paragraphs[1:], ""], strict=True):
            if this.startswith("|"):
                assert "record: `benchmarks/results/suite-" in following
                assert "commit 0123456, 2026-11-25" in following
    assert {Path(path).name for path in made.pictures} == {
        f"{device}-{plot}.png"
        for device in ("nvidia-h200", "amd-epyc")
        for plot in ("seqlen", "decode", "memory", "regions", "norms", "roofline")
    }
    # Every row of the record appears, in full or in a sweep, and so does every row not measured.
    for method, *_ in (*ATTENTION, *NORMS, *STEPS):
        assert method in text
    assert "Not measured here" in text and "out of memory" in text


def test_one_device_without_a_gpu(root: Path) -> None:
    save(root, "suite-a.json", made_up(EPYC))
    made = report.report(root)
    assert report.NO_GPU in made.blocks[report.README, "measured"]
    assert report.NO_GPU in made.blocks[report.PAGE, "measured"]
    assert len(made.blocks[report.README, "measured"].splitlines()) <= 30


def test_the_newest_record_of_a_device_counts(root: Path) -> None:
    later = {**made_up(EPYC), "datetime": "2026-12-01T00:00:00+00:00"}
    save(root, "suite-a.json", later)
    save(root, "suite-b.json", made_up(EPYC))
    (record,) = report.newest(root, "suite")
    assert record.path.endswith("suite-a.json")


def test_missing_peers_and_rows(root: Path) -> None:
    """A record with our rows only, and an empty one."""
    record = made_up(H200)
    ours = [row for row in record["benchmarks"] if report.info(row)["method"] == report.OURS]
    save(root, "suite-a.json", {**record, "benchmarks": ours})
    text = report.report(root).blocks[report.README, "measured"]
    assert report.OURS in text and "SDPA" not in text
    save(root, "suite-a.json", {**record, "benchmarks": [], "not_measured": []})
    made = report.report(root)
    assert "None of the fixed cases" in made.blocks[report.README, "measured"]
    assert "790 TFLOP/s" in made.blocks[report.PAGE, "measured"]
    assert made.pictures == {}


def test_no_record_at_all(root: Path) -> None:
    made = report.report(root)
    report.write(root, made)
    assert "`make bench` makes one" in (root / report.README).read_text()
    assert "`make quality` makes one" in (root / report.PAGE).read_text()
    assert list(report.differences(root, made)) == []


@pytest.mark.parametrize(
    "name",
    ["commit_info.id", "ceilings.matmul_flops", "ceilings.copy_bytes_per_s", "machine_info.device"],
)
def test_a_record_without_its_origin_is_refused(root: Path, name: str) -> None:
    record = made_up(EPYC)
    part, key = name.split(".")
    del record[part][key]
    save(root, "suite-a.json", record)
    with pytest.raises(ValueError, match=rf"^benchmarks/results/suite-a.json: .*`{name}`"):
        report.report(root)


def test_an_unknown_commit_is_refused(root: Path) -> None:
    save(root, "suite-a.json", {**made_up(EPYC), "commit_info": {"id": "unknown"}})
    with pytest.raises(ValueError, match="commit_info.id"):
        report.report(root)


class Experiment:
    """Stands in for benchmarks/quality.py."""

    @staticmethod
    def table(record: dict[str, Any]) -> str:
        return f"| accuracy |\n| ---: |\n| {record['accuracy']} |"

    @staticmethod
    def draw(record: dict[str, Any], path: Path) -> None:
        from PIL import Image

        Image.new("L", (2, 2)).save(path, format="PNG")


@pytest.fixture
def with_few_rows(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Records with one plot each; one is an experiment's."""
    monkeypatch.setitem(sys.modules, "quality", Experiment)
    record = made_up(EPYC)
    few = [
        row
        for row in record["benchmarks"]
        if report.info(row)["op"] == "layer_norm" and report.info(row)["work"] == "forward"
    ]
    save(root, "suite-a.json", {**record, "benchmarks": few, "not_measured": []})
    save(root, "quality-a.json", {**record, "accuracy": "72.5%"})
    report.write(root, report.report(root))
    return root


def test_the_check_accepts_what_was_written(with_few_rows: Path) -> None:
    root = with_few_rows
    assert list(report.differences(root, report.report(root))) == []
    block = blocks_of((root / report.PAGE).read_text())["quality"]
    assert "72.5%" in block and "quality.png" in block and "record: `benchmarks/" in block
    assert (root / "docs/quality.png").exists()
    assert "docs/benchmarks.md#the-same-performance" in (root / report.README).read_text()


@pytest.mark.parametrize("wrong", ["72.6%", "72.4%"])
def test_the_check_notices_a_changed_digit(with_few_rows: Path, wrong: str) -> None:
    page = with_few_rows / report.PAGE
    page.write_text(page.read_text().replace("72.5%", wrong))
    (found,) = report.differences(with_few_rows, report.report(with_few_rows))
    assert found.startswith(f"docs/benchmarks.md, `quality`, line 3: | {wrong} |")
    assert found.endswith("| 72.5% |")


def test_the_check_notices_an_extra_line(with_few_rows: Path) -> None:
    page = with_few_rows / report.README
    begin, end = report.marks("measured")
    page.write_text(page.read_text().replace(end, f"ten times faster\n{end}"))
    (found,) = report.differences(with_few_rows, report.report(with_few_rows))
    assert "ten times faster" in found


def test_the_check_notices_plots_of_other_records(with_few_rows: Path) -> None:
    root = with_few_rows
    plots = root / report.PLOTS
    shutil.copy(plots / "amd-epyc-norms.png", plots / "amd-epyc-roofline.png")
    (found,) = report.differences(root, report.report(root))
    assert found == "docs/benchmarks/amd-epyc-roofline.png: no record gives it"
    save(root, "quality-a.json", {**made_up(EPYC), "accuracy": "72.5%", "steps": 1})
    report.write(root, report.report(root))
    assert not (plots / "amd-epyc-roofline.png").exists()
    assert list(report.differences(root, report.report(root))) == []
    Experiment.draw({}, root / "docs/quality.png")
    (found,) = report.differences(root, report.report(root))
    assert found == "docs/quality.png: not drawn from the newest record, or not by this code"


def test_the_command_names_the_page_and_line(
    with_few_rows: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "ROOT", with_few_rows)
    monkeypatch.setattr(sys, "argv", ["report.py", "--check"])
    with pytest.raises(SystemExit) as done:
        report.main()
    assert done.value.code == 0
    page = with_few_rows / report.PAGE
    page.write_text(page.read_text().replace("72.5%", "72.6%"))
    with pytest.raises(SystemExit, match=r"docs/benchmarks.md, `quality`, line 3") as done:
        report.main()


def test_plots_draw_every_method_in_its_own_style(root: Path) -> None:
    """Each panel has a line per method, in the method's colour, and labelled axes."""
    save(root, "suite-a.json", made_up(EPYC))
    (record,) = report.newest(root, "suite")
    colours: dict[str, set[str]] = {}
    for plot in report.plots(record):
        figure = plot.draw()
        drawn = figure.get_axes()
        shown = [axis for axis in drawn if axis.axison]
        assert shown and all(axis.get_xlabel() for axis in shown)
        assert shown[0].get_ylabel() and figure.legends
        for handle in figure.legends[0].legend_handles:
            colours.setdefault(handle.get_label(), set()).add(handle.get_color())
        if plot.name == "seqlen":
            methods = {method for method, *_ in ATTENTION} - {"NATTEN"}
            assert [len(axis.lines) for axis in shown] == [len(methods) + 1] * 2  # the floor
    assert "SDPA flash †" in colours and "SDPA flash" not in colours and report.OURS in colours
    assert len(colours) > 15 and all(len(found) == 1 for found in colours.values())
    styles = report_plots.styles([method for method, *_ in ATTENTION])
    assert len({tuple(map(str, style.values())) for style in styles.values()}) == len(styles)


def test_the_arithmetic_needs_only_the_standard_library() -> None:
    """gpu_bench.py's table uses it on GPU machines that have torch and little else."""
    program = (
        "import sys; sys.path.insert(0, 'benchmarks')\n"
        "for name in ('numpy', 'torch', 'matplotlib', 'PIL'): sys.modules[name] = None\n"
        "import report; print(report.time_text(1e-3))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "1.00 ms\n", done.stderr

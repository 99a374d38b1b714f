"""The cycle model: control words, the walk through machine code, the scheduler; the committed table
is that of the sources, and its calibration holds."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.kernels.counting import DOCS, between
from benchmarks.kernels.cycles import launches, machine, norms, sass, times
from benchmarks.suite import entries
from cogview_kernels import extension
from cogview_kernels.attention import operators
from cogview_kernels.norm import operators as norm_operators

SASS = """
\t\tFunction : _Z4tinyv
        /*0000*/                   S2R R0, SR_TID.X ;                      /* 0x0000000000007919 */
                                                                           /* 0x000e620000002100 */
        /*0010*/               @P0 BSSY B0, 0x60 ;                         /* 0x000000d000007945 */
                                                                           /* 0x000fe80003800000 */
        /*0020*/                   DEPBAR.LE SB0, 0x2 ;                    /* 0x000080800000791a */
                                                                           /* 0x000fec0000000000 */
        /*0030*/              @!PT LDS RZ, [RZ] ;                          /* 0x00000000fffff984 */
                                                                           /* 0x001fe20000000800 */
\t\tFunction : _Z5emptyv
        /*0000*/                   EXIT ;                                  /* 0x000000000000794d */
                                                                           /* 0x000fea0003800000 */
"""


def test_control_words() -> None:
    code = dict(sass.functions(SASS.splitlines()))
    assert list(code) == ["_Z4tinyv", "_Z5emptyv"]
    assert [(line.guard, line.opcode, line.operands) for line in code["_Z4tinyv"]] == [
        ("", "S2R", "R0, SR_TID.X"),
        ("P0", "BSSY", "B0, 0x60"),
        ("", "DEPBAR.LE", "SB0, 0x2"),
        ("!PT", "LDS", "RZ, [RZ]"),
    ]
    controls = [line.control for line in code["_Z4tinyv"]]
    assert controls[0] == sass.Control(stall=1, yields=True, write=1, read=7, wait=0)
    assert controls[1] == sass.Control(stall=4, yields=True, write=7, read=7, wait=0)
    assert controls[3] == sass.Control(stall=1, yields=True, write=7, read=7, wait=1)
    assert [line.pipe for line in code["_Z4tinyv"]] == ["other", "other", "wait_copies", "shared"]
    assert code["_Z4tinyv"][2].pending == 2
    assert code["_Z5emptyv"][0].pipe == "other"


def test_pipes() -> None:
    def pipe(opcode: str) -> str:
        return sass.Instruction("", opcode, "", sass.control(0)).pipe

    assert pipe("HMMA.16816.F32.BF16") == "tensor"
    assert pipe("IMAD.WIDE.U32") == "heavy"
    assert pipe("UIADD3") == "other"
    assert pipe("LDGSTS.E.BYPASS.128") == "copy"
    assert pipe("LDG.E.128.CONSTANT") == pipe("LD.E") == "load"
    assert pipe("LOP3.LUT") == pipe("FSEL") == pipe("F2FP.BF16.F32.PACK_AB") == "integer"
    assert pipe("HMNMX2.BF16_V2") == pipe("HADD2.F32") == pipe("HFMA2.MMA") == "integer"
    assert pipe("HFMA2.BF16_V2") == pipe("HADD2") == "float"
    assert pipe("BAR.SYNC.DEFER_BLOCKING") == pipe("BAR.ARV") == "barrier"
    assert pipe("ACQBULK") == pipe("PREEXIT") == pipe("CGAERRBAR") == "other"


def instruction(
    pipe: str,
    stall: int = 1,
    write: int = 7,
    read: int = 7,
    wait: int = 0,
    latency: int = 20,
    pending: int = 0,
) -> tuple[int, ...]:
    return sass.PIPE_NAMES.index(pipe), stall, write, read, wait, latency, pending


def end(
    program: list[tuple[int, ...]],
    warps: int = 1,
    policy: int = 0,
    occupies: int = 0,
    jumps: bool = False,
    blocks: int = 1,
    slots: int = 1,
) -> list[float]:
    """When the last instruction of each block issues, where all warps run the program."""
    events = np.arange(len(program), dtype=np.uint32) | np.uint32(occupies << 24)
    if jumps:
        events |= np.uint32(1 << 16)
    static = np.array(program, dtype=np.int32)
    times = machine.simulate(static, [[events] * warps] * blocks, slots, policy)
    return list(times[:, 1])


@pytest.mark.parametrize("policy", machine.POLICIES)
def test_schedules_by_hand(policy: int) -> None:
    def one(program: list[tuple[int, ...]], **changes: Any) -> float:
        return end(program, policy=policy, **changes)[0]

    assert one([instruction("tensor")] * 10) == 9 * 6
    assert one([instruction("integer")] * 10) == 9 * 2
    assert one([instruction("float")] * 10) == 9  # both halves
    assert one([instruction("heavy")] * 10) == 9 * 2
    assert one([instruction("heavy"), instruction("float")] * 5) == 9
    assert one([instruction("other", stall=5)] * 3) == 10
    # A queue of sixteen cycles in front of one instruction in eight cycles.
    assert one([instruction("special")] * 5) == 16
    # 29 cycles and one of the pipe from a load to what waits for it.
    load = instruction("shared", write=0, latency=29)
    assert one([load, instruction("other", wait=1)], occupies=1) == 30
    # Jumps cost eight cycles, but for the last one.
    assert one([instruction("other")] * 3, jumps=True) == 2 * 9
    # Four warps in four partitions, two in one: a partition issues one instruction a cycle.
    assert one([instruction("other")] * 4, warps=4) == 3 + 3  # warp w starts w cycles late
    assert one([instruction("other")] * 4, warps=8) == 3 + 7


def test_shared_memory_is_one_for_all_partitions() -> None:
    (last,) = end([instruction("shared")] * 50, warps=4, occupies=4)
    assert last == pytest.approx(4 * 50 * 4 - 24, abs=8)  # the queue holds 24 cycles


def test_copies_and_barriers_by_hand() -> None:
    rates = machine.Machine()
    copies = [instruction("copy"), instruction("commit")]
    wait = instruction("wait_copies")
    assert end([*copies, wait]) == [rates.copy_fill + rates.copy_latency]
    assert end([*copies, instruction("wait_copies", pending=1)]) == [2]
    # The last of two warps arrives at cycle 1 and wakes both.
    assert end([instruction("barrier"), instruction("other")], warps=2) == [1 + rates.barrier]


def simulated(
    warps: list[list[tuple[tuple[int, ...], int]]], num_sms: int = 1, **changes: float
) -> float:
    """The end of a block on each multiprocessor, whose warps run these programs of instructions and
    the upper bits of their events (walk.cpp)."""
    static = np.array([line for warp in warps for line, _ in warp], dtype=np.int32)
    bits = np.array([bits for warp in warps for _, bits in warp], dtype=np.uint32)
    events = np.arange(len(static), dtype=np.uint32) | bits
    block = np.split(events, np.cumsum([len(warp) for warp in warps])[:-1])
    rates = machine.Machine(**changes)
    return float(machine.simulate(static, [block] * num_sms, 1, 0, num_sms, rates)[:, 1].max())


def test_groups_of_warps_wait_at_barriers_of_their_own() -> None:
    rates = machine.Machine()
    slow, quick = (instruction("other", stall=stall) for stall in (100, 1))
    first, second = (number << 18 | 2 << 24 for number in (1, 2))  # for two warps each
    wait, arrive = instruction("barrier"), instruction("barrier", pending=1)
    after = (instruction("other", stall=50), 0), (instruction("other"), 0)
    # Warps 0 and 1 do not wait for warp 2, which is late: 0 and 1 would then end before 200.
    group = [(quick, 0), (wait, first), *after]
    late = [(slow, 0), (slow, 0), (arrive, second)]
    alone = simulated([group, group])
    assert alone < 100
    assert simulated([group, group, late]) == 202  # warp 2 begins two cycles late
    # A full barrier wakes nobody at another one.
    waiting = [(quick, 0), (wait, second), *after]
    assert simulated([waiting, group, group, late]) == 203 + rates.barrier + 50
    # Who only arrives goes on.
    early = [(arrive, second), (slow, 0), (slow, 0), (quick, 0)]
    waits_late = [(slow, 0), (slow, 0), (wait, second), *after]
    assert simulated([early, waits_late]) == 201 + rates.barrier + 50


@pytest.mark.parametrize("pipe", ["copy", "load", "store"])
def test_bandwidth_bounds_the_time_from_below(pipe: str) -> None:
    number, half = 200, 16 - 1 | 1 << 5  # 512 bytes, streamed
    wait = {
        "copy": [(instruction("commit"), 0), (instruction("wait_copies"), 0)],
        "load": [(instruction("other", wait=1), 0)],
        "store": [],
    }
    line = instruction(pipe, write=0) if pipe == "load" else instruction(pipe)
    streamed = [(line, half << 18)] * number + wait[pipe]

    def end_of(program: list[Any], **changes: float) -> float:
        rates = {"dram_bytes": 16.0, "dram_latency": 0.0, "l2_latency": 0.0} | changes
        return simulated([program], **rates)

    assert end_of(streamed) == pytest.approx(number * 512 / 16, rel=0.01)
    # What lies in L2 waits for L2 alone.
    in_l2 = [(line, bits & ~(1 << 23)) for line, bits in streamed]
    assert end_of(in_l2) == pytest.approx(number * 512 / 64, rel=0.05)
    # One multiprocessor gets no more than L2 gives it; two share DRAM.
    assert end_of(streamed, dram_bytes=1e6) == pytest.approx(number * 512 / 64, rel=0.05)
    both = simulated([streamed], num_sms=2, dram_bytes=16.0)
    assert both == pytest.approx(2 * number * 512 / 16, rel=0.01)
    if pipe != "store":
        assert end_of(streamed, dram_latency=5e3) == pytest.approx(end_of(streamed) + 5e3, rel=0.01)


def test_blocks_follow_each_other_in_a_slot() -> None:
    rates = machine.Machine()
    program = [instruction("other", stall=9), instruction("other")]
    assert end(program, blocks=3) == [9, 9 + rates.launch + 9, 2 * (9 + rates.launch) + 9]
    two = end(program, blocks=2, slots=2)
    assert two == [9, rates.stagger + 9]


def walk(lines: str) -> list[int]:
    """The addresses that a warp passes."""
    return [int(event & 0xFFFF) for event in walk_block(lines, 32)[0]]


def walk_block(lines: str, threads: int) -> list[machine.Events]:
    code = []
    for line in lines.strip().splitlines():
        words = line.split()
        guard = words.pop(0)[1:] if words[0].startswith("@") else ""
        operands = " ".join(words[1:])
        code.append(sass.Instruction(guard, words[0], operands, sass.control(0)))
    events, _ = machine.Walker(code).walk(b"", [], threads, 0, 1)
    return events


def test_lanes_that_diverge_meet_again() -> None:
    program = """
        S2R R0, SR_TID.X
        ISETP.GT.AND P0, PT, R0, 0xf, PT
        BSSY B0, 0x60
        @P0 BRA 0x60
        MOV R1, 0x1
        NOP
        BSYNC B0
        EXIT
    """
    # Sixteen lanes jump to the end of the region and wait for the others there.
    assert walk(program) == [0, 1, 2, 3, 4, 5, 6, 6, 7]


def test_loops_run_as_often_as_their_slowest_lane() -> None:
    program = """
        S2R R0, SR_LANEID
        LOP3.LUT R0, R0, 0x3, RZ, 0xc0, !PT
        BSSY B1, 0x60
        VIADD R0, R0, 0xffffffff
        ISETP.GE.AND P0, PT, R0, RZ, PT
        @P0 BRA 0x30
        BSYNC B1
        EXIT
    """
    passed = walk(program)
    assert passed.count(3) == 4 and passed[-1] == 7


def test_numbered_barriers() -> None:
    """Two warps of four share a barrier; number and count in one register, then apart. The first
    group loops at its barrier twice as often as the second."""
    program = """
        S2R R0, SR_TID.X
        SHF.R.U32.HI R1, RZ, 0x6, R0
        LOP3.LUT R2, R1, 0x400000, RZ, 0xfc, !PT
        MOV R3, 0x2
        ISETP.EQ.AND P0, PT, R1, RZ, PT
        @P0 MOV R3, 0x4
        BAR.SYNC.DEFER_BLOCKING R2, R2
        BAR.SYNC.DEFER_BLOCKING R1, 0x40
        VIADD R3, R3, 0xffffffff
        ISETP.NE.AND P1, PT, R3, RZ, PT
        @P1 BRA 0x60
        EXIT
    """
    events = walk_block(program, 128)
    passed = [[int(event & 0xFFFF) for event in warp] for warp in events]
    assert [warp.count(6) for warp in passed] == [4, 4, 2, 2]
    at_barriers = [event for event in events[3] if event & 0xFFFF in (6, 7)]
    assert {int(event >> 18 & 63) for event in at_barriers} == {1}
    assert {int(event >> 24) for event in at_barriers} == {2}


def test_warps_that_wait_for_nobody_stop_the_walk() -> None:
    with pytest.raises(RuntimeError, match="barriers that nobody reaches"):
        walk_block("BAR.SYNC.DEFER_BLOCKING 0x1, 0x60\nEXIT", 64)


@pytest.mark.parametrize(
    ("opcode", "operands", "expected"),
    [
        ("HMNMX2.BF16_V2", "R1, R2, !PT", 0x40003F80),  # (1, -2) and (2, 1), upper half first
        ("HMNMX2.BF16_V2", "|R1|, R2, !PT", 0x40004000),
        ("HMNMX2.BF16_V2", "R1, R2, PT", 0x3F80C000),
        ("HMNMX2.BF16_V2", "R1.H0_H0, R2.H1_H1, !PT", 0x40004000),
        ("HMNMX2.BF16_V2", "R1, R3, !PT", 0x3F80C000),  # (NaN, NaN)
        ("HMNMX2.BF16_V2.NAN", "R1, R3, !PT", 0x7FFF7FFF),
        ("HFMA2.MMA.BF16_V2", "R1, 1, 1, R2", 0x4040BF80),  # (3, -1)
        ("HMUL2.BF16_V2", "R1, R2", 0x4000C000),
        ("HMNMX2", "R4, -R4, !PT", 0x3C004000),  # (1, -2) of float16
        ("HADD2", "R4, R4", 0x4000C400),
        ("VHMNMX.BF16_V2", "R1, RZ.H0_H0, R2, !PT", 0x40003F80),
        ("VHMNMX.BF16_V2", "R1, RZ.H0_H0, -R2, !PT", 0x3F800000),
        ("VIMNMX", "R5, 0x8, PT", 0xFFFFFFFD),
        ("VIMNMX.RELU", "R5, 0x8, PT", 0),  # -3, not below zero
        ("VIMNMX.RELU", "R6, 0x8, PT", 8),
    ],
)
def test_halves_and_extremes(opcode: str, operands: str, expected: int) -> None:
    program = f"""
        MOV R1, 0x3f80c000
        MOV R2, 0x40003f80
        MOV R3, 0x7fc07fc0
        MOV R4, 0x3c00c000
        MOV R5, 0xfffffffd
        MOV R6, 0x9
        {opcode} R0, {operands}
        ISETP.NE.AND P0, PT, R0, {hex(expected)}, PT
        @P0 BRA 0xa0
        EXIT
        NOP
        EXIT
    """
    assert walk(program)[-1] == 9


def test_what_nobody_has_met_stops_the_walk() -> None:
    with pytest.raises(RuntimeError, match="FOO.BAR R1, R2"):
        walk("FOO.BAR R1, R2\nEXIT")


def run(launch: launches.Launch) -> None:
    """All blocks of a launch, on the machine code that nvcc makes of its source."""
    walker = machine.Walker(launches.machine_code(launch.kernel).code)
    for block in range(launch.blocks):
        walker.walk(
            launch.params, launch.ranges, launch.threads, block, launch.blocks, launch.grid_y
        )


def test_machine_code_computes_what_the_host_model_does() -> None:
    if (reason := extension.why_not_host_model()) or not shutil.which("nvcc"):
        pytest.skip(reason or "no nvcc")
    # In one test, as each process would compile every kernel.
    for head_dim, dtype in itertools.product((64, 128), (torch.bfloat16, torch.float16)):
        check_machine_code(dtype, head_dim)


def check_machine_code(dtype: torch.dtype, head_dim: int) -> None:
    """Forward and backward, with several tiles, windows and splits. Not bit for bit: nvcc makes one
    instruction of a product and a sum, which rounds once, and the host model rounds twice."""
    q, k, v, dout = torch.randn(4, 1, 2, 200, head_dim).to(dtype).unbind()
    text_len = torch.tensor([7], dtype=torch.int32)
    pivots = torch.arange(9, 200, 3, dtype=torch.int32)[None]
    window = 32, 2
    scale = 0.0, 0.0, float(head_dim) ** -0.5
    with extension.modelled_device(machine.NUM_SMS):
        far_keys = operators._pack_far_keys(text_len, pivots, 200)
        forward = operators._forward(q, k, v, far_keys, *window, *scale)
        backward = operators._backward(dout, None, q, k, v, *forward, far_keys, *window, *scale)

    found: list[tuple[Tensor, ...]] = []

    def calls() -> None:
        found.append((operators._pack_far_keys(text_len, pivots, 200),))
        found.append(operators._forward(q, k, v, far_keys, *window, *scale))
        found.append(operators._backward(dout, None, q, k, v, *forward, far_keys, *window, *scale))

    for launch in launches.record(calls):
        run(launch)
    for tensors, expected in zip(found, ((far_keys,), forward, backward), strict=True):
        for tensor, other in zip(tensors, expected, strict=True):
            tolerance = 4 * torch.finfo(dtype).eps
            torch.testing.assert_close(
                tensor,
                other,
                rtol=tolerance,
                atol=tolerance,
                msg=lambda text: f"D {head_dim}, {dtype}: {text}",
            )


NORM_SMS = 2  # few, so that each block works on several rounds of rows
NORMS = list(
    itertools.product(
        (torch.bfloat16, torch.float16, torch.float32),
        # Aligned or not; several rows a block, several warps and vectors a row; wider than a block.
        ((90, 264), (61, 100), (21, 2560), (4, 9000)),
    )
)


def test_machine_code_of_norms_computes_what_the_host_model_does() -> None:
    if (reason := extension.why_not_host_model()) or not shutil.which("nvcc"):
        pytest.skip(reason or "no nvcc")
    for i, (dtype, shape) in enumerate(NORMS):  # in one test, as above
        check_norms(dtype, *shape, relax=(1, 2, 0)[i % 3])


def check_norms(dtype: torch.dtype, rows: int, hidden: int, relax: int) -> None:
    """All four operators; the sandwich with dropout."""
    x, residual, dy, dz = torch.randn(4, rows, hidden).to(dtype).unbind()
    x[1] *= 1e4 if dtype is torch.float16 else 1e30  # the scale matters
    weights = list(torch.randn(4, hidden).to(dtype))
    seed, dropout, eps = torch.tensor([7]), 6554, 1e-5

    def forwards() -> list[tuple[Tensor, ...]]:
        norm = norm_operators._norm(x, *weights[:2], eps, relax)
        sandwich = norm_operators._sandwich(x, residual, True, *weights, seed, dropout, eps, relax)
        return [norm, sandwich]

    with extension.modelled_device(NORM_SMS):
        (_, statistics), (h, _, *of_sandwich) = expected = forwards()

    def backwards() -> list[tuple[Tensor, ...]]:
        norm = norm_operators._norm_backward(dy, x, weights[0], statistics, dtype)
        sandwich = norm_operators._sandwich_backward(
            dy, dz, x, h, weights[0], weights[2], *of_sandwich, seed, dropout, dtype, dtype
        )
        return [norm, sandwich]

    with extension.modelled_device(NORM_SMS):
        expected += backwards()
    found: list[tuple[Tensor, ...]] = []

    def calls() -> None:
        found.extend([*forwards(), *backwards()])

    for launch in launches.record(calls, num_sms=NORM_SMS):
        run(launch)
    for number, (tensors, others) in enumerate(zip(found, expected, strict=True)):
        for tensor, other in zip(tensors, others, strict=True):
            torch.testing.assert_close(
                tensor,
                other,
                rtol=max(4 * torch.finfo(dtype).eps, 1e-5),
                # The columns' sums nearly cancel.
                atol=max(4 * torch.finfo(dtype).eps, 1e-5) * max(1.0, float(other.abs().max())),
                msg=lambda text, n=number: f"{dtype}, {rows} x {hidden}, call {n}: {text}",
            )


def test_only_activations_come_from_dram() -> None:
    """The bytes in the events' sectors: those of rows are streamed, each once; parameters not."""
    if (reason := extension.why_not_host_model()) or not shutil.which("nvcc"):
        pytest.skip(reason or "no nvcc")
    for num_rows in (machine.NUM_SMS * 6, 1000):  # as many for all blocks, or not
        case = norms.Case("backward", num_rows, 2560)
        (main, us), (sums, _) = norms.simulated(case, norms.recorded(case))
        assert main.streams and not sums.streams
        floor_us = case.floor / machine.DRAM_TBS / 1e6
        assert us > floor_us
        # Where DRAM alone decides, its queue is that of the sampled rows.
        assert main.us(20 * case.floor) == pytest.approx(20 * floor_us, rel=0.1)
        if num_rows != 1000:
            assert main.streamed * machine.NUM_SMS == len(main.blocks) * case.floor


def test_a_kept_row_is_of_the_same_grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row is kept for the machine code; the host may launch more blocks of it than before."""
    (tmp_path / "code").write_bytes(b"code")
    monkeypatch.setattr(machine, "CACHE", tmp_path)
    monkeypatch.setattr(times, "source_of", Path)
    monkeypatch.setattr(times, "compiled", lambda source: tmp_path / "code")
    monkeypatch.setattr(times, "machine_code", str)
    measured = []

    def measure(code: str, launch: launches.Launch) -> dict[str, Any]:
        measured.append(launch.blocks)
        return {"us": 1.0, "blocks": launch.blocks}

    monkeypatch.setattr(times, "measure", measure)
    for blocks in (3, 3, 4, 4):
        launch = launches.Launch("kernel", b"", blocks, 128, 0, [], [])
        assert times.kept({"case": "A"}, launch)["blocks"] == blocks
    assert measured == [3, 4]


def test_the_digest_covers_all_kernels(tmp_path: Path) -> None:
    csrc = tmp_path / "csrc"
    shutil.copytree(launches.CSRC, csrc)
    digests = {launches.digest(csrc)}
    families = {file.relative_to(csrc).parts[0] for file in csrc.rglob("*.cu")}
    changed = [csrc / folder for folder in (*families, "instructions")]
    files = [file for folder in changed for file in folder.rglob("*.*") if file.is_file()]
    files += csrc.glob("launch.*")
    for file in files:
        file.write_bytes(file.read_bytes() + b"\n")
        digests.add(launches.digest(csrc))
    assert {file.suffix for file in files} == {".h", ".cuh", ".cu", ".cpp"}
    assert len(digests) == len(files) + 1


def test_the_table_is_that_of_the_sources() -> None:
    committed = json.loads((DOCS / "kernel_times.json").read_text())
    stale = "docs/kernel_times.json: run `make kernel-times` and commit what it writes"
    assert committed["model"]["sources"] == launches.digest(), stale
    calibration = json.loads(times.CALIBRATION.read_text())
    before = json.loads(times.NORMS_BEFORE.read_text())
    page = (DOCS / "kernel_times.md").read_text()
    for mark, table in times.tables(committed, calibration, before).items():
        assert between(page, mark).strip() == table
    calls = {tuple(row[name] for name in times.CALL) for row in committed["rows"]}
    assert calls == set(itertools.product("ABCD", times.HEAD_DIMS, times.DTYPES))
    shapes = [(row["operator"], (row["rows"], row["hidden"])) for row in committed["norms"]]
    assert shapes == list(itertools.product(norms.ACTIVATIONS, norms.SHAPES))


def test_both_editions_of_the_norms_in_one_table() -> None:
    (row, *_) = before = json.loads(times.NORMS_BEFORE.read_text())["rows"]
    now = row | {"us": 12.34, "share": 0.876, "loop_share": 0.912, "instructions": 123.4}
    (line,) = norms.tables([now], before, [])["norms"]
    assert line["us before"] == f"{row['us']:.1f}" and line["us now"] == "12.3"
    assert line["share now (loop)"] == "88% (91%)" and line["instructions now"] == 123


def test_what_stands_before_a_wait_for_the_launch_before_does_not_count() -> None:
    warp = np.array([0, 1, 5, 2, 5, 3], dtype=np.uint32)
    assert norms._behind(warp, 5).tolist() == [2, 5, 3]
    assert norms._behind(warp, 4).tolist() == warp.tolist()


def test_records_of_gpus_hold_the_prediction() -> None:
    case = launches.CASES["B"]
    rows = json.loads((DOCS / "kernel_times.json").read_text())["rows"]
    us = {row["kernel"]: row["us"] for row in rows if row["name"] == case.name}
    forward = us["far_keys"] + us["forward"]
    assert entries.predicted_seconds(case, "forward") == pytest.approx(forward / 1e6)
    both = entries.predicted_seconds(case, "forward+backward")
    assert both == pytest.approx(sum(us.values()) / 1e6)
    assert entries.predicted_seconds(dataclasses.replace(case, batch=5), "forward") is None


def test_calibration_holds() -> None:
    """Within a tenth of the published rates."""
    for row in json.loads(times.CALIBRATION.read_text())["rows"]:
        assert row["predicted"] == pytest.approx(row["published"], rel=0.1), row


def test_calibration_of_norms_holds() -> None:
    """Within an eighth of the published times, on Hopper within a tenth."""
    for row in json.loads(times.CALIBRATION.read_text())["norms"]:
        allowed = 0.1 if row["GPU"].startswith("H") else 0.125
        assert row["predicted"] == pytest.approx(row["published"], rel=allowed), row

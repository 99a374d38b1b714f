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
from benchmarks.kernels.cycles import launches, machine, sass, times
from benchmarks.suite import entries
from cogview_kernels import extension
from cogview_kernels.attention import operators

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


def test_blocks_follow_each_other_in_a_slot() -> None:
    rates = machine.Machine()
    program = [instruction("other", stall=9), instruction("other")]
    assert end(program, blocks=3) == [9, 9 + rates.launch + 9, 2 * (9 + rates.launch) + 9]
    two = end(program, blocks=2, slots=2)
    assert two == [9, rates.stagger + 9]


def walk(lines: str) -> list[int]:
    """The addresses that a warp passes."""
    code = []
    for line in lines.strip().splitlines():
        words = line.split()
        guard = words.pop(0)[1:] if words[0].startswith("@") else ""
        operands = " ".join(words[1:])
        code.append(sass.Instruction(guard, words[0], operands, sass.control(0)))
    (events,), _ = machine.Walker(code).walk(b"", [], 32, 0, 1)
    return [int(event & 0xFFFF) for event in events]


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


def test_what_nobody_has_met_stops_the_walk() -> None:
    with pytest.raises(RuntimeError, match="FOO.BAR R1, R2"):
        walk("FOO.BAR R1, R2\nEXIT")


def run(launch: launches.Launch) -> None:
    """All blocks of a launch, on the machine code that nvcc makes of its source."""
    walker = machine.Walker(launches.machine_code(launch.kernel).code)
    for block in range(launch.blocks):
        walker.walk(launch.params, launch.ranges, launch.threads, block, launch.blocks)


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


def test_the_table_is_that_of_the_sources() -> None:
    committed = json.loads((DOCS / "kernel_times.json").read_text())
    stale = "docs/kernel_times.json: run `make kernel-times` and commit what it writes"
    assert committed["model"]["sources"] == launches.digest(), stale
    calibration = json.loads(times.CALIBRATION.read_text())
    page = (DOCS / "kernel_times.md").read_text()
    for mark, table in times.tables(committed, calibration).items():
        assert between(page, mark).strip() == table
    calls = {tuple(row[name] for name in times.CALL) for row in committed["rows"]}
    assert calls == set(itertools.product("ABCD", times.HEAD_DIMS, times.DTYPES))


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

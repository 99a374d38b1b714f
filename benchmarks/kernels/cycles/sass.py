"""The machine code of compiled kernels, and the control words in it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

# Index of the pipes, as in schedule.cpp.
PIPES = (
    ("tensor", r"HMMA|IMMA"),
    ("special", r"MUFU|F2F|F2I|I2F|POPC|FLO|BREV"),
    ("float", r"FFMA|FADD|FMUL"),
    ("heavy", r"IMAD|IMUL"),
    ("shared", r"LDSM|LDS|STS|SHFL|LDL|STL|RED\w?|ATOM\w?"),
    ("copy", r"LDGSTS"),
    ("commit", r"LDGDEPBAR"),
    ("wait_copies", r"DEPBAR"),
    ("barrier", r"BAR"),
    ("load", r"LDG?"),
    ("store", r"STG?"),
    (
        "other",
        r"U[A-Z0-9]+|LDC|S2R|S2UR|R2UR|VOTE|REDUX|BRA|BSSY|BSYNC|EXIT|NOP|WARPSYNC|CALL|RET|YIELD|"
        r"BMOV|BREAK|MEMBAR|(?:CGA)?ERRBAR|CCTL|ENDCOLLECTIVE|BRX|JMP|BPT|NANOSLEEP|ACQBULK|PREEXIT",
    ),
    ("integer", r"\w+"),
)
# On two halves at once, as fast as on one float (256 results a cycle on compute capability 9.0,
# CUDA programming guide); not conversions (HADD2.F32), nor constants (HFMA2.MMA).
PACKED = re.compile(r"(HFMA2|HMUL2|HADD2)(\.BF16_V2)?|HFMA2\.MMA\.BF16_V2")
PIPE_NAMES = tuple(name for name, _ in PIPES)

BYTES = 16  # of an instruction

_FUNCTION = re.compile(r"\s*Function : (\w+)")
_INSTRUCTION = re.compile(
    r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*?)\s*;"
    r"\s*/\* 0x([0-9a-f]{16}) \*/"
)
_SECOND_WORD = re.compile(r"\s+/\* 0x([0-9a-f]{16}) \*/")


@dataclass(frozen=True)
class Control:
    """What an instruction waits for, and what waits for it. Scoreboards are 0 to 5; 7: none."""

    stall: int  # cycles until the warp may issue its next instruction
    yields: bool
    write: int  # the scoreboard that is set until the result is there
    read: int  # the one that is set until the operands have been read
    wait: int  # a bit for each scoreboard that must be clear


@dataclass(frozen=True)
class Instruction:
    guard: str  # "P0", "!UP1"; "" for none
    opcode: str
    operands: str
    control: Control

    @property
    def pipe(self) -> str:
        if PACKED.fullmatch(self.opcode):
            return "float"
        name = self.opcode.partition(".")[0]
        return next(pipe for pipe, pattern in PIPES if re.fullmatch(pattern, name))

    @property
    def pending(self) -> int:
        """Of a wait for copies: how many groups may still be in flight. Of a barrier: whether the
        warp goes on without waiting."""
        if self.opcode.startswith("BAR."):
            return int(self.opcode.startswith("BAR.ARV"))
        match = re.search(r"SB0, 0x([0-9a-f]+)", self.operands)
        return int(match.group(1), 16) if match else 0


def control(second_word: int) -> Control:
    """Of the upper 64 bits of an instruction. NVIDIA does not document them; the fields are those
    of Jia et al., "Dissecting the NVIDIA Volta GPU Architecture via Microbenchmarking", 2018."""
    bits = second_word >> 41
    return Control(bits & 15, bool(bits >> 4 & 1), bits >> 5 & 7, bits >> 8 & 7, bits >> 11 & 63)


def functions(lines: Iterable[str]) -> Iterator[tuple[str, list[Instruction]]]:
    """The mangled name and the code of each kernel in what ``cuobjdump -sass`` prints."""
    name = ""
    code: list[Instruction] = []
    pending: tuple[str, str, str] | None = None
    for line in lines:
        if match := _FUNCTION.match(line):
            if name:
                yield name, code
            name, code = match.group(1), []
        elif match := _INSTRUCTION.match(line):
            address, guard, opcode, operands, _ = match.groups()
            assert int(address, 16) == BYTES * len(code), "instructions of sixteen bytes, in order"
            pending = guard or "", opcode, operands
        elif pending and (match := _SECOND_WORD.match(line)):
            code.append(Instruction(*pending, control(int(match.group(1), 16))))
            pending = None
    if name:
        yield name, code

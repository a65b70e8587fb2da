"""What a compiled program does, read off its text: operations, parts, collectives."""

import collections
import math
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

PARTS = {
    "optimiser": {"optimizer"},
    "augmentation": {"augment"},
    "stem": {"stem"},
    "gate": {"gate"},
    "fold": {"fold"},
    "norms": {"norm"},
    "upper": {"upper"},
    "lower": {"lower"},
    "1x1": {"conv1", "conv3", "shortcut"},
    "3x3": {"conv2"},
    "head": {"head"},
}
"""The parts of a step, by the named scopes that its operations have: the first that fits counts.

An operation that XLA has fused from several belongs to the part of its last one.
"""

REST = "sums and rest"


class Operation(NamedTuple):
    """One operation of a compiled program.

    Attributes:
      scopes: the words of its name, such as {"transpose", "jvp", "conv2", "upper"}.
      bytes: of its operands and results in the main memory.
      cycles: the compiler's estimate; 0 where there is none.
    """

    scopes: set[str]
    bytes: int
    cycles: int


_SIZES = {"pred": 1, "bf16": 2, "f16": 2}
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"}


def _type_bytes(text: str) -> int:
    """The bytes of the arrays of an HLO type, such as "(f32[3,4]{1,0}, bf16[5])".

    Without those that a TPU keeps on the chip, whose layouts say S(1).
    """
    total = 0
    for dtype, dims, layout in re.findall(r"\b(pred|bf16|[fsuc]\d+)\[([\d,]*)\](\{[^}]*\})?", text):
        if "S(1)" in layout:
            continue
        size = _SIZES.get(dtype) or int(re.sub(r"\D", "", dtype)) // 8
        total += size * math.prod(int(dim) for dim in dims.split(",") if dim)
    return total


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation of a compiled program, and the name of the first to run."""
    lines: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            name = header[2]
            lines[name] = []
            entry = name if header[1] else entry
        elif name:
            lines[name].append(line)
    return lines, entry


def _calls(line: str, lines: dict[str, list[str]]) -> Iterator[tuple[str, int]]:
    """The computations that an operation runs, and how many times: the body of a loop, often."""
    count = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
    if not count and (condition := re.search(r"\bcondition=%?([\w.\-]+)", line)):
        # Of a scan, on TPUs: whether a counter from 0 is less than this.
        count = re.search(r" s32\[\]\S* constant\((\d+)\)", "\n".join(lines[condition[1]]))
    for name in re.findall(r"\b(?:body|calls|to_apply)=%?([\w.\-]+)", line):
        yield name, int(count[1]) if count else 1


def operations_of(text: str) -> Iterator[Operation]:
    """What a device does one after the other, read off the text of a compiled program."""
    lines, entry = _computations(text)
    yield from _operations(lines, entry)


def _operations(lines: dict[str, list[str]], computation: str) -> Iterator[Operation]:
    types: dict[str, str] = {}
    for line in lines[computation]:
        match = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$", line)
        if not match:
            continue
        name, result, kind, rest = match.groups()
        if kind == "custom-call":  # the scratch memory of a library is not traffic
            result = re.sub(r"\b[su]8\[\d+\]", "", result)
        types[name] = result
        if kind in ("while", "call"):
            for inner, count in _calls(line, lines):
                yield from count * list(_operations(lines, inner))
            continue
        if kind in _FREE or kind.endswith("-done"):
            continue
        operands = dict.fromkeys(re.findall(r"%([\w.\-]+)", rest.split("), ")[0]))
        read = sum(_type_bytes(types.get(operand, "")) for operand in operands)
        if kind.endswith("-start"):  # the result has the operand in it, too
            first, *others = re.findall(r"\w+\[[\d,]*\](?:\{[^}]*\})?", result)
            result = others[0] if kind == "slice-start" else first
        if "slice-start" in kind or kind == "slice" or name.startswith("wrapped_slice"):
            read = _type_bytes(result.replace("S(1)", ""))  # no more than it takes
        size = _type_bytes(result) + read
        cycles = re.search(r'"estimated_cycles":"(\d+)"', line)
        scopes = re.search(r'op_name="([^"]*)"', line)
        yield Operation(
            set(re.findall(r"\w+", scopes[1])) if scopes else set(),
            size,
            int(cycles[1]) if cycles else 0,
        )


def parts_of(operations: Iterable[Operation], clock: float) -> dict[str, dict[str, float]]:
    """Of each of the `PARTS`, its bytes and the estimate in seconds."""
    totals = {part: collections.Counter() for part in [*PARTS, REST]}
    for operation in operations:
        part = next((part for part, names in PARTS.items() if names & operation.scopes), REST)
        totals[part].update(bytes=operation.bytes, estimated_seconds=operation.cycles / clock)
    return {part: dict(total) for part, total in totals.items() if total}


def collectives_of(text: str) -> Iterator[tuple[str, int]]:
    """The kind of each collective of a program, and the bytes of its results."""
    lines, entry = _computations(text)
    times = collections.Counter({entry: 1})
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    for computation in reversed(lines):  # those that it runs come before it
        for line in lines[computation]:
            for inner, count in _calls(line, lines):
                times[inner] += count * times[computation]
            if match := re.search(rf" = (.*?) ({kinds})(?:-start)?\(", line):
                size = _type_bytes(match[1].replace("S(1)", ""))  # on the chip or not
                yield from times[computation] * [(match[2], size)]

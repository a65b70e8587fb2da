"""What a compiled program does, read off its text: operations, parts, collectives; its memory."""

import collections
import math
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax

PARTS = {
    "teacher": {"teacher"},
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
"""The parts of a step and the named scopes of their operations; the first match counts.

A fusion belongs to the part of its last operation.
"""

REST = "sums and rest"


class Operation(NamedTuple):
    """One operation of a compiled program.

    Attributes:
      scopes: the words of its name, such as {"transpose", "jvp", "conv2", "upper"}.
      bytes: of its operands and results in main memory.
      cycles: the compiler's estimate; 0 if it has none.
    """

    scopes: set[str]
    bytes: int
    cycles: int


_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"}


def _type_bytes(text: str) -> int:
    """Counts the bytes of the arrays of an HLO type, such as "(f32[3,4]{1,0}, bf16[5])".

    Arrays that a TPU keeps on the chip, whose layouts say S(1), do not count.
    """
    total = 0
    for dtype, dims, layout in re.findall(r"\b(pred|bf16|[fsuc]\d+)\[([\d,]*)\](\{[^}]*\})?", text):
        if "S(1)" not in layout:
            size = 1 if dtype == "pred" else int(re.sub(r"\D", "", dtype)) // 8
            total += size * math.prod(int(dim) for dim in dims.split(",") if dim)
    return total


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Returns the lines of each computation of a compiled program, and the name of the entry."""
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
    """Yields the computations that an operation runs, and how often: a loop repeats its body."""
    count = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
    if not count and (condition := re.search(r"\bcondition=%?([\w.\-]+)", line)):
        # On TPUs, a scan compares a counter from 0 with this.
        count = re.search(r" s32\[\]\S* constant\((\d+)\)", "\n".join(lines[condition[1]]))
    for name in re.findall(r"\b(?:body|calls|to_apply)=%?([\w.\-]+)", line):
        yield name, int(count[1]) if count else 1


def operations_of(text: str) -> Iterator[Operation]:
    """Yields the operations that a device executes in order, from a compiled program's text."""
    yield from _operations(*_computations(text))


def _operations(lines: dict[str, list[str]], computation: str) -> Iterator[Operation]:
    types: dict[str, str] = {}
    for line in lines[computation]:
        match = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$", line)
        if not match:
            continue
        name, result, kind, rest = match.groups()
        if kind == "custom-call":  # a library's scratch memory is not traffic
            result = re.sub(r"\b[su]8\[\d+\]", "", result)
        types[name] = result
        if kind in ("while", "call"):
            for inner, count in _calls(line, lines):
                yield from count * list(_operations(lines, inner))
            continue
        names = re.search(r'op_name="([^"]*)"', line)
        scopes = set(re.findall(r"\w+", names[1])) if names else set()
        if kind == "conditional":  # one of its branches, each as likely
            listed = re.search(r"branch_computations=\{([^}]*)\}", line)
            branches = re.findall(r"%?([\w.\-]+)", listed[1]) if listed else []
            branches += re.findall(r"\b(?:true|false)_computation=%?([\w.\-]+)", line)
            inside = [operation for name in branches for operation in _operations(lines, name)]
            size, cycles = (sum(o.bytes for o in inside), sum(o.cycles for o in inside))
            yield Operation(scopes, size // len(branches), cycles // len(branches))
            continue
        if kind in _FREE or kind.endswith("-done"):
            continue
        operands = dict.fromkeys(re.findall(r"%([\w.\-]+)", rest.split("), ")[0]))
        read = sum(_type_bytes(types.get(operand, "")) for operand in operands)
        if kind.endswith("-start"):  # the result contains the operand, too
            first, *others = re.findall(r"\w+\[[\d,]*\](?:\{[^}]*\})?", result)
            result = others[0] if kind == "slice-start" else first
        if "slice-start" in kind or kind == "slice" or name.startswith("wrapped_slice"):
            read = _type_bytes(result.replace("S(1)", ""))  # only the slice
        cycles = re.search(r'"estimated_cycles":"(\d+)"', line)
        yield Operation(scopes, _type_bytes(result) + read, int(cycles[1]) if cycles else 0)


def parts_of(operations: Iterable[Operation], clock: float) -> dict[str, dict[str, float]]:
    """Sums the bytes and the estimated seconds of each of the `PARTS`."""
    totals = {part: collections.Counter() for part in [*PARTS, REST]}
    for operation in operations:
        part = next((part for part, names in PARTS.items() if names & operation.scopes), REST)
        totals[part].update(bytes=operation.bytes, estimated_seconds=operation.cycles / clock)
    return {part: dict(total) for part, total in totals.items() if total}


def collectives_of(text: str) -> Iterator[tuple[str, int]]:
    """Yields the kind of each collective of a program, and the bytes of its results."""
    lines, entry = _computations(text)
    times = collections.Counter({entry: 1})
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    for computation in reversed(lines):  # callees come before their callers
        for line in lines[computation]:
            for inner, count in _calls(line, lines):
                times[inner] += count * times[computation]
            if match := re.search(rf" = (.*?) ({kinds})(?:-start)?\(", line):
                size = _type_bytes(match[1].replace("S(1)", ""))  # on the chip or not
                yield from times[computation] * [(match[2], size)]


def peak_bytes(compiled: jax.stages.Compiled) -> int:
    """Returns the bytes that a compiled program needs at once: arguments, results, temporaries."""
    memory = compiled.memory_analysis()
    needed = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return needed - memory.alias_size_in_bytes

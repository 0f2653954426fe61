"""The time of a traced step by part of the model.

The layers name their parts with ``jax.named_scope``, forward and backward. The compiled program has
the scope of every operation; the trace has the times at which the operation ran.
"""

import dataclasses
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from jax.profiler import ProfileData

PARTS = {
    "router": "gate, its losses and statistics",
    "pack": "tokens to rows, by expert",
    "exchange": "rows to the experts' devices and back",
    "experts": "the experts' matrix products",
    "unpack": "rows to tokens, weighted",
    "attention": "attention and its projections",
    "ffn": "dense and shared feed-forward layers",
    "loss": "output matrix and cross-entropy",
    "optimizer": "update of the weights",
}
"""Scopes, as the layers name them; the innermost one counts."""

ALL_REDUCE = "all-reduce"
OTHER = "other"
IDLE = "idle"
REST = {
    ALL_REDUCE: "sums over devices: gradients, losses, statistics",
    OTHER: "embedding, norms, residuals, gathered metrics, operations without a scope",
    IDLE: "no operation ran: host, dispatch, gaps",
}
"""Names for instants that belong to none of the parts."""

_COLLECTIVES = (
    "all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-permute",
    "ragged-all-to-all", "collective-broadcast",
)  # fmt: skip
_CONTROL = ("while", "conditional", "call")  # last as long as the operations inside
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"([a-z][\w\-]*)\(")
_SCOPE = re.compile(rf"(?:^|[/(:])({'|'.join(PARTS)})(?=[/):]|$)")


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operation of a compiled program. ``mixed``: it fuses work of several parts."""

    part: str
    mixed: bool = False
    communicates: bool = False
    is_control: bool = False


class Interval(NamedTuple):
    """An operation that ran, in nanoseconds."""

    start: float
    end: float
    operation: Operation


class Traced(NamedTuple):
    """A program in a trace: its operations, and the windows of its steps."""

    intervals: list[Interval]
    windows: list[tuple[float, float]]


def part_of(op_name: str) -> str:
    """The innermost part in an operation's path, ``jit(f)/jvp(experts)/dot_general``; or ""."""
    parts = _SCOPE.findall(op_name)
    return parts[-1] if parts else ""


def read_program(text: str) -> dict[str, Operation]:
    """Every operation of a compiled program (``compiled.as_text()``) by name."""
    names: dict[str, tuple[str, str, str]] = {}  # opcode, part, called computation
    inside: dict[str, Counter[str]] = {}
    computation = ""
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            computation = match[1]
            continue
        match = _INSTRUCTION.match(line)
        if not match:
            continue
        opcode = _OPCODE.search(match[2])
        op_name = re.search(r'op_name="([^"]*)"', match[2])
        called = re.search(r"(?:calls|to_apply)=%?([\w.\-]+)", match[2])
        part = part_of(op_name[1]) if op_name else ""
        names[match[1]] = (opcode[1] if opcode else "", part, called[1] if called else "")
        if op_name:  # operations that XLA adds belong to the part that they serve
            inside.setdefault(computation, Counter())[part or OTHER] += 1
    return {
        name: _operation(opcode, part, inside.get(called, Counter()))
        for name, (opcode, part, called) in names.items()
    }


def _operation(opcode: str, part: str, fused: Counter[str]) -> Operation:
    communicates = opcode.removesuffix("-start").removesuffix("-done") in _COLLECTIVES
    if communicates:
        return Operation("exchange" if part == "exchange" else ALL_REDUCE, communicates=True)
    if opcode != "fusion":
        return Operation(part or OTHER, is_control=opcode in _CONTROL)
    # A fusion is named after its last operation; without a scope, the most frequent part counts.
    scoped = [name for name, _ in fused.most_common() if name != OTHER]
    return Operation(part or (scoped or [OTHER])[0], mixed=len(fused) > 1)


def read_trace(folder: Path, program: dict[str, Operation], module: str, step: str) -> Traced:
    """The operations of ``module`` in a trace, and the windows named ``step``.

    On CPU the event of an operation ends when the operation is passed to the threads that compute
    it; an event ``end: NAME`` has the time at which they were done.
    """
    events: list[tuple[str, int, float, float]] = []
    ends: dict[tuple[str, int], float] = {}
    windows = []
    for path in sorted(folder.glob("**/*.xplane.pb")):
        for plane in ProfileData.from_file(str(path)).planes:
            for line in plane.lines:
                for event in line.events:
                    name, start, end = event.name, event.start_ns, event.end_ns
                    if name == step:
                        windows.append((start, end))
                    elif name.startswith("end: "):
                        ends[name[5:], int(dict(event.stats).get("_c", -1))] = start
                    elif event.duration_ns:
                        stats = dict(event.stats)
                        if "hlo_op" in stats and stats.get("hlo_module") == module:
                            token = int(stats.get("_p", -1))
                            events.append((str(stats["hlo_op"]), token, start, end))
    intervals = []
    for name, token, start, end in events:
        operation = program.get(name, Operation(OTHER))
        if not operation.is_control:
            intervals.append(Interval(start, max(end, ends.get((name, token), end)), operation))
    return Traced(intervals, sorted(windows))


def time_by_part(traced: Traced) -> dict[tuple[str, bool], float]:
    """Nanoseconds by (part, whether in a mixed operation); they add up to the windows' length.

    An instant in which several operations compute is divided equally among them. It counts as
    communication only if nothing computes, and as idle only if nothing runs, so that devices that
    wait for another one do not make its work look small.
    """
    spent: dict[tuple[str, bool], float] = {}
    edges = sorted(_edges(traced), key=lambda edge: edge[0])
    running: tuple[Counter[tuple[str, bool]], ...] = (Counter(), Counter())
    open_windows, before = 0, 0.0
    for time, change, what in edges:
        if open_windows and time > before:
            compute, communicate = running
            active = compute if compute.total() else communicate
            for key, count in (active or Counter({(IDLE, False): 1})).items():
                weight = count / (active.total() or 1)
                spent[key] = spent.get(key, 0.0) + weight * (time - before)
        before = time
        if what is None:
            open_windows += change
        else:
            counter = running[what.communicates]
            counter[what.part, what.mixed] += change
            if not counter[what.part, what.mixed]:
                del counter[what.part, what.mixed]
    return spent


def _edges(traced: Traced) -> list[tuple[float, int, Operation | None]]:
    """Beginnings (1) and ends (-1) of operations and, with None, of windows."""
    edges: list[tuple[float, int, Operation | None]] = []
    for start, end in traced.windows:
        edges += [(start, 1, None), (end, -1, None)]
    for start, end, operation in traced.intervals:
        edges += [(start, 1, operation), (end, -1, operation)]
    return edges

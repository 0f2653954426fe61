"""The runner's output: a live table of the trials on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from moejax.sweep import journal, status
from moejax.sweep.definition import Trial
from moejax.sweep.journal import Journal

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_SECONDS = 1.0
"""Interval between two reads of the files of running trials."""
_FIRST = (journal.RUNNING, journal.FAILED, journal.PREEMPTED, journal.PENDING, journal.DONE)
"""The order in which states are shown if the terminal is too low for all trials."""
_COLOURS = {journal.RUNNING: "cyan", journal.DONE: "green", journal.FAILED: "red"}


class Screen(Protocol):
    def say(self, line: str) -> None:
        """Print a line that stays."""
        ...

    def update(self) -> None:
        """Refresh the screen; called several times a second."""
        ...


@contextmanager
def open_screen(folder: Path, trials: Sequence[Trial], record: Journal) -> Iterator[Screen]:
    """Open a live table if standard output is a terminal; its last state stays there."""
    if not sys.stdout.isatty():
        yield _Plain()
        return
    from rich.console import Console
    from rich.live import Live

    def read() -> list[status.Line]:
        return status.lines(folder, trials, record.entries())

    console = Console()
    with Live(console=console, auto_refresh=False, transient=False) as shown:
        table = _Table(console, read, lambda table: shown.update(table, refresh=True))
        try:
            yield table
        finally:
            table.draw()


class _Plain:
    def say(self, line: str) -> None:
        print(line, flush=True)

    def update(self) -> None:
        pass


class _Table:
    def __init__(
        self,
        console: "Console",
        read: Callable[[], list[status.Line]],
        draw: Callable[["Table"], None],
    ):
        self._console, self._read, self._draw = console, read, draw
        self._drawn = 0.0

    def say(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def update(self) -> None:
        if time.monotonic() - self._drawn >= _SECONDS:
            self.draw()

    def draw(self) -> None:
        self._draw(render(self._read(), self._console.size.height))
        self._drawn = time.monotonic()


def render(lines: Sequence[status.Line], height: int) -> "Table":
    """The trials that fit into ``height`` lines, running ones first if not all do."""
    from rich.table import Table
    from rich.text import Text

    room = max(1, height - 5)  # head, rule, caption and the cursor's line
    shown, hidden = list(lines), ""
    if len(lines) > room:
        order = sorted(range(len(lines)), key=lambda i: _FIRST.index(lines[i].entry.state))
        shown = [lines[i] for i in sorted(order[:room])]
        hidden = f" ({len(lines) - room} not shown)"
    table = Table(box=None, caption=status.summary(lines) + hidden, caption_justify="left")
    for name, side in zip(status.HEAD, status.SIDES, strict=True):
        table.add_column(name, justify="left" if side == "<" else "right", no_wrap=True)
    for line in shown:
        colour = _COLOURS.get(line.entry.state, "")
        table.add_row(*(Text(cell, colour if i == 1 else "") for i, cell in enumerate(line.cells)))
    return table

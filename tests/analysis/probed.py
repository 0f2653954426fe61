"""Runs whose probe a test chooses, and readers of their pages."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from moejax.analysis.page import Block, Choice, Figure, Page, Table, Text
from moejax.analysis.run import RunData
from moejax.record import probe
from tests import probes
from tests.analysis import workdirs

STEPS = (0, 10, 30)
Step = dict[str, Any]


def walk(blocks: Sequence[Block]) -> Iterator[Block]:
    for block in blocks:
        yield block
        if isinstance(block, Choice):
            for option in block.options.values():
                yield from walk(option)


def spec(page: Page, name: str) -> dict[str, Any]:
    [found] = [b for b in walk(page.blocks) if isinstance(b, Figure) and b.name == name]
    return found.spec


def lines(page: Page, name: str) -> dict[str, Any]:
    """A chart's y values by name."""
    return {trace["name"]: trace["y"] for trace in spec(page, name)["data"]}


def panel(page: Page, name: str, number: int) -> list[dict[str, Any]]:
    """The traces of one panel of a figure, the first is 1."""
    wanted = "x" if number == 1 else f"x{number}"
    return [trace for trace in spec(page, name)["data"] if trace["xaxis"] == wanted]


def texts(page: Page) -> str:
    return "\n".join(block.text for block in walk(page.blocks) if isinstance(block, Text))


def tables(page: Page) -> list[Table]:
    return [block for block in walk(page.blocks) if isinstance(block, Table)]


def probe_of(run: RunData) -> probe.Probe:
    assert run.probe is not None
    return run.probe


def run_of(
    folder: Path,
    steps: Sequence[int] = STEPS,
    change: Callable[[Step], Step] = lambda arrays: arrays,
    labels: bool = True,
    router: bool = True,
) -> RunData:
    """A run whose probe is random, changed by a function of each step's arrays."""
    workdirs.write(folder)
    tokens = probes.tokens(labels=labels)
    probe.save_tokens(folder, tokens)
    for step in steps:
        probes.save_step(folder, step, change(probes.step(step, tokens["valid"], router)))
    return RunData.read(folder)


def tokens_of(run: RunData, step: int, layer: int) -> list[tuple[tuple[int, ...], int, int, int]]:
    """For each valid token: its experts by falling weight, its id, its target and its label."""
    tokens, arrays, found = probe_of(run).tokens, probe_of(run).at(step), []
    for n in range(probes.N):
        for position in range(probes.L):
            if tokens["valid"][n, position]:
                at = (n, position)
                weighted = zip(
                    arrays["weight"][layer][at], arrays["expert"][layer][at], strict=True
                )
                chosen = tuple(int(e) for w, e in sorted(weighted, reverse=True) if w > 0)
                kinds = (int(tokens[name][at]) for name in ("token", "target", "label"))
                found.append((chosen, *kinds))
    return found

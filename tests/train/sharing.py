"""Runs of one process that share what they compile, and the one that others are compared with."""

import contextlib
import dataclasses
import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from moejax.config import load, to_dict
from moejax.train import setup
from moejax.train.cost import budget, peak
from moejax.train.metrics import console
from moejax.train.workdir import summary
from tests.train.runs import PAGE, Ended, call, command, flags, snapshot, write_text


class Shared:
    """``setup.prepare`` for many runs in one process: equal models share what they compile.

    The rest is prepared anew each time.
    """

    OF_THE_LOOP = ("steps", "log_every", "eval_every", "checkpoint_every", "init_from")

    def __init__(self) -> None:
        self._prepare, self._budget = setup.prepare, budget.count_budget
        self._compiled: dict[str, dict[str, Any]] = {}
        self._budgets: dict[str, budget.Budget] = {}
        self._around: Callable[[Any], Any] = lambda update: update

    def prepare(self, config: Any, workdir: str | Path | None = None) -> setup.Run:
        run, key = self._prepare(config, workdir), self._key(config)
        if key not in self._compiled:
            shardings = jax.tree.map(lambda x: x.sharding, run.abstract_state)
            self._compiled[key] = {
                "abstract_state": run.abstract_state,
                "init_state": jax.jit(run.fresh_state, out_shardings=shardings),
                "train_step": run.train_step,
                "eval_step": run.eval_step,
            }
        vars(run).update(self._compiled[key])
        vars(run)["train_step"] = self._around(run.train_step)
        return run

    def budget(self, run: setup.Run) -> budget.Budget:
        key = self._key(run.config)
        if key not in self._budgets:
            self._budgets[key] = self._budget(run)
        return self._budgets[key]

    def _key(self, config: Any) -> str:
        tree = to_dict(config)
        del tree["data"]  # all of them bytes
        for name in self.OF_THE_LOOP:
            del tree["train"][name]
        return json.dumps(tree)

    @contextlib.contextmanager
    def updating(self, around: Callable[[Any], Any]) -> Iterator[None]:
        """Runs take ``around(train_step)`` for their ``train_step``."""
        before, self._around = self._around, around
        try:
            yield
        finally:
            self._around = before

    def steps(
        self,
        before: Callable[[int], None] = lambda step: None,
        after: Callable[[int, Any], Any] = lambda step, state: state,
    ) -> contextlib.AbstractContextManager[None]:
        """Calls ``before`` and ``after`` around update ``step`` (1 is the first) of the runs."""

        def around(update: Any) -> Any:
            def step(state: Any, batch: Any) -> Any:
                number = int(state.step) + 1
                before(number)
                state, metrics = update(state, batch)
                return after(number, state), metrics

            return step

        return self.updating(around)


SHARED = Shared()


@contextlib.contextmanager
def sharing() -> Iterator[Shared]:
    """Runs share what they compile, draw no picture and do not measure the machine's speed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "prepare", SHARED.prepare)
        patch.setattr(budget, "count_budget", SHARED.budget)
        patch.setattr(console, "write_summary_png", lambda workdir: None)
        patch.setattr(peak, "peak_flops", lambda devices, dtype: 1e12)
        yield SHARED


def prepared(text: Path, **changes: Any) -> setup.Run:
    """The tiny run, ready to step by hand."""
    return setup.prepare(load(PAGE, flags(text, **changes)).config)


class Compilations(logging.Handler):
    """Names of what jax compiles, with the update before which it did (``at`` tells)."""

    def __init__(self) -> None:
        super().__init__()
        self.step, self.found = 0, list[tuple[int, str]]()

    def emit(self, record: logging.LogRecord) -> None:
        match = re.match(r"Finished XLA compilation of (?:jit\()?(\w+)", record.getMessage())
        if match:
            self.found.append((self.step, match[1]))

    def at(self, step: int) -> None:
        self.step = step

    def __enter__(self) -> "Compilations":
        self._quiet = jax.log_compiles(True)
        self._quiet.__enter__()
        logging.getLogger("jax").addHandler(self)
        return self

    def __exit__(self, *exc: Any) -> None:
        logging.getLogger("jax").removeHandler(self)
        self._quiet.__exit__(*exc)


@dataclasses.dataclass(frozen=True)
class Whole:
    """A run that was left alone, and copies of its files at several moments of its life."""

    workdir: Path
    moments: Path
    ended: Ended
    compilations: list[tuple[int, str]]
    run: setup.Run


MOMENTS: dict[int | str, list[int]] = {
    1: [], 3: [], 4: [3], 5: [3], 6: [3], 7: [3, 6], 8: [3, 6], "end": [6, 8],
}  # fmt: skip
"""Before update n, or after the last save: the checkpoints that are there."""

_made: dict[str, Any] = {}


def the_text(factory: pytest.TempPathFactory) -> Path:
    """The text of every run of this process."""
    if "text" not in _made:
        _made["text"] = write_text(factory.mktemp("corpus") / "text")
    return _made["text"]


def the_whole_run(factory: pytest.TempPathFactory) -> Whole:
    """The run that all others are compared with: the first one, which compiles everything."""
    if "whole" not in _made:
        _made["whole"] = _run_whole(factory.mktemp("whole"), the_text(factory))
    return _made["whole"]


def _run_whole(folder: Path, text: Path) -> Whole:
    workdir, moments = folder / "run", folder / "moments"

    def keep(moment: int | str) -> None:
        if moment in MOMENTS:
            snapshot(workdir, moments / str(moment))

    def before(step: int) -> None:
        compilations.at(step)
        keep(step)

    def picture(workdir: str) -> None:
        keep("end")
        summary.write_summary_png(workdir)

    with (
        sharing() as shared,
        pytest.MonkeyPatch.context() as patch,
        Compilations() as compilations,
        shared.steps(before=before),
    ):
        patch.setattr(console, "write_summary_png", picture)
        ended = call(command(workdir, text))
    assert (ended.status, ended.err) == (0, ""), ended
    with sharing():
        run = prepared(text)
    return Whole(workdir, moments, ended, compilations.found, run)

"""The pages of a report, in order, and the file made of them."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from moejax import __version__
from moejax.analysis.html import render
from moejax.analysis.page import Page
from moejax.analysis.pages import (
    coactivation,
    comparison,
    cost,
    curves,
    drops,
    generated,
    load,
    overview,
    router,
    several_runs,
    several_sweeps,
    specialisation,
    stability,
    sweep_curves,
    sweep_load,
    sweep_overview,
)
from moejax.analysis.run import RunData
from moejax.analysis.several import Several
from moejax.analysis.sweep import SweepData
from moejax.config import load as load_config
from moejax.config import validate
from moejax.config.saved import holds_run
from moejax.errors import UserError
from moejax.record.files import atomically
from moejax.sweep.folder import INDEX

PAGES: tuple[Callable[[RunData], Page], ...] = (
    overview.page,
    curves.page,
    load.page,
    drops.page,
    router.page,
    specialisation.page,
    coactivation.page,
    stability.page,
    generated.page,
    cost.page,
)

SWEEP_PAGES: tuple[Callable[[SweepData], Page], ...] = (
    sweep_overview.page,
    comparison.page,
    sweep_curves.page,
    sweep_load.page,
)


RUNS_PAGES: tuple[Callable[[Several], Page], ...] = (
    several_runs.page,
    several_runs.curves,
    several_runs.loads,
)

SWEEPS_PAGES: tuple[Callable[[Several], Page], ...] = (
    several_sweeps.page,
    several_sweeps.curves,
)


def of_sweep(sweep: SweepData) -> str:
    """The report of a sweep as HTML; single runs have their own reports."""
    done = sum(trial.finished for trial in sweep.trials)
    about = f"sweep, {done} of {len(sweep.trials)} trials finished, report of moejax {__version__}"
    return render(sweep.name, about, [page(sweep) for page in SWEEP_PAGES])


def of_run(run: RunData, more: Sequence[Page] = ()) -> str:
    """The report of one run, as HTML; ``more`` pages come last."""
    about = (
        f"step {run.last_step} of {run.field('train.steps', '?')}, report of moejax {__version__}"
    )
    return render(run.name, about, [*(page(run) for page in PAGES), *more])


def of_several(several: Several) -> str:
    """The comparison of runs, or of sweeps, as HTML."""
    kind, pages = ("runs", RUNS_PAGES) if several.runs else ("sweeps", SWEEPS_PAGES)
    about = f"{len(several.names)} {kind} compared, report of moejax {__version__}"
    return render(" and ".join(several.names), about, [page(several) for page in pages])


def read(folder: Path) -> RunData | SweepData:
    """The run or the sweep in a folder.

    Raises:
      UserError: it holds neither, or one that cannot be read at all.
    """
    if (folder / INDEX).exists():
        return SweepData.read(folder)
    if holds_run(folder):
        return RunData.read(folder)
    what = "does not exist" if not folder.exists() else "holds neither a run nor a sweep"
    raise UserError(
        f"{folder} {what}: name the --workdir of `moejax train` (it has a config.json) or of "
        f"`moejax sweep` ({INDEX})"
    )


def with_leak(run: RunData | SweepData, sequences: int) -> RunData:
    """The run with the leak of its newest checkpoint, measured on ``sequences`` held-out rows.

    Raises:
      UserError: a sweep; no checkpoint, or one that cannot be evaluated here.
      Divergence: the loss is not finite.
    """
    if isinstance(run, SweepData):
        raise UserError(
            f"--measure-leak is for a run, and {run.folder} is a sweep; name one of its trials, "
            f"such as {run.folder}/trials/{run.trials[0].name}"
        )
    loaded = load_config(str(run.workdir / "config.json"))
    validate(loaded.config)

    from moejax.train import evaluate

    return dataclasses.replace(
        run,
        leak=evaluate.evaluate(loaded.config, str(run.workdir), leak_rows=sequences),
    )


def write(data: RunData | SweepData | Several, target: Path, more: Sequence[Page] = ()) -> int:
    """Write the report atomically and return its size in bytes.

    ``more``: pages of a run that do not come from its recorded files.

    Raises:
      UserError: it cannot be written.
    """
    if isinstance(data, Several):
        text = of_several(data)
    else:
        text = of_run(data, more) if isinstance(data, RunData) else of_sweep(data)
    # A folder's name may hold bytes that are no UTF-8.
    content = text.encode("utf-8", "backslashreplace")
    try:
        with atomically(target) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        raise UserError(f"--output={target} cannot be written: {error.strerror}") from error
    return len(content)

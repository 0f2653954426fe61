"""Rows of metrics.jsonl and timings.jsonl as TensorBoard events."""

import tempfile
from contextlib import closing
from pathlib import Path

from moejax.analysis.run import RunData
from moejax.analysis.sweep import SweepData
from moejax.config.saved import METRICS, TIMINGS
from moejax.train.metrics.log import scalars
from moejax.train.metrics.mirrors import TensorBoard

SUFFIX = ".report"
"""The suffix of files written here; a new export replaces them."""


def export(data: RunData | SweepData) -> list[str]:
    """Write tensorboard/ into the workdir of the run, or of every trial; return a line for each.

    Events that a run wrote itself while it trained are left alone.

    Raises:
      UserError: tensorboardX is not installed.
    """
    if isinstance(data, RunData):
        return [_export(data)]
    return [_export(trial.run) for trial in data.trials if trial.run is not None]


def _export(run: RunData) -> str:
    folder = run.workdir / "tensorboard"
    there = sorted(folder.glob("events.out.tfevents.*"))
    own = [path for path in there if path.name.endswith(SUFFIX)]
    if len(own) < len(there):
        return f"{folder}  was written in training and is left alone"
    with tempfile.TemporaryDirectory(dir=run.workdir, prefix=".tensorboard") as place:
        events = TensorBoard(Path(place), None, asked="--tensorboard", suffix=SUFFIX)
        with closing(events):
            for row in [*run.train, *run.held_out]:
                events.add(row["step"], scalars(METRICS, row))
            for row in run.timings:
                events.add(row["step"], scalars(TIMINGS, row))
        for old in own:
            old.unlink()
        folder.mkdir(exist_ok=True)
        for new in Path(place).iterdir():
            new.replace(folder / new.name)
    return f"{folder}  opens with `tensorboard --logdir={folder}`"

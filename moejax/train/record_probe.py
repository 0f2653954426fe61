"""Recording how a checkpoint routes outside of training, for the report of a converted model.

A run in training records its probe and its held-out rows itself. A model from elsewhere has
neither; ``moejax eval --record-probe`` writes both for the checkpoint that it evaluates.
"""

import sys
from pathlib import Path
from typing import Any

from moejax.config.saved import METRICS
from moejax.errors import UserError
from moejax.record import files
from moejax.train.metrics.log import MetricsLog
from moejax.train.probe import recorder
from moejax.train.setup import Run
from moejax.train.state import TrainState
from moejax.train.workdir.contents import check_workdir
from moejax.train.workdir.lock import WorkdirLock

ALL = sys.maxsize
"""A step after all recorded ones: none of them is removed."""


def check(run: Run, workdir: str) -> None:
    """Refuses a run whose routing cannot be recorded. Writes nothing.

    Raises:
      UserError: a model without experts, no sequences to record, another config than the run's,
        or another number of sequences than it has recorded so far.
    """
    if not run.task.model.num_moe_layers:
        raise UserError("--record-probe: the model has no experts (moe.every=0); leave it out")
    if not run.config.report.probe_rows:
        raise UserError("--record-probe: report.probe_rows=0; set it to a number of sequences")
    contents = check_workdir(Path(workdir), run.config, run.data.fingerprint)
    recorder.check(run, Path(workdir), contents.eval_rows)


def write(run: Run, state: TrainState, step: int, workdir: str, row: dict[str, Any]) -> None:
    """Writes the probe of a checkpoint, and its held-out row where the run has none of any step."""
    folder = Path(workdir)
    rows = check_workdir(folder, run.config, run.data.fingerprint).eval_rows
    with WorkdirLock(folder):
        recorder.Recorder(run, folder, ALL, rows).record(step, state)
        if not files.last_row(folder / METRICS):
            with MetricsLog(folder, None) as log:
                log.write(row)

"""A start of a run, and what it writes down: config.json, and what goes with a checkpoint."""

import dataclasses
from pathlib import Path
from typing import Any

from moejax import __version__
from moejax.config import default, saved, to_dict
from moejax.config.versions import SCHEMA
from moejax.record.probe import step_files
from moejax.train.cost import budget
from moejax.train.metrics.log import Gap, MetricsLog, warn
from moejax.train.processes import is_first
from moejax.train.setup import Run
from moejax.train.state import count_parameters
from moejax.train.workdir import run_folder as workdir
from moejax.train.workdir.run_folder import Found


@dataclasses.dataclass
class Life:
    """One start of a run: what it found, and config.json as it is now.

    ``about``: where the config is from, and what a token costs.
    """

    run: Run
    folder: Path
    found: Found
    about: dict[str, Any]
    restart: bool = False
    content: dict[str, Any] = dataclasses.field(default_factory=dict)

    def begin(self, step: int, gaps: list[Gap], meta: Any) -> None:
        """Writes config.json for a start at a step, with the gaps of the logs, which it takes over;
        ``meta``: what was saved with the step."""
        if not is_first():
            return
        lost = workdir.missing_probes(self.folder, meta.get("probe", []))
        for name in lost:
            warn(f"{name} is missing; what needs it is left out of the report")
        found = self.found
        self.content = {
            **_about(self.run),
            **self.about,
            "id": found.id if found.id and not self.restart else workdir.new_id(),
            "baselines": self.run.data.baselines(),
            "history": workdir.history(found, step, gaps, self.restart, [*found.lost, *lost]),
        }
        gaps.clear()
        saved.write_config(self.folder, self.content)

    def meta(self, step: int, log: MetricsLog) -> dict[str, Any]:
        """What is saved with a checkpoint: all that is needed to go on without the other files."""
        if log.gaps and is_first():
            gaps = [workdir.stamped(step, workdir.gap_entry(gap)) for gap in log.gaps]
            self.content["history"] += gaps
            log.gaps.clear()
            saved.write_config(self.folder, self.content)
        return {
            "fingerprint": self.run.data.fingerprint,
            "run": self.content,
            "logs": log.counts(),
            "probe": list(step_files(self.folder)),
        }

    def saved(self) -> None:
        """Writes down that a checkpoint is committed."""
        workdir.note_saved(self.folder)


def _about(this: Run) -> dict[str, Any]:
    """What config.json says of the run besides where its config is from and what it costs."""
    data = this.data
    return {
        # How these processes found each other is no part of the run: one alone may evaluate it.
        "config": {**to_dict(this.config), "distributed": to_dict(default())["distributed"]},
        "schema": SCHEMA,
        "version": __version__,
        "corpus": data.name,
        "fingerprint": data.fingerprint,
        **data.about(),
        "units": this.task.units._asdict(),
        "parameters": {
            "total": count_parameters(this.abstract_state.params),
            "active": budget.active_parameters(this),
        },
        "visibility": this.leak,
    }

"""The record of a run: config.json with the run's history, and the meta of checkpoints.

``history`` in config.json (and so in every checkpoint) lists what has happened to the run since its
first start: fields that changed, rows and files that are missing.
"""

import dataclasses
import secrets
from datetime import datetime
from pathlib import Path
from typing import Any

from moejax import __version__
from moejax.config import default, saved, settings, to_dict
from moejax.config.saved import Entry
from moejax.config.versions import SCHEMA
from moejax.data.source import Positioned
from moejax.record.probe import step_files
from moejax.train.cost import budget
from moejax.train.metrics.log import Gap, MetricsLog, warn
from moejax.train.processes import is_first
from moejax.train.setup import Run
from moejax.train.state import count_parameters
from moejax.train.workdir.contents import Contents, missing_probes, note_saved
from moejax.train.workdir.origin import origin


@dataclasses.dataclass
class RunRecord:
    """One start of a run: the contents of its workdir, and the present content of config.json.

    ``about``: the source of the config, and the costs of a token (see ``description``).
    """

    run: Run
    folder: Path
    contents: Contents
    about: dict[str, Any]
    restart: bool = False
    content: dict[str, Any] = dataclasses.field(default_factory=dict)

    def begin(self, step: int, gaps: list[Gap], meta: Any) -> None:
        """Writes config.json for a start at a step.

        Args:
          gaps: of the logs; they move to the history, and the list is emptied.
          meta: what was saved with the step.
        """
        if not is_first():
            return
        lost = missing_probes(self.folder, meta.get("probe", []))
        for name in lost:
            warn(f"{name} is missing; the report leaves out the pages that need it")
        before = self.contents
        self.content = {
            **about_run(self.run),
            **self.about,
            "id": before.id if before.id and not self.restart else secrets.token_hex(8),
            "baselines": self.run.data.baselines(),
            "history": history(before, step, gaps, self.restart, [*before.lost, *lost]),
        }
        gaps.clear()
        saved.write_config(self.folder, self.content)

    def checkpoint_meta(self, step: int, log: MetricsLog) -> dict[str, Any]:
        """The meta of a checkpoint: all that resuming needs if the other files are lost."""
        if log.gaps and is_first():
            self.content["history"] += [stamped(step, gap_entry(gap)) for gap in log.gaps]
            log.gaps.clear()
            saved.write_config(self.folder, self.content)
        data = self.run.data
        return {
            "fingerprint": data.fingerprint,
            **({"position": data.position(step)} if isinstance(data, Positioned) else {}),
            "run": self.content,
            "logs": log.counts(),
            "probe": list(step_files(self.folder)),
        }

    def checkpoint_committed(self) -> None:
        """Notes in ``saved.json`` that a checkpoint is committed."""
        note_saved(self.folder)

    def rewrite_config(self) -> None:
        """Writes config.json again if it was lost and read from a checkpoint."""
        if self.contents.rebuilt and is_first():
            saved.write_config(self.folder, self.contents.config_json)


def description(
    run: Run, costs: budget.Budget, source: str, overrides: tuple[str, ...]
) -> dict[str, Any]:
    """The part of config.json about the source of the config, the costs and the environment."""
    return {
        "source": source,
        "overrides": list(overrides),
        **origin(),
        "flops": {
            "train": dataclasses.asdict(costs.train_flops),
            "eval": dataclasses.asdict(costs.eval_flops),
        },
        "memory": {"state": costs.state_bytes, "activations": costs.activation_bytes},
        "environment": settings.environment(),
        "devices": {"kind": run.mesh.devices.flat[0].device_kind, "count": run.mesh.size},
    }


def about_run(run: Run) -> dict[str, Any]:
    """The part of config.json about the run itself."""
    data = run.data
    return {
        # The connection of processes is no part of the run: a single process may evaluate it.
        "config": {**to_dict(run.config), "distributed": to_dict(default())["distributed"]},
        "schema": SCHEMA,
        "version": __version__,
        "corpus": data.name,
        "fingerprint": data.fingerprint,
        **data.about(),
        "units": run.task.units._asdict(),
        "parameters": {
            "total": count_parameters(run.abstract_state.params),
            "active": budget.active_parameters(run),
        },
        "visibility": run.leak,
    }


# ---------------------------------------------------------------- history


def history(
    before: Contents, step: int, gaps: list[Gap], restart: bool, lost: list[str]
) -> list[Entry]:
    """The history of a run that starts at a step: the earlier entries, and those of this start.

    A run that starts at step 0 has none, except that it was restarted.
    """
    if step == 0:
        return [stamped(0, {"restarted": True})] if restart and before.config_json else []
    # Changes after the step that the run resumes from take effect from that step on.
    entries = [{**entry, "step": min(entry["step"], step)} for entry in before.history]
    new: list[Entry] = [{"field": name, "old": old, "new": x} for name, old, x in before.changes]
    new += [gap_entry(gap) for gap in gaps]
    new += [{"missing": name} for name in lost]
    return entries + [stamped(step, entry) for entry in new]


def gap_entry(gap: Gap) -> Entry:
    """An entry of the history for a gap of a log."""
    return {"log": gap.log, "rows_missing": gap.rows, "rows": gap.of}


def stamped(step: int, entry: Entry) -> Entry:
    """An entry of the history with the step, the time and the version."""
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    return {"step": step, **entry, "time": now, "version": __version__}

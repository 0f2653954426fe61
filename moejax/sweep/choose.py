"""``--filter``: some of a sweep's trials, by name."""

from fnmatch import fnmatchcase

from moejax.errors import UserError
from moejax.sweep.definition import Sweep, Trial


def trials(sweep: Sweep, patterns: str) -> list[Trial]:
    """The trials whose name one of the patterns matches, in the sweep's order.

    Args:
      patterns: as of file names (``top_*,*-seed0``), with commas between; empty: all trials.

    Raises:
      UserError: a pattern matches none.
    """
    wanted = [pattern.strip() for pattern in patterns.split(",") if pattern.strip()]
    for pattern in wanted:
        if not any(fnmatchcase(trial.name, pattern) for trial in sweep.trials):
            names = ", ".join(trial.name for trial in sweep.trials)
            raise UserError(f"--filter={patterns}: no trial is called {pattern!r}; trials: {names}")
    return [
        trial
        for trial in sweep.trials
        if not wanted or any(fnmatchcase(trial.name, pattern) for pattern in wanted)
    ]

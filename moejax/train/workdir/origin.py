"""Where a run's numbers come from: the command line, and the commit of the sources."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import moejax

SECONDS = 10.0
"""A git that takes longer (a dead network disk) is not waited for."""


def origin() -> dict[str, str | None]:
    """For config.json: ``command``, as the shell would take it, and ``commit``."""
    program, *words = sys.argv or [""]
    return {"command": shlex.join([os.path.basename(program), *words]), "commit": commit()}


def commit() -> str | None:
    """The commit of moejax's own sources, if git tracks them, or else of the working directory.

    It ends in ``-dirty`` where tracked files differ from it; None where there is no commit, no git,
    or no answer.
    """
    sources = Path(moejax.__file__).parent
    tracked = _git(sources, "ls-files", "--error-unmatch", "__init__.py") is not None
    where = sources if tracked else None
    # Tags do not matter: only the commit itself, and whether files have changed since.
    return _git(where, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*") or None


def _git(folder: Path | None, *words: str) -> str | None:
    """What git says in a folder (None: the working directory); None where it fails."""
    # A repository's own fsmonitor would be a program to run.
    command = ["git", "-c", "core.fsmonitor=false", *words]
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, timeout=SECONDS, errors="replace"
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None

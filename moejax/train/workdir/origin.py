"""The origin of a run: its command line, and the commit of the sources."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import moejax

SECONDS = 10.0
"""The longest wait for git, which hangs on a dead network disk."""


def origin() -> dict[str, str | None]:
    """Entries of config.json: ``command``, quoted for a shell, and ``commit``."""
    program, *words = sys.argv or [""]
    return {"command": shlex.join([os.path.basename(program), *words]), "commit": commit()}


def commit() -> str | None:
    """The commit of moejax's own sources, if git tracks them, otherwise of the working directory.

    It ends in ``-dirty`` if tracked files differ from it; None without a commit, git, or an answer.
    """
    sources = Path(moejax.__file__).parent
    tracked = _git(sources, "ls-files", "--error-unmatch", "__init__.py") is not None
    where = sources if tracked else None
    # Without tags: only the commit itself, and whether files have changed since.
    return _git(where, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*") or None


def _git(folder: Path | None, *words: str) -> str | None:
    """The output of git in a folder (None: the working directory); None if it fails."""
    # A repository's own fsmonitor would be a program that git runs.
    command = ["git", "-c", "core.fsmonitor=false", *words]
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, timeout=SECONDS, errors="replace"
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None

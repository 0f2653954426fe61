"""Disturbs a run at an exact point, without a change to the program that runs.

``python -m tests.train.disturb EVENT STEP WHAT train ...`` is ``moejax train ...``, but at the
event the process sends itself the signals WHAT (``SIGTERM+SIGTERM``), or waits for a line on stdin.
"""

import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

from moejax import cli
from moejax.train import setup
from moejax.train.metrics import console
from tests.environment import caching
from tests.train.runs import ROOT, Ended


def disturb(event: str, step: int, act: Callable[[], None]) -> None:
    """Calls ``act`` once, in this process's run, at an event.

    Args:
      event: ``step``: before update ``step``. ``save``: while checkpoint ``step`` is being written.
        ``config``: before config.json gets its name. ``end``: after the last save.
    """
    if event == "step":
        _before(setup.Run.train_step, step, act)
    elif event == "save":
        threading.Thread(target=_when_saving, args=(step, act), daemon=True).start()
    elif event == "config":
        replace = Path.replace
        Path.replace = lambda self, to: (act(), replace(self, to))[1]  # pyright: ignore
    elif event == "end":
        finished = console.Console.finished
        console.Console.finished = lambda *args: (act(), finished(*args))[1]  # pyright: ignore


def _before(steps: functools.cached_property, step: int, act: Callable[[], None]) -> None:
    make = steps.func

    def disturbed(run: setup.Run) -> Any:
        update = make(run)

        def once(state: Any, batch: Any) -> Any:
            if int(state.step) + 1 == step:
                act()
            return update(state, batch)

        return once

    steps.func = disturbed


def _when_saving(step: int, act: Callable[[], None]) -> None:
    """Acts as soon as the folder of an uncommitted checkpoint appears."""
    workdir = next(word for word in sys.argv if word.startswith("--workdir="))
    folder = Path(workdir.removeprefix("--workdir="), "checkpoints")
    while not any(path.name.startswith(f"{step}.") for path in folder.glob("*")):
        time.sleep(0.0002)
    act()


def _act(what: str) -> None:
    if what == "wait":
        print("waiting", flush=True)
        sys.stdin.readline()
    else:
        for name in what.split("+"):
            os.kill(os.getpid(), signal.Signals[name])


# ---------------------------------------------------------------- from another process


def start(event: str, step: int, what: str, argv: list[str]) -> Popen[str]:
    """A process of its own that runs a command and is disturbed; see above.

    It finds what an earlier process compiled.
    """
    words = [sys.executable, "-m", "tests.train.disturb", event, str(step), what, *argv]
    return Popen(words, cwd=ROOT, env=caching(), stdin=PIPE, stdout=PIPE, stderr=PIPE, text=True)


def until(line: str, process: Popen[str]) -> list[str]:
    """The output of the process before it prints `line`."""
    said = []
    assert process.stdout is not None
    for found in process.stdout:
        if found == line:
            return said
        said.append(found)
    raise AssertionError(end(process))


def end(process: Popen[str], line: str = "") -> Ended:
    out, err = process.communicate(line, timeout=300)
    return Ended(process.returncode, out, err)


if __name__ == "__main__":
    event, number, what = sys.argv[1:4]
    disturb(event, int(number), lambda: _act(what))
    sys.exit(cli.main(sys.argv[4:]))

"""Sweeps of small programs (trial.py) in place of training runs, for the tests of the runner.

``python -m tests.sweep.small [--die=NAME] sweep ...`` is ``moejax sweep ...`` on such trials; with
``--die=locate`` it kills itself, as ``kill -9`` would, when it is about to call `Journal.locate`.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moejax import cli
from moejax.sweep import budget, journal, runner, summary
from moejax.sweep import folder as folders
from tests.sweep.trial import STEPS
from tests.train.runs import ROOT, Ended, call

ALL = [str(i + 1) for i in range(STEPS)]
COMMAND = runner.train_command
PAGE = """
from moejax.config import default

def get_config():
    config = default()
    config.train.steps = {steps}
    return config

def sweep():
    for i, name in enumerate({names}):
        yield {{"name": name, "moe.d_ff": 8 * (i + 1)}}
"""


def small_command(trial: Any, sweep: Any, folder: Path) -> list[str]:
    workdir = folders.workdir_of(folder, trial)
    workdir.mkdir(parents=True, exist_ok=True)
    config = {**trial.config, "moe": {}} if trial.variant == "other" else trial.config
    saved = {"config": config, "fingerprint": "", "baselines": {}}
    (workdir / "config.json").write_text(json.dumps(saved))
    return [sys.executable, f"{ROOT}/tests/sweep/trial.py", str(workdir), trial.variant]


def no_report(sweep: Any, folder: Path) -> None:
    print("the table")


def no_summary(sweep: Any, folder: Path) -> str:
    """Small trials have nothing to sum up."""
    (folder / "summary.json").write_text("{}")
    return ""


def no_budget(sweep: Any, folder: Path, chosen: Any) -> None:
    """Small trials have nothing to count."""


class Small:
    """A sweep of small trials in a folder."""

    def __init__(self, folder: Path, *names: str):
        self.folder, self.page = folder / "out", folder / "page.py"
        self.page.write_text(PAGE.format(names=names, steps=STEPS))
        self.words = ["sweep", f"--experiment={self.page}", f"--workdir={self.folder}"]

    def run(self, *words: str) -> Ended:
        """In this process."""
        return call([*self.words, *words])

    def start(
        self,
        *words: str,
        die: str = "",
        stdout: int = subprocess.DEVNULL,
        stderr: int | None = None,
        start_new_session: bool = False,
    ) -> subprocess.Popen[bytes]:
        """In a process of its own."""
        main = [sys.executable, "-m", "tests.sweep.small", *([f"--die={die}"] if die else [])]
        return subprocess.Popen(
            [*main, *self.words, *words],
            cwd=ROOT,
            stdout=stdout,
            stderr=stderr,
            start_new_session=start_new_session,
        )

    def status(self) -> Ended:
        return call(["sweep", "status", f"--workdir={self.folder}"])

    def states(self) -> dict[str, str]:
        """By variant, as the journal has them."""
        return {name[: -len("-seed0")]: e.state for name, e in self.entries().items()}

    def entries(self) -> dict[str, journal.Entry]:
        return journal.read(self.folder)

    def workdir(self, name: str) -> Path:
        return self.folder / "trials" / f"{name}-seed0"

    def log(self, name: str) -> str:
        return (self.workdir(name) / "log.txt").read_text()

    def steps(self, name: str) -> list[str]:
        """The trial's steps: each once, however often it was started."""
        path = self.workdir(name) / "steps"
        return path.read_text().split() if path.exists() else []

    def pid(self, name: str) -> int:
        return int((self.workdir(name) / "pid").read_text())


def wait_until(condition: Callable[[], Any], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def at(condition: Callable[[], Any], number: int) -> threading.Thread:
    """Sends this process a signal once the condition holds."""

    def send() -> None:
        wait_until(condition)
        signal.pthread_kill(threading.main_thread().ident, number)  # pyright: ignore

    thread = threading.Thread(target=send)
    thread.start()
    return thread


def main(argv: list[str]) -> int:
    runner.train_command, runner.report = small_command, no_report
    budget.announce, summary.write = no_budget, no_summary
    if argv[0].startswith("--die="):
        moment = argv.pop(0).removeprefix("--die=")
        setattr(journal.Journal, moment, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    return cli.main(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

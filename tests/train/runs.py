"""A tiny run for the tests of the training loop: its command line, and readers of its files."""

import contextlib
import dataclasses
import io
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax import cli
from moejax.gating import NoisyTopK
from moejax.tasks.language.source import TextSource
from moejax.train import setup
from moejax.train.checkpoint.checkpointer import Checkpointer
from moejax.types import GateSpec, MoEStats
from tests.environment import of_a_user

ROOT = Path(__file__).parents[2]
PAGE = f"{ROOT}/configs/lm.py:size=debug,experts=4"
STEPS, LOG, EVAL, SAVE = 8, 3, 7, 3
PREEMPTED = 75


def text_of(run: setup.Run) -> TextSource:
    """The source of a run on text."""
    assert isinstance(run.data, TextSource)
    return run.data


SETTINGS = {
    "model.num_layers": 2,
    "model.d_model": 16,
    "moe.gate.name": "tests.train.runs:Drifting",
    "moe.d_ff": 8,
    "moe.losses.load": 0.1,
    "mesh.expert": 2,
    "train.steps": STEPS,
    "train.batch_size": 8,
    "train.seq_len": 16,
    "train.log_every": LOG,
    "train.eval_every": EVAL,
    "train.eval_rows": 12,
    "train.checkpoint_every": SAVE,
    # Independent of train.steps, so that runs of several lengths share a compiled step; the
    # warm-up continues beyond the last step, so that every step has its own learning rate.
    "optim.schedule": "constant",
    "optim.warmup_steps": 10,
    "data.eval_fraction": 0.2,
    "report.probe_rows": 0,
}


@dataclasses.dataclass(frozen=True)
class Drifting(NoisyTopK):
    """Noise that depends on the step and state that depends on every step before: a resumed run
    that lost either routes differently."""

    def init_state(self, spec: GateSpec) -> dict[str, jax.Array]:
        return {"bias_E": jnp.zeros(spec.num_experts)}

    def update(self, state: dict[str, jax.Array], stats: MoEStats) -> dict[str, jax.Array]:
        excess_E = stats.load_E - stats.load_E.mean()
        return {"bias_E": state["bias_E"] - 0.05 * jnp.sign(excess_E)}

    def __call__(self, params: Any, state: Any, x_GTD: Any, context: Any) -> Any:
        router_DE = params["router_DE"] + state["bias_E"]
        return super().__call__({**params, "router_DE": router_DE}, state, x_GTD, context)


def write_text(folder: Path, letters: int = 110) -> Path:
    """Five short files, one of them held out: fewer rows than a run takes, so it starts over."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    words = ["gate", "router", "expert", "token", "load", "a", "the", "to"]
    for i in range(5):
        text = " ".join(rng.choice(words, letters))
        (folder / f"{i}.txt").write_text(text[:letters])
    return folder


def flags(text: Path, **changes: Any) -> list[str]:
    """The overrides of the tiny run; ``train__steps=9`` changes ``train.steps``."""
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    settings = {**SETTINGS, "data.path": text, **changes}
    return [f"--config.{name}={value}" for name, value in settings.items()]


def command(workdir: Path, text: Path, **changes: Any) -> list[str]:
    """The command line ``moejax train ...`` of the tiny run."""
    return ["train", f"--config={PAGE}", *flags(text, **changes), f"--workdir={workdir}"]


@dataclasses.dataclass(frozen=True)
class Ended:
    status: int
    out: str
    err: str


def call(argv: list[str]) -> Ended:
    """One command line, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main(argv)
    return Ended(status, out.getvalue(), err.getvalue())


def call_as_a_user(argv: list[str]) -> Ended:
    """One command line in a fresh process on one device, optimised: for runs of many steps."""
    ended = subprocess.run(
        [sys.executable, "-m", "moejax", *argv],
        cwd=ROOT, env=of_a_user(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    return Ended(ended.returncode, ended.stdout, ended.stderr)


def refused(argv: list[str], *parts: str) -> None:
    """Asserts that a command is the user's mistake: one line, nothing compiled."""
    ended = call(argv)
    assert ended.status == 2
    assert ended.err.startswith("moejax: error: ") and ended.err.count("\n") == 1, ended.err
    for part in parts:
        assert part in ended.err, ended.err
    assert "compiling" not in ended.out


# ---------------------------------------------------------------- the files of a run


def rows(workdir: Path, split: str = "") -> list[dict[str, Any]]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if split in ("", row["split"])]


OWN = ("id", "history", "command", "environment")
"""Entries of config.json that belong to one run or one process."""


def config_of(workdir: Path) -> dict[str, Any]:
    """config.json without the entries of `OWN`."""
    content = json.loads((workdir / "config.json").read_text())
    return {name: x for name, x in content.items() if name not in OWN}


def steps(workdir: Path) -> list[int]:
    return Checkpointer(workdir / "checkpoints", read_only=True).steps()


def saved(workdir: Path, run: setup.Run, step: int | None = None) -> dict[str, np.ndarray]:
    """A checkpoint's arrays by path: step, parameters, optimizer state, gate state, key."""
    with Checkpointer(workdir / "checkpoints", read_only=True) as checkpoints:
        restored = checkpoints.restore(run.abstract_state, step=step or max(steps(workdir)))
    assert restored is not None
    return named(restored.state)


def named(state: Any) -> dict[str, np.ndarray]:
    """Copies of a state's arrays, by path."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.array(x)
        for path, x in jax.tree.leaves_with_path(state)
    }


def same_bits(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and a[name].tobytes() == b[name].tobytes() for name in a
    )


def same_run(workdir: Path, other: Path, run: setup.Run) -> None:
    """Asserts that two runs left the same rows, config and checkpoints, bit for bit.

    The two checkpoints kept are the last two, and a run that was stopped has saved more often.
    """
    assert (workdir / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    assert config_of(workdir) == config_of(other)
    left = sorted(path.name for path in (workdir / "checkpoints").iterdir())
    assert left == sorted(map(str, steps(workdir))) and len(left) == 2  # and no half-saved one
    assert max(steps(workdir)) == max(steps(other))
    for step in set(steps(workdir)) & set(steps(other)):
        assert same_bits(saved(workdir, run, step), saved(other, run, step)), step
    timings = (workdir / "timings.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in timings] == [
        row["step"] for row in rows(other, "train")
    ]


def files(workdir: Path) -> dict[str, tuple[int, bytes]]:
    """Time and content of every file except the lock, which names its last owner."""
    found = [path for path in workdir.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(p.relative_to(workdir)): (p.stat().st_mtime_ns, p.read_bytes()) for p in found}


def copy(workdir: Path, to: Path) -> Path:
    return Path(shutil.copytree(workdir, to))


def snapshot(workdir: Path, to: Path) -> None:
    """Copies a run's files between two steps, as a kill -9 there would leave them.

    Rows have no buffer in the process. Waits for a running save, since copying files that move
    would give a mixture that no kill leaves.
    """
    folder = workdir / "checkpoints"
    while folder.exists() and any(not path.name.isdecimal() for path in folder.iterdir()):
        time.sleep(0.001)
    shutil.copytree(workdir, to)

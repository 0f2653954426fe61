"""``moejax profile``: a trace of a few training steps, and a table of their time by part."""

import os
from pathlib import Path
from typing import Any

import jax

from moejax.config import Config
from moejax.config.flags import not_text
from moejax.errors import UserError
from moejax.record.files import write_json
from moejax.train import compile_cache, setup
from moejax.train.cost import budget
from moejax.train.profile.attribution import (
    IDLE,
    PARTS,
    REST,
    read_program,
    read_trace,
    time_by_part,
)
from moejax.train.step import train_step

WARM_UP = 2
STEP = "training step"
MODULE = f"jit_{train_step.__name__}"
"""The name of the compiled program in a trace."""


def run(config: Config, steps: int, out: str) -> int:
    """Traces ``steps`` training steps after a warm-up; writes to ``out`` and prints the table.

    Raises:
      UserError: a mistake in the config or the folder, before anything is compiled or created.
    """
    folder = Path(out)
    check_folder(folder)
    training = setup.prepare(config)
    if jax.process_count() > 1:
        raise UserError("moejax profile runs in one process; use distributed.mode=off")
    budget.checked_budget(training)
    training.data.train_batch(0)  # refuses too little data
    make_folder(folder)
    with (
        compile_cache.kept(config.report.compile_cache, names_matter=True),
        jax.set_mesh(training.mesh),
    ):
        print(f"compiling, {WARM_UP} steps to warm up, {steps} steps traced ...", flush=True)
        program = _trace(training, steps, folder)
    traced = read_trace(folder, program, MODULE, STEP)
    rows = table(time_by_part(traced), len(traced.windows))
    device = training.mesh.devices.flat[0].device_kind
    about = {"steps": steps, "devices": training.mesh.size, "device": device, "rows": rows}
    write_json(folder / "profile.json", about)
    print(render(rows))
    print(f"\n{_trace_file(folder)}\n  opens in https://ui.perfetto.dev; TensorBoard: {folder}")
    return 0


def _trace(training: setup.Run, steps: int, folder: Path) -> Any:
    """Runs the steps; returns the operations of the program."""
    compiled = training.train_step.lower(training.abstract_state, training.abstract_batch).compile()
    state = training.init_state()
    for step in range(WARM_UP):
        state, metrics = compiled(state, training.put(training.data.train_batch(step)))
        jax.block_until_ready(metrics)
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # its thousands of events would slow the steps down
    with jax.profiler.trace(str(folder), profiler_options=options):
        for step in range(WARM_UP, WARM_UP + steps):
            batch = training.put(training.data.train_batch(step))
            with jax.profiler.StepTraceAnnotation(STEP, step_num=step):
                state, metrics = compiled(state, batch)
                jax.block_until_ready((state, metrics))
    return read_program(compiled.as_text())


def table(spent: dict[tuple[str, bool], float], steps: int) -> list[dict[str, Any]]:
    """One row per part: milliseconds per step, share of the step, and the mixed part of it."""
    total = sum(spent.values())
    rows = []
    for part in [*PARTS, *REST]:
        mixed = spent.get((part, True), 0.0)
        time = spent.get((part, False), 0.0) + mixed
        if time or part == IDLE:
            shares = {"share": time / total, "mixed": mixed / total}
            rows.append({"part": part, "ms": time / steps / 1e6, **shares})
    return rows


def render(rows: list[dict[str, Any]]) -> str:
    """The table as text; the shares add up to 100%."""
    lines = [f"{'part':<12}{'ms/step':>9}{'share':>8}{'mixed':>8}"]
    for row in rows:
        mixed = f"{row['mixed']:>8.1%}" if row["mixed"] else " " * 8
        meaning = {**PARTS, **REST}[row["part"]]
        lines.append(f"{row['part']:<12}{row['ms']:>9.2f}{row['share']:>8.1%}{mixed}  {meaning}")
    total = {name: sum(row[name] for row in rows) for name in ("ms", "share", "mixed")}
    lines.append(f"{'step':<12}{total['ms']:>9.2f}{total['share']:>8.1%}{total['mixed']:>8.1%}")
    lines.append(
        f"mixed: in operations that fuse work of several parts ({total['mixed']:.1%} of the step), "
        "counted with the last part of each"
    )
    return "\n".join(lines)


def check_folder(folder: Path) -> None:
    """Refuses a folder that is not empty, or whose name is not UTF-8.

    Raises:
      UserError: it is such a folder, or no folder.
    """
    if problem := not_text(str(folder)):
        raise UserError(f"--out={folder} {problem}; name another folder")
    try:
        taken = folder.exists() and bool(os.listdir(folder))
    except OSError as error:
        raise UserError(f"--out={folder} cannot be a folder ({error.strerror})") from error
    if taken:
        raise UserError(f"--out={folder} is not empty; name a new folder")


def make_folder(folder: Path) -> None:
    """Creates the folder.

    Raises:
      UserError: it cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out={folder} cannot be made: {error.strerror}") from error


def _trace_file(folder: Path) -> Path:
    return max(folder.glob("**/*.trace.json.gz"), default=folder)

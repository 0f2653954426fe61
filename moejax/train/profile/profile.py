"""``moejax profile``: a trace of a few training steps, and a table of where their time went."""

import json
import os
from pathlib import Path
from typing import Any

import jax

from moejax.config import Config
from moejax.config.flags import not_text
from moejax.errors import UserError
from moejax.record.files import replaced
from moejax.train import compile_cache, setup
from moejax.train.cost import budget
from moejax.train.profile.attribution import IDLE, PARTS, REST, read_program, read_trace, share_out

WARM_UP = 2
STEP = "training step"
MODULE = "jit_train_step"


def run(config: Config, steps: int, out: str) -> int:
    """Traces ``steps`` training steps after a warm-up; writes DIR and prints the table.

    Raises:
      UserError: a mistake in the config or the folder, before anything is compiled or created.
    """
    folder = Path(out)
    check_folder(folder)
    this = setup.prepare(config)
    if jax.process_count() > 1:
        raise UserError("moejax profile runs in one process; use distributed.mode=off")
    budget.checked_budget(this)
    this.data.train_batch(0)  # refuses data that are too few
    make_folder(folder)
    with (
        compile_cache.kept(config.report.compile_cache, names_matter=True),
        jax.set_mesh(this.mesh),
    ):
        print(f"compiling, {WARM_UP} steps to warm up, {steps} steps traced ...", flush=True)
        program = _trace(this, steps, folder)
    traced = read_trace(folder, program, MODULE, STEP)
    rows = table(share_out(traced), len(traced.windows))
    device = this.mesh.devices.flat[0].device_kind
    about = {"steps": steps, "devices": this.mesh.size, "device": device, "rows": rows}
    with replaced(folder / "profile.json") as temporary:
        temporary.write_text(json.dumps(about, indent=1) + "\n")
    print(render(rows))
    print(f"\n{_trace_file(folder)}\n  opens in https://ui.perfetto.dev; TensorBoard: {folder}")
    return 0


def _trace(this: setup.Run, steps: int, folder: Path) -> Any:
    """Runs the steps; the operations of the program that ran."""
    compiled = this.train_step.lower(this.abstract_state, this.abstract_batch).compile()
    state = this.init_state()
    for step in range(WARM_UP):
        state, metrics = compiled(state, this.put(this.data.train_batch(step)))
        jax.block_until_ready(metrics)
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # its thousands of events would slow what is measured
    with jax.profiler.trace(str(folder), profiler_options=options):
        for step in range(WARM_UP, WARM_UP + steps):
            batch = this.put(this.data.train_batch(step))
            with jax.profiler.StepTraceAnnotation(STEP, step_num=step):
                state, metrics = compiled(state, batch)
                jax.block_until_ready((state, metrics))
    return read_program(compiled.as_text())


def table(spent: dict[tuple[str, bool], float], steps: int) -> list[dict[str, Any]]:
    """A row per part: milliseconds per step, share of the step, and how much of it is mixed."""
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
    """Refuses a folder that holds something, or whose name is not UTF-8.

    Raises:
      UserError: it is one, or no folder.
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
    """Makes the folder.

    Raises:
      UserError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out={folder} cannot be made: {error.strerror}") from error


def _trace_file(folder: Path) -> Path:
    return max(folder.glob("**/*.trace.json.gz"), default=folder)

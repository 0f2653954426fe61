"""The console output of a run: its size before compiling, a line per logged step, a summary."""

import functools
import math
import sys
import time
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from moejax.config.saved import entry_text, read_config
from moejax.config.tree import flatten
from moejax.data.source import Remarks
from moejax.mesh import AXES, BATCH_AXES
from moejax.train.cost import peak, units
from moejax.train.cost.budget import Budget
from moejax.train.metrics.rows import Row
from moejax.train.optim import make_schedule
from moejax.train.processes import is_first
from moejax.train.setup import Run
from moejax.train.workdir.summary import write_summary_png
from moejax.types import GateTraits


class Console:
    """Prints on the first process only; keeps the rates that go to ``timings.jsonl``."""

    def __init__(self, run: Run, folder: Path):
        self._run, self._folder = run, folder
        self._flops_per_step = 0.0
        self._peak = 0.0
        self._began = self._logged_at = time.perf_counter()
        self._logged_step = self._from_step = 0
        self._last_eval: Row = {}
        self._last_train: Row = {}
        self._rate = self._seconds = math.nan
        self._bar = _ProgressBar(run.config) if _wants_bar(run.config) else None

    def announce(self, budget: Budget) -> None:
        """Parameters, memory and mesh, before anything is compiled."""
        config, run = self._run.config, self._run
        self._flops_per_step = budget.flops_per_step
        self._peak = peak.peak_flops(list(run.mesh.devices.flat), config.model.dtype)
        mesh = " x ".join(f"{axis}={run.mesh.shape[axis]}" for axis in AXES)
        device = run.mesh.devices.flat[0]
        train = config.train
        self._print(f"model       {_model_line(config)}")
        self._print(
            f"parameters  {units.count(budget.parameters)} total, "
            f"{units.count(budget.active_parameters)} active per token"
        )
        total = units.size(budget.state_bytes + budget.activation_bytes)
        self._print(
            f"memory      {total} expected per device ({units.size(budget.state_bytes)} state and "
            f"gradients, {units.size(budget.activation_bytes)} activations)"
        )
        self._print(f"mesh        {mesh} on {run.mesh.size} {device.device_kind} device(s)")
        of, (training, held_out) = run.task.units, run.data.size()
        many = (
            f"{units.count(training)} training {of.item}s" if training is not None else "a stream"
        )
        self._print(f"data        {run.data.name}: {many}, {units.count(held_out)} held out")
        if is_first() and isinstance(run.data, Remarks):
            for heading, text in run.data.facts().items():
                self._print(f"{heading:<12}{text}")
            for text in run.data.warnings():
                self._print(f"warning     {text}")
        length = f" x {of.items_per_row}" if of.items_per_row > 1 else ""
        self._print(
            f"training    {train.steps} steps of {train.batch_size}{length} {of.item}s, "
            f"{budget.flops_per_step / 1e9:.1f} GFLOP each"
        )
        if run.leak:
            self._print(f"visibility  {run.leak} (a token's output depends on these)")
        if advice := gate_advice(run):
            self._print(f"gate        {advice}")

    def start(self, step: int, before: dict[str, Any] | None = None) -> None:
        """Announces the loop's start at ``step``; ``before``: the config of the run until then."""
        self._began = self._logged_at = time.perf_counter()
        self._logged_step = self._from_step = step
        if step:
            self._print(f"resuming {self._folder} at step {step}")
        self._print(f"schedule    {_schedule_line(self._run, step)}")
        if step and is_first() and (problem := learning_rate_rise(self._run, step, before)):
            print(f"moejax: warning: {problem}", file=sys.stderr, flush=True)
        self._print("compiling the training step ...")
        if self._bar:
            self._bar.start(step)

    def compiled(self, step: int) -> None:
        """Announces the first step, whose time is mostly compilation and counts towards no rate."""
        now = time.perf_counter()
        self._print(f"compiled, first step done after {now - self._logged_at:.0f} s")
        self._logged_at, self._logged_step = now, step

    def stepped(self, step: int, row: Row, now: float) -> dict[str, Any]:
        """Shows a logged step; returns its row for ``timings.jsonl``."""
        train = self._run.config.train
        steps = step - self._logged_step
        if steps:
            self._seconds = (now - self._logged_at) / steps
            self._rate = train.batch_size * self._run.task.units.items_per_row / self._seconds
        seconds = self._seconds
        mfu = self._flops_per_step / seconds / self._peak
        self._logged_at, self._logged_step, self._last_train = now, step, row
        parts = [
            f"step {step:>{len(str(train.steps))}}/{train.steps}",
            f"loss {row['loss']:.4f}",
        ]
        if steps:
            parts += [f"{units.count(self._rate)} {self._item}s/s", f"MFU {mfu:.0%}"]
        if "moe/max_vio" in row:
            parts.append(f"max load {1 + row['moe/max_vio']:.2f}x")
            parts.append(f"drops {row['moe/drop_rate']:.2%}")
        if self._bar:  # it shows the step and the remaining time itself
            self._bar.advance(step, "  ".join(parts[1:]))
        else:
            eta = [f"ETA {units.duration((train.steps - step) * seconds)}"] if steps else []
            self._print("  ".join(parts + eta))
        return {
            "step": step,
            "seconds_per_step": seconds,
            f"{self._item}s_per_second": self._rate,
            "mfu": mfu,
            "elapsed": now - self._began,
            # Distinguishes the rows of different starts.
            "from_step": self._from_step,
        }

    def evaluated(self, row: Row) -> None:
        """Shows a held-out evaluation; its time is not charged to the next training step."""
        self._last_eval = row
        self._logged_at = time.perf_counter()
        self._logged_step = row["step"]
        loss = ", ".join(self._with_units(row["loss"]))
        accuracy = f", accuracy {row['accuracy']:.2%}" if "accuracy" in row else ""
        self._print(f"held out at step {row['step']}: loss {loss}{accuracy}")

    def already_done(self, step: int) -> None:
        """Announces that the run has all its steps; draws its picture if a kill prevented that."""
        if is_first() and not (self._folder / "summary.png").exists():
            write_summary_png(str(self._folder))
        advice = _more_steps(self._run, step)
        self._print(
            f"{self._folder} is complete at step {step}; raise train.steps to continue{advice}"
        )

    def diverged(self, problem: Exception) -> None:
        """Announces that the run stopped at a value that is not finite."""
        self.close()
        if is_first():
            print(
                f"moejax: diverged at {problem}; lower optim.learning_rate, or raise "
                "optim.warmup_steps or moe.losses.z; every checkpoint holds finite values",
                file=sys.stderr,
            )

    def stopped(self, step: int) -> None:
        """Announces that a signal stopped the run."""
        self.close()
        saved = "and saved " if step else ""
        self._print(f"stopped {saved}at step {step}; the same command resumes")

    def finished(self) -> None:
        """Draws the picture and prints the summary of a run that has all its steps."""
        self.close()
        if not is_first():
            return
        write_summary_png(str(self._folder))
        known = read_config(self._folder)
        baselines = known["baselines"]
        row, last = self._last_eval, self._last_train
        lines = [("held-out loss", "  ".join(self._with_units(row["loss"])))]
        lines += [(f"  {name}", "  ".join(self._with_units(x))) for name, x in baselines.items()]
        if "accuracy" in row:
            lines.append(("accuracy", f"{row['accuracy']:.2%} held out"))
        if not math.isnan(self._rate):  # a single step, which was the compilation
            lines.append(("speed", f"{units.count(self._rate)} {self._item}s/s at the end"))
        if "moe/max_vio" in row:
            busiest, drops = 1 + last["moe/max_vio"], last["moe/drop_rate"]
            held_out = row["moe/drop_rate"]
            lines.append(("balance", f"busiest expert at {busiest:.2f}x the mean load"))
            lines.append(
                ("drops", f"{drops:.2%} of pairs in the last step, {held_out:.2%} held out")
            )
        if self._run.leak:
            lines.append(("visibility", self._run.leak))
        lines += [("history", entry_text(entry)) for entry in known.get("history", ())]
        lines.append(("files", f"{self._folder}: summary.png, metrics.jsonl, checkpoints/"))
        lines.append(("next", f"moejax report {self._folder}    moejax config --config=..."))
        self._print(f"\nfinished in {units.duration(time.perf_counter() - self._began)}")
        for label, text in lines:
            self._print(f"{label:<16}{text}")

    @property
    def _item(self) -> str:
        return self._run.task.units.item

    @functools.cached_property
    def _unit(self) -> str:
        """The unit of losses, as in config.json and the report."""
        run = self._run
        return units.loss_unit({**run.data.about(), "units": run.task.units._asdict()})

    def _with_units(self, loss: float) -> list[str]:
        """A held-out loss with its unit, and in the other units that the data have for it."""
        extras = self._run.data.eval_extras(loss)
        others = [f"{x:.4f} {name.replace('_per_', '/')}" for name, x in extras.items()]
        return [f"{loss:.4f} {self._unit}", *others]

    def close(self) -> None:
        """Releases the terminal, however the run ended."""
        if self._bar:
            self._bar.stop()
            self._bar = None

    def _print(self, line: str) -> None:
        if self._bar:
            self._bar.print(line)
        elif is_first():
            print(line, flush=True)


def _rate(schedule: Any, step: int) -> float:
    """The learning rate of the update that follows ``step`` completed ones."""
    return float(schedule(step))


def _schedule_line(run: Run, step: int) -> str:
    """The learning rate now, at its peak if that is yet to come, and at the end."""
    optim, steps = run.config.optim, run.config.train.steps
    decay = f" over {optim.decay_steps or steps} steps" if optim.schedule != "constant" else ""
    peak = f"{optim.learning_rate:.3g} at step {optim.warmup_steps}, "
    to_come = step + 1 < optim.warmup_steps <= steps
    return (
        f"{optim.schedule}{decay}: learning rate {_rate(run.schedule, step):.3g} at step "
        f"{step + 1}, {peak if to_come else ''}{_rate(run.schedule, steps - 1):.3g} at step {steps}"
    )


RATE_FIELDS = ("train.steps", *(f"optim.{name}" for name in (
    "learning_rate", "schedule", "warmup_steps", "decay_steps", "decay_fraction", "final_fraction",
)))  # fmt: skip
"""Fields that the learning rate depends on."""


def learning_rate_rise(run: Run, step: int, before: dict[str, Any] | None) -> str:
    """A warning if the learning rate rises at a step because fields changed; "" if it does not."""
    if not before:
        return ""
    old, new = (flatten(x) for x in (before, run.config))
    changed = [
        f"{name} from {old[name]} to {new[name]}" for name in RATE_FIELDS if old[name] != new[name]
    ]
    schedule = make_schedule(ConfigDict(before["optim"]), before["train"]["steps"])
    was, is_now = _rate(schedule, step), _rate(run.schedule, step)
    if not changed or is_now <= was * (1 + 1e-6):
        return ""
    length = old["optim.decay_steps"] or old["train.steps"]
    stretched = old["optim.schedule"] != "constant" and length != (
        new["optim.decay_steps"] or new["train.steps"]
    )
    remedy = (
        f"; --config.optim.decay_steps={length} keeps the schedule as it was, and "
        f"{_rate(schedule, length):.3g} after its end"
        if stretched
        else ""
    )
    return (
        f"the learning rate goes up at step {step + 1}, from {was:.3g} to {is_now:.3g}, because of "
        f"{' and '.join(changed)}{remedy}"
    )


def _more_steps(run: Run, step: int) -> str:
    """The effect of raising train.steps on the learning rate, and the remedy; "" without one."""
    optim, steps = run.config.optim, run.config.train.steps
    if optim.schedule == "constant" or optim.decay_steps:
        return ""
    longer = make_schedule(optim, 2 * steps)
    if _rate(longer, step) <= _rate(run.schedule, step):
        return ""
    return (
        f"; that stretches the {optim.schedule} schedule, and the learning rate goes up again, "
        f"unless optim.decay_steps={steps} keeps it at {_rate(run.schedule, step):.3g}"
    )


def gate_advice(run: Run) -> str:
    """The gate's advice for this mesh; empty if it has none."""
    model, mesh = run.task.model, run.mesh.shape
    if not model.num_moe_layers:
        return ""
    rows = run.config.train.batch_size // math.prod(mesh[axis] for axis in BATCH_AXES)
    advice = GateTraits.of(model.gate).advice(rows, mesh)
    return f"moe.{advice}" if advice else ""


class _ProgressBar:
    """One live line on a terminal, instead of a line per logged step."""

    def __init__(self, config: Any):
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        self._progress = Progress(
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[status]}"),
        )
        self._task = self._progress.add_task("", total=config.train.steps, status="")

    def start(self, step: int) -> None:
        self._progress.update(self._task, completed=step)
        self._progress.start()

    def advance(self, step: int, status: str) -> None:
        self._progress.update(self._task, completed=step, status=status)

    def print(self, line: str) -> None:
        self._progress.console.print(line, highlight=False, markup=False)

    def stop(self) -> None:
        self._progress.stop()


def _wants_bar(config: Any) -> bool:
    return config.report.progress and is_first() and sys.stdout.isatty()


def _model_line(config: Any) -> str:
    model, moe = config.model, config.moe
    if "num_layers" not in model:
        return f"{config.task.name}: {moe.num_experts} experts of width {moe.d_ff}, " + (
            f"gate {moe.gate.name}" if moe.every else "as one network without a gate"
        )
    layers = f"{model.num_layers} layers of width {model.d_model}"
    if not moe.every:
        return f"{layers}, dense FFN of width {model.d_ff}"
    where = "every layer" if moe.every == 1 else f"one layer of {moe.every}"
    return (
        f"{layers}, {moe.num_experts} experts of width {moe.d_ff} in {where}, "
        f"gate {moe.gate.name}, transport {moe.transport}"
    )

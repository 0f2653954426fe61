"""V-MoE's batch-prioritised routing: evaluation with too few slots, in three orders.

    python -m experiments.bpr.run --out runs/bpr.json [--seeds 6] [--steps 300] [--every 1]

Trains vision transformers on the digits with slots for 1.05 times the mean load, first come, first
served, and evaluates each with fewer slots and other priorities. Prints a table; the JSON has every
seed's numbers. README.md in this folder says what came out. Riquelme et al., arXiv 2106.05974.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax

from moejax.config import Config, load
from moejax.errors import UserError
from moejax.sweep.statistics import estimate, paired
from moejax.train import setup
from moejax.train.metrics.rows import eval_row
from moejax.train.setup import Run
from moejax.train.state import TrainState
from moejax.train.workdir.contents import make_workdir

PAGE = "configs/vit.py:gate=top_k"
SETTINGS = {
    # V-MoE's weights: a softmax over all experts, so that a token's largest says how sure it is.
    "moe.gate.renormalize": False,
    "task.shift": 0,
    "optim.warmup_steps": 30,
    "optim.b2": 0.95,
    "optim.final_fraction": 0.1,
    "optim.weight_decay": 0.1,
    "report.probe_rows": 0,
}
CAPACITIES = (1.0, 0.5, 0.25)
PRIORITIES = ("position", "choice", "gate")
BASELINES = ("position", "choice")
DROPLESS = "dropless"


class Arm(NamedTuple):
    """A way to evaluate. ``capacity``: slots over the mean load; 0 for as many as it takes."""

    priority: str
    capacity: float


ARMS = [Arm(DROPLESS, 0.0), *(Arm(p, c) for c in CAPACITIES for p in PRIORITIES)]

UNITS = {"accuracy": (100, 1), "loss": (1, 3), "dropped": (100, 1), "unserved": (100, 1)}
"""Measures, with the factor and decimals of their numbers in the table."""

Found = dict[Arm, dict[int, dict[str, float]]]
"""By arm and seed: accuracy, loss, share of pairs dropped, share of tokens with no expert."""


class Size(NamedTuple):
    """Options of the trained model. ``every``: every n-th layer has experts."""

    steps: int
    every: int


def config_of(size: Size, seed: int, **changes: Any) -> Config:
    own = {"train.steps": size.steps, "moe.every": size.every, "train.seed": seed}
    fields = {**SETTINGS, **own, **changes}
    return load(PAGE, [f"--config.{name}={value}" for name, value in fields.items()]).config


def evaluated_as(arm: Arm) -> dict[str, Any]:
    """The fields of the config that an arm changes."""
    if arm.priority == DROPLESS:
        return {"moe.eval_transport": "dropless"}
    return {
        "moe.eval_transport": "cells",
        "moe.eval_capacity_factor": arm.capacity,
        "moe.priority": arm.priority,
    }


def trained(run: Run, first: Run) -> TrainState:
    """The state after all steps; ``first`` is a run of another seed that has compiled its step."""
    state = run.init_state()
    for step in range(run.config.train.steps):
        state, _ = first.train_step(state, run.put(run.data.train_batch(step)))
    return state


def measure(seeds: int, size: Size) -> Found:
    """Trains a model per seed and evaluates it in every way."""
    runs = [setup.prepare(config_of(size, seed)) for seed in range(seeds)]
    with jax.set_mesh(runs[0].mesh):
        states = []
        for seed, run in enumerate(runs):
            states.append(trained(run, runs[0]))
            print(f"trained seed {seed}", file=sys.stderr, flush=True)
        found: Found = {}
        for arm in ARMS:
            how = setup.prepare(config_of(size, 0, **evaluated_as(arm)))
            held_out = [how.put(batch) for batch in how.eval_batches()]
            found[arm] = {}
            for seed, state in enumerate(states):
                row = eval_row(size.steps, how.evaluate(state, held_out), how.data, how.leak)
                found[arm][seed] = {
                    "accuracy": row["accuracy"],
                    "loss": row["loss"],
                    "dropped": row["moe/drop_rate"],
                    "unserved": row["moe/unserved_rate"],
                }
    return found


def interval(values: list[float], key: str) -> str:
    """A mean with its 95 % interval over seeds; shares in percent."""
    found = estimate(values)
    unit, digits = UNITS[key]
    half = "" if found.half_width is None else f" ± {unit * found.half_width:.{digits}f}"
    return f"{unit * found.mean:.{digits}f}{half}"


def gain(found: Found, arm: Arm, over: str, key: str) -> str:
    """Difference between two arms of equal capacity, with its interval over seeds."""
    pair = (found[arm], found[Arm(over, arm.capacity)])
    ours, theirs = ({seed: row[key] for seed, row in rows.items()} for rows in pair)
    difference = paired(ours, theirs)
    assert difference is not None
    unit, digits = UNITS[key]
    half = "" if (of := difference.half_width) is None else f" ± {unit * of:.{digits}f}"
    return f"{unit * difference.mean:+.{digits}f}{half}"


def table(found: Found) -> str:
    """Markdown: a row per arm, means with 95 % intervals over seeds."""
    lines = [
        "| slots | priority | accuracy, % | loss, nats | pairs dropped, % | tokens without, % | "
        "gate - this: accuracy | loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arm, rows in found.items():
        cells = [interval([row[key] for row in rows.values()], key) for key in UNITS]
        gains = ["", ""]
        if arm.priority in BASELINES:
            ours = Arm("gate", arm.capacity)
            gains = [gain(found, ours, arm.priority, key) for key in ("accuracy", "loss")]
        slots = f"{arm.capacity:g}" if arm.capacity else "all"
        lines.append(f"| {slots} | {arm.priority} | {' | '.join([*cells, *gains])} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", required=True, metavar="FILE", help="the JSON file to write")
    parser.add_argument("--seeds", type=int, default=6, help="models to train (6)")
    parser.add_argument("--steps", type=int, default=300, help="updates of each (300)")
    parser.add_argument("--every", type=int, default=1, help="layers per layer with experts (1)")
    args = parser.parse_args(argv)
    try:
        if args.seeds < 1:
            raise UserError(f"--seeds={args.seeds} must be at least 1")
        size = Size(args.steps, args.every)
        target = Path(args.out)
        make_workdir(target.parent)
        found = measure(args.seeds, size)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    saved = [{**arm._asdict(), "seeds": rows} for arm, rows in found.items()]
    target.write_text(json.dumps({**size._asdict(), "arms": saved}, indent=1) + "\n")
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())

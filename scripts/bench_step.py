"""Benchmark of a training step: python scripts/bench_step.py --out FILE [--sizes A,B] [--quick]

Ratios are medians over pairs, with quartiles; pairs are measured in turns, A B, B A, A B, in one
process. A second ratio is of processor time, which other work on the machine affects little. Rows:

    moe_over_dense     tokens/s of the MoE model over those of the dense model of equal active FLOPs
    ours_over_plain    time of our dense step over that of a plain jitted JAX step of the same model
                       (scripts/plain_lm.py), after both gave the same losses
    host_ms            an iteration of the training loop whose device step takes no time at all, and
                       the call that starts a device step
    loader             batches per second that the loader makes over those that training takes
    first_step         seconds from the start of a process to the end of its first step, with an
                       empty and with a filled cache of compiled programs
"""

import argparse
import contextlib
import functools
import io
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import plain_lm
from first_step import PAGE, Row, first_step, spread

from moejax.config import Config, load
from moejax.config.tree import set_field
from moejax.train import loop, setup
from moejax.train.cost.budget import count_budget
from scripts.layer_bench.step_table import TARGETS

CUT = {
    "small": {  # as wide as it is, but short: ten of its own steps take an hour on two cores
        "model.num_layers": 2,
        "model.dtype": "float32",  # bfloat16 is emulated on CPU
        "train.batch_size": 4,
        "train.seq_len": 256,
    }
}


def config_of(size: str, **fields: Any) -> Config:
    """A size of configs/lm.py, cut as said above, with one device; ``moe__every=0`` is dense."""
    config = load(f"{PAGE}:size={size}").config
    changes = {"mesh.expert": 1, **CUT.get(size, {})}
    changes |= {name.replace("__", "."): value for name, value in fields.items()}
    for name, value in changes.items():
        set_field(config, name, value)
    return config


# ------------------------------------------------------------------------------- pairs of steps


class Stepper:
    """A run's own training step, ready to be taken again and again."""

    def __init__(self, config: Config):
        self.run = setup.prepare(config)
        with jax.set_mesh(self.run.mesh):
            self.state = self.run.init_state()
            self.batch = self.run.put(self.run.data.train_batch(0))

    def __call__(self) -> Any:
        with jax.set_mesh(self.run.mesh):
            self.state, metrics = self.run.train_step(self.state, self.batch)
        return jax.block_until_ready(metrics)


class PlainStepper:
    """The plain step on the same batch, from the same weights."""

    def __init__(self, ours: Stepper):
        config = ours.run.config
        self._step = plain_lm.make_step(ours.run.task.model, config.optim, config.train.steps)
        self._params = plain_lm.from_ours(ours.state.params, config.model.num_layers)
        self._moments = plain_lm.init_moments(self._params)
        self._tokens = ours.batch["tokens"]

    def __call__(self) -> jax.Array:
        self._params, self._moments, loss = self._step(self._params, self._moments, self._tokens)
        return jax.block_until_ready(loss)


def paired(first: Callable[[], Any], second: Callable[[], Any], pairs: int) -> Row:
    """Time of ``first`` over that of ``second``, of pairs taken in alternating order."""
    times: dict[Any, list[tuple[float, float]]] = {first: [], second: []}
    for run in times:
        run()  # compiles
    for i in range(pairs):
        for run in (first, second) if i % 2 == 0 else (second, first):
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            times[run].append((time.perf_counter() - wall, time.process_time() - cpu))
    wall, cpu = (
        [a[clock] / b[clock] for a, b in zip(times[first], times[second], strict=True)]
        for clock in (0, 1)
    )
    return {
        "ratio": spread(wall),
        "cpu_ratio": spread(cpu),
        "ms": 1e3 * statistics.median(t for t, _ in times[first]),
        "other_ms": 1e3 * statistics.median(t for t, _ in times[second]),
        "pairs": pairs,
    }


def moe_over_dense(size: str, transport: str, mesh: int, pairs: int) -> Row:
    """Rate over rate: the dense step's time over the MoE step's."""
    common: dict[str, Any] = {"mesh__expert": mesh}
    sparse = Stepper(config_of(size, moe__transport=transport, **common))
    dense = Stepper(config_of(size, moe__every=0, **common))
    flops = [count_budget(stepper.run).flops_per_step for stepper in (sparse, dense)]
    what = f"{size}, {transport}, {mesh} device{'s' if mesh > 1 else ''}"
    row = paired(dense, sparse, pairs)
    row["ms"], row["other_ms"] = row["other_ms"], row["ms"]
    return {"row": "moe_over_dense", "what": what, **row, "flops_ratio": flops[0] / flops[1]}


def ours_over_plain(size: str, pairs: int) -> Row:
    """First that three updates give the same losses, then the times."""
    ours = Stepper(config_of(size, moe__every=0))
    plain = PlainStepper(ours)
    for step in range(3):
        metrics, loss = ours(), float(plain())
        own = float(metrics["totals"].loss / metrics["totals"].items)
        # One rounding apart where measured (CPU, float32); 16 leave room for other orders of sums.
        if not np.isclose(own, loss, rtol=2e-6):
            raise SystemExit(f"step {step + 1}: our loss is {own}, the plain step's {loss}")
    row = {"row": "ours_over_plain", "what": f"{size}, dense, 1 device", "loss": own}
    return row | paired(ours, plain, pairs)


# ------------------------------------------------------------------------- the host's share


@contextlib.contextmanager
def instead_of_the_step(step: Callable[..., Any]) -> Iterator[None]:
    """Runs take ``step`` for their training step."""
    own = setup.Run.train_step
    replacement = functools.cached_property(lambda run: step)
    replacement.__set_name__(setup.Run, "train_step")
    setup.Run.train_step = replacement
    try:
        yield
    finally:
        setup.Run.train_step = own


def host_ms(size: str, steps: int) -> Row:
    """The real loop of `moejax train` around a step that returns at once what a real one gave."""
    config = config_of(
        size, train__steps=steps, train__eval_every=steps, train__checkpoint_every=steps,
        train__eval_rows=1, report__compile_cache="off",
    )  # fmt: skip
    stepper = Stepper(config)
    stepper()
    call_ms = []
    for _ in range(10):
        with jax.set_mesh(stepper.run.mesh):
            began = time.perf_counter()
            stepper.state, metrics = stepper.run.train_step(stepper.state, stepper.batch)
            call_ms.append(1e3 * (time.perf_counter() - began))
        jax.block_until_ready(metrics)
    calls: list[tuple[float, float]] = []

    def nothing(state: Any, batch: Any) -> Any:
        now = time.perf_counter(), time.process_time()
        calls.append(now)
        return state, metrics

    with tempfile.TemporaryDirectory() as folder, instead_of_the_step(nothing):
        with contextlib.redirect_stdout(io.StringIO()):
            loop.run(config, folder)
    wall, cpu = (np.diff(clock)[1:] * 1e3 for clock in zip(*calls, strict=True))
    return {
        "row": "host_ms",
        "what": f"{size}, log_every={config.train.log_every}",
        # The mean: every tenth iteration writes a row, and that is a cost too.
        "mean": float(wall.mean()),
        "cpu_mean": float(cpu.mean()),
        "value": spread(wall.tolist()),
        "call": spread(call_ms),
    }


def loader(size: str, batches: int) -> Row:
    """Making a batch and putting it on the device, over taking a step with it."""
    stepper = Stepper(config_of(size))
    stepper()
    ratios, seconds = [], []
    for i in range(batches):
        began = time.perf_counter()
        jax.block_until_ready(stepper.run.put(stepper.run.data.train_batch(i)))
        made = time.perf_counter()
        stepper()
        seconds.append(made - began)
        ratios.append((time.perf_counter() - made) / seconds[-1])
    return {
        "row": "loader",
        "what": f"{size}, batches of {stepper.batch['tokens'].shape[0]} rows",
        "ratio": spread(ratios),
        "ms": 1e3 * statistics.median(seconds),
    }


# ------------------------------------------------------------------------------------ the report


def table(rows: list[Row]) -> str:
    """A line per row: what was measured, median and quartiles, by processor time, target."""
    lines = [f"{'row':<18}{'':<34}{'median':>8}{'quartiles':>17}{'cpu':>8}  target"]
    for row in rows:
        value = row.get("ratio") or row["value"]
        cpu = row.get("cpu_ratio") or row.get("cpu") or {"median": row.get("cpu_mean")}
        shown = f"{cpu['median']:>8.2f}" if cpu["median"] is not None else " " * 8
        quartiles = f"{value['low']:.2f} to {value['high']:.2f}"
        lines.append(
            f"{row['row']:<18}{row['what']:<34}{value['median']:>8.2f}{quartiles:>17}{shown}  "
            f"{TARGETS[row['row']]}"
        )
    return "\n".join(lines)


def measure(sizes: list[str], pairs: int, mesh: int, starts: int) -> Iterator[Row]:
    """Every row, the quick ones first."""
    first = sizes[0]
    yield host_ms(first, steps=62)
    yield loader(first, batches=pairs)
    for size in sizes:
        yield ours_over_plain(size, pairs)
        for transport in ("cells", "dropless"):
            yield moe_over_dense(size, transport, 1, pairs)
    yield moe_over_dense(first, "cells", mesh, pairs)
    if starts:
        yield from first_step(first, starts)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", required=True, metavar="FILE", help="the JSON file to write")
    parser.add_argument("--sizes", default="tiny,small", metavar="A,B", help="of configs/lm.py")
    parser.add_argument("--pairs", type=int, default=21, metavar="N")
    parser.add_argument(
        "--starts", type=int, default=3, metavar="N", help="cached; 0: no processes"
    )
    parser.add_argument("--quick", action="store_true", help="size debug, 2 pairs, no processes")
    args = parser.parse_args(argv)
    sizes = ["debug"] if args.quick else args.sizes.split(",")
    pairs, starts = (2, 0) if args.quick else (args.pairs, args.starts)
    with contextlib.suppress(RuntimeError):  # its devices have started: a test
        jax.config.update("jax_num_cpu_devices", 4)
    rows: list[Row] = []
    for row in measure(sizes, pairs, min(4, jax.device_count()), starts):
        rows.append(row)
        print(table([row]).splitlines()[-1], flush=True)
    machine = {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "jax": jax.__version__,
        "load": os.getloadavg(),
    }
    content = {"machine": machine, "cut": {s: CUT[s] for s in sizes if s in CUT}, "rows": rows}
    Path(args.out).write_text(json.dumps(content, indent=1) + "\n")
    print("\n" + table(rows))


if __name__ == "__main__":
    main()

"""The evaluations behind the three findings.

One checkpoint with several ways to assign slots, on several texts, and the checkpoints before it.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moejax.config import Config, load, make_gate
from moejax.config.tasks import LANGUAGE
from moejax.contrib.openmoe.drops import Arm, Drops, drops
from moejax.contrib.openmoe.early import early
from moejax.contrib.openmoe.findings import Measured
from moejax.contrib.openmoe.interval import GROUPS
from moejax.contrib.openmoe.texts import Text, all_texts, corpus_of, domains
from moejax.contrib.openmoe.tokens import specialisation
from moejax.dispatch import Cells, Dropless
from moejax.errors import UserError
from moejax.record.probe import Probe
from moejax.record.routing import Routed
from moejax.tasks.task import Task
from moejax.train import record_routing
from moejax.train.checkpoint.checkpointer import Checkpointer
from moejax.train.evaluate import open_run
from moejax.train.processes import on_host
from moejax.train.setup import Run
from moejax.train.state import TrainState
from moejax.types import GateTraits

DROPLESS = Arm(0.0)
FACTORS = (1.0, 1.25, 2.0)
TYPICAL = 1.25
"""The capacity factor of the arms that differ in something else: OpenMoE's in training."""
ROWS = 256
"""Rows of each text by default."""
EARLY_ROWS = 128
"""Rows on which checkpoints are compared, where the run has no probe."""

Route = Callable[[TrainState, Text], Routed]


@dataclasses.dataclass(frozen=True)
class Options:
    """Rows of each text, other texts by path, and the checkpoint (None: the newest)."""

    rows: int
    data: tuple[str, ...] = ()
    step: int | None = None


def measure(workdir: Path, options: Options, say: Callable[[str], None]) -> Measured:
    """Evaluate a run's checkpoint; ``say`` receives progress messages.

    Raises:
      UserError: no run or checkpoint; a dense model; a gate that routes whole sequences; texts that
        cannot be read or are too short.
    """
    config = load(str(workdir / "config.json")).config
    _check(workdir, config, options)
    with open_run(config, str(workdir), options.step) as opened:
        run, state, step = opened
        texts = all_texts(run, options.data, options.rows)
        for text in texts:
            if text.rows < GROUPS:
                raise UserError(
                    f"{text.name} has {text.rows} rows of train.seq_len={config.train.seq_len}, "
                    f"and intervals need {GROUPS}; name a longer text"
                )
        routed, counted = _all_arms(run, state, texts, say)
        say("comparing checkpoints")
        earlier = early(*_recordings(run, workdir, step, texts[0]))
    origin = corpus_of(run).origin
    return Measured(
        run=workdir.resolve().name,
        step=step,
        steps=config.train.steps,
        num_experts=config.moe.num_experts,
        leak=run.leak,
        specialisation=specialisation(routed),
        early=earlier,
        drops=counted,
        routed=routed,
        token_text=origin.tokenizer.token_text() if origin else [],
    )


def _check(workdir: Path, config: Config, options: Options) -> None:
    if options.rows < GROUPS:
        raise UserError(f"--rows={options.rows} must be at least {GROUPS}, for intervals")
    if config.task.name != LANGUAGE:
        raise UserError(
            f"{workdir} is of task {config.task.name!r}, and the three findings are about text"
        )
    if not config.moe.every:
        raise UserError(f"{workdir} is a dense model (moe.every=0): it routes nothing")
    gate = make_gate(config)
    if GateTraits.of(gate).least_rows(config.moe.num_experts) > 1:
        raise UserError(
            f"{workdir}: moe.gate.name={config.moe.gate.name} routes whole sequences, and the "
            "three findings are about tokens"
        )


def arms(task: Task) -> list[Arm]:
    """Dropless, first come at each factor, batch-prioritised, and another number of choices.

    The last only for a gate that takes it with the parameters it has.
    """
    result = [DROPLESS, *(Arm(factor) for factor in FACTORS), Arm(TYPICAL, "gate")]
    gate: Any = task.model.gate
    k = gate.k if "k" in {field.name for field in dataclasses.fields(gate)} else 0
    other = Arm(TYPICAL, k=1 if k > 1 else 2)
    if k and _parameters(task) and _parameters(variant(task, other)) == _parameters(task):
        result.append(other)
    return result


def _parameters(task: Task) -> Any:
    """Shapes and types of parameters and gate state; None for a gate that refuses its fields."""

    def counts() -> np.ndarray:
        return np.ones(task.model.vocab_size, np.int64)

    try:
        trees = jax.eval_shape(lambda: (task.init(jax.random.key(0)), task.init_gate_state(counts)))
    except ValueError:
        return None
    return jax.tree.map(lambda x: (x.shape, x.dtype.name), trees)


def variant(task: Task, arm: Arm) -> Task:
    """The same model with an arm's way to give out slots, within each sequence."""
    model = task.model
    moe = dataclasses.replace(
        model.moe,
        group="sequence",
        eval_transport=Cells(arm.capacity_factor, arm.priority)
        if arm.capacity_factor
        else Dropless(),
    )
    changes: dict[str, Any] = {"k": arm.k} if arm.k else {}
    gate = dataclasses.replace(model.gate, **changes)  # pyright: ignore[reportArgumentType]
    return dataclasses.replace(task, model=model.with_experts(config=moe, gate=gate))


def router(run: Run, arm: Arm) -> Route:
    """Routes a text; compiles once for all texts and checkpoints."""
    task = variant(run.task, arm)
    route = jax.jit(functools.partial(record_routing.route, task=task))

    def routed(state: TrainState, text: Text) -> Routed:
        parts = []
        for batch in text.batches:
            real_B = batch["valid"].any(axis=1)
            routing = on_host(route(state, run.put(batch)))
            parts.append({name: x[:, real_B] for name, x in routing.items()})
        expert, weight, kept = (
            np.concatenate([part[name] for part in parts], axis=1)
            for name in ("expert", "weight", "kept")
        )
        return Routed(
            expert, weight, kept, text.token_NL, text.valid_NL, task.model.moe.num_experts,
            text.label_NL, text.names,
        )  # fmt: skip

    return routed


def _all_arms(
    run: Run, state: TrainState, texts: Sequence[Text], say: Callable[[str], None]
) -> tuple[Routed, list[Drops]]:
    """The dropless routing of the first text, and the drops of every arm on every text."""
    own, counted = None, []
    for arm in arms(run.task):
        route = router(run, arm)
        for text in texts:
            say(f"routing {text.rows} rows of {text.name}: {arm.name}")
            routed = route(state, text)
            own = routed if own is None else own
            counted.append(drops(text.name, arm, routed))
            for name, row_n in domains(routed):
                counted.append(drops(f"{text.name}, {name}", arm, routed.select(row_n)))
    assert own is not None
    return own, counted


def _recordings(
    run: Run, workdir: Path, last: int, text: Text
) -> tuple[Iterator[tuple[int, Routed]], str]:
    """The same rows at several steps up to ``last``, and their source."""
    probe = Probe.read(workdir)
    if probe is not None and last in probe.steps:
        return _of_probe(probe, last), "the recorded probe"
    return _of_checkpoints(run, workdir, last, text.head(EARLY_ROWS)), "checkpoints"


def _of_probe(probe: Probe, last: int) -> Iterator[tuple[int, Routed]]:
    for step in (step for step in probe.steps if step <= last):
        yield step, probe.routed(step)


def _of_checkpoints(run: Run, workdir: Path, last: int, text: Text) -> Iterator[tuple[int, Routed]]:
    """Kept checkpoints, and the state before the first step unless it has another run's weights."""
    route = router(run, DROPLESS)
    if not run.config.train.init_from:
        yield 0, route(jax.block_until_ready(run.init_state()), text)
    with Checkpointer(workdir / "checkpoints", read_only=True) as checkpoints:
        for step in sorted(step for step in checkpoints.steps() if step <= last):
            restored = checkpoints.restore(run.abstract_state, step=step)
            assert restored is not None
            yield step, route(restored.state, text)

"""Measured leakage: how much an evaluation gains from later tokens, in nats per token."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from moejax.config import Config
from moejax.config.build import make_gate
from moejax.config.checks import has_experts
from moejax.config.tasks import LANGUAGE
from moejax.errors import UserError
from moejax.mesh import BATCH_AXES, axis_size
from moejax.tasks.language.task import LanguageModel
from moejax.tasks.task import Batch
from moejax.train.metrics.rows import Divergence
from moejax.train.processes import compiled_together
from moejax.train.setup import Run
from moejax.train.state import TrainState
from moejax.types import GateTraits


def measure(run: Run, state: TrainState, sequences: int) -> dict[str, Any]:
    """Loss of held-out sequences evaluated whole, and token by token without later tokens.

    For the second, the model runs once for every prefix length, with everything after the prefix
    masked as padding in all sequences, and only its last prediction counts, as in decoding. For a
    causal model the two agree up to rounding; otherwise the second is larger by the amount that the
    first gains from later tokens.

    Costs seq_len forward passes. ``sequences`` is rounded up to fill the mesh and the groups.

    Raises:
      Divergence: a loss is not finite.
    """
    train, task = run.config.train, run.task
    assert isinstance(task, LanguageModel), "see check"
    rows, batches = _batches(run, sequences)
    placed = [run.put(batch) for batch in batches]
    jitted = jax.jit(functools.partial(_sums, task=task))
    program = compiled_together(jitted, state, placed[0], np.int32(0))
    tokens = sum(int(batch["valid"].sum()) for batch in batches)
    whole, causal = 0.0, 0.0
    for batch in placed:
        lengths = range(train.seq_len, 0, -1)
        # One at a time: see Run.evaluate.
        sums = [jax.device_get(program(state, batch, np.int32(n))) for n in lengths]
        whole += float(sums[0][0])
        causal += float(np.sum([last for _, last in sums], dtype=np.float64))
    if not math.isfinite(whole + causal):
        raise Divergence(f"step {int(state.step)}: the loss of the measured leak is not finite")
    return {
        "leak/with_future": whole / tokens,
        "leak/without_future": causal / tokens,
        "leak/nats_per_token": (causal - whole) / tokens,
        "leak/tokens": tokens,
        "leak/sequences": rows,
    }


def check(config: Config) -> None:
    """Refuses a task without a future to leak, and a gate whose routing no mask changes.

    Raises:
      UserError: naming the task or the gate.
    """
    if config.task.name != LANGUAGE:
        raise UserError(
            f"--measure-leak: task {config.task.name!r} does not predict a token from earlier "
            "ones: there is no future to leak; leave the flag out"
        )
    if config.moe.get("replay"):
        raise UserError(
            f"--measure-leak: moe.replay={config.moe.replay!r} fixes the routing, which then does "
            "not depend on the mask; use --config.moe.replay="
        )
    if has_experts(config) and GateTraits.of(make_gate(config)).check_rows is not None:
        raise UserError(
            f"--measure-leak: the routing of gate {config.moe.gate.name!r} does not depend on the "
            "mask, so nothing would be measured; measure the run that was recorded"
        )


def rows_per_batch(run: Run, sequences: int) -> int:
    """The smallest batch for ``sequences`` that mesh and routing groups allow."""
    train, moe = run.config.train, run.task.model.moe
    unit = axis_size(run.mesh.abstract_mesh, *BATCH_AXES) * moe.rows_per_group(1)
    if moe.group == "batch" or train.batch_size % unit:
        unit = train.batch_size
    return min(math.ceil(sequences / unit) * unit, train.batch_size)


def _batches(run: Run, sequences: int) -> tuple[int, list[dict[str, np.ndarray]]]:
    """The number of sequences, and batches of them as small as mesh and groups allow."""
    size = rows_per_batch(run, sequences)
    wanted = math.ceil(sequences / size) * size
    batches = run.data.eval_batches(size, wanted)
    return sum(int(batch["valid"].any(axis=1).sum()) for batch in batches), batches


def _sums(state: TrainState, batch: Batch, length: Array, *, task: LanguageModel) -> Any:
    """Nats of the first ``length`` tokens, with all others masked, and of the last of these."""
    key = jax.random.wrap_key_data(state.key)
    position_L = jnp.arange(batch["valid"].shape[1])
    prefix = {**batch, "valid": batch["valid"] & (position_L < length)}
    nats_BL = task.nats(state.params, state.gate_state, prefix, state.step, key)
    nats_BL = jnp.where(prefix["valid"], nats_BL, 0.0)
    return jnp.sum(nats_BL), jnp.sum(jnp.where(position_L == length - 1, nats_BL, 0.0))

"""The gates under examination, one row each, and a function that calls one.

A row of a gate of your own goes in ``ROWS`` like any other; what its file must promise is read off
the gate itself (``trained_by``, ``visibility``, ``columns``) and off the claims of its row.
"""

import ast
import atexit
import dataclasses
import functools
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import gating
from moejax.record import routing as recording
from moejax.record.routing import Recording, from_arrays
from moejax.types import Context, Gate, GateContext, GateOutput, GateSpec, MoEStats
from tests.mappings import forget_programs_if_many

G, T, D, E, V, TASKS = 4, 16, 16, 8, 32, 3
"""Groups (one sequence each), tokens per group, width, experts, vocabulary, tasks."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A gate with fields, and what it claims beyond the contract.

    Attributes:
      exact_load: in training every expert gets the same number of a group's tokens: this many, or
        with True those of ``columns`` experts per token.
      equivariant: without noise, reordering a group's tokens reorders their routing.
      step: the step to examine it at, for gates with stages or schedules.
      untrained: parameters that nothing moves at this step, by name.
      noisy_eval: draws random numbers in evaluation too.
      never_drops: its capacity is what it routes, in evaluation too.
      thins: visits fewer experts the further its logits lie apart.
      label: its name in test ids (default: made of gate and fields).
      slow: another row has the same code with other numbers; this one is for the slow suite.
    """

    gate: str
    fields: tuple[tuple[str, Any], ...] = ()
    _: dataclasses.KW_ONLY
    exact_load: bool | int = False
    equivariant: bool = True
    step: int = 0
    untrained: tuple[str, ...] = ()
    noisy_eval: bool = False
    never_drops: bool = False
    thins: bool = False
    label: str = ""
    slow: bool = False

    @property
    def name(self) -> str:
        fields = (f"{field}={value}" for field, value in self.fields)
        return self.label or "-".join([self.gate, *fields])

    def make(self) -> Gate:
        return gating.make(self.gate, **dict(self.fields))


def row(gate: str, *, fields: dict[str, Any] | None = None, **claims: Any) -> Row:
    return Row(gate, tuple((fields or {}).items()), **claims)


@functools.cache
def recorded(layers: int = 2, rows: int = 8) -> str:
    """A file with a random routing of rows of ``T`` tokens, two distinct experts each."""
    rng = np.random.default_rng(4)
    shape = (layers, rows, T)
    expert = np.argsort(rng.random((*shape, E)), axis=-1)[..., :2].astype(np.int32)
    weight = rng.random((*shape, 2)).astype(np.float32)
    arrays = {
        "expert": expert,
        "weight": weight,
        "kept": weight > 0,
        "identity": np.zeros(shape, np.float32),
        "token": rng.integers(0, V, shape[1:]).astype(np.int32),
        "digest": np.arange(rows, dtype=np.uint64),
    }
    routed = from_arrays(arrays, E)
    about = {"num_experts": E, "sees": []}
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    recording.save(folder / "routing.npz", Recording(routed, routed, about))
    return str(folder / "routing.npz")


ROWS = [
    row("top_k"),
    row("top_k", fields={"k": 3, "renormalize": False}),
    row("switch"),
    row("mixtral"),
    row("shazeer"),
    row("gshard"),
    row("dense"),
    row("base", exact_load=True),
    row("sbase"),
    row("sbase", fields={"rounding": "balanced"}, exact_load=True),
    row("dselect_k", thins=True),
    row("dselect_k", fields={"max_active": 3}, thins=True),
    # Independent of the token, and experts that choose.
    row("hash"),
    row("hash", fields={"table": "balanced", "k": 2}, slow=True),
    row("hash", fields={"table": "bigram", "k": 2}, equivariant=False),
    row("task"),
    row("sentence"),
    row("sentence", fields={"pool": "running"}, equivariant=False, slow=True),
    row("sentence", fields={"pool": "previous", "segment": 4}, equivariant=False),
    row("expert_choice", exact_load=4, never_drops=True),
    row("expert_choice", fields={"policy": "position", "eval_policy": "position"}, slow=True),
    row("expert_choice_causal", exact_load=4),
    row("expert_choice_causal", fields={"policy": "threshold", "max_active": 3}),
    row("soft", never_drops=True),
    row(
        "soft",
        fields={"slots": 3, "noise_std": 0.5, "normalize": False},
        never_drops=True,
        slow=True,
    ),
    row("replay", fields={"path": recorded()}, equivariant=False, label="replay"),
    # Routers of the literature, and controls without one.
    row("hierarchical"),
    row("hierarchical", fields={"groups": 2, "k": 3, "noisy": False}, slow=True),
    row("sparsemixer"),
    row("sparsemixer", fields={"k": 3, "jitter": 0.5}, slow=True),
    row("xmoe"),
    row("xmoe", fields={"k": 2, "bias": True}, slow=True),
    row("stablemoe"),
    row("stablemoe", fields={"stage_steps": 5}, step=5, untrained=("embed_VR", "distill_RE")),
    row("remoe"),
    row("remoe", fields={"max_active": 3}, slow=True),
    row("evomoe", fields={"temperature": 0.2, "min_temperature": 0.1}),
    row("evomoe", fields={"max_active": 3, "weights": "gumbel"}, thins=True, slow=True),
    row("evomoe", fields={"hard_step": 5}, step=5),
    row("rl"),
    row("random", equivariant=False, noisy_eval=True),
    row("thor", equivariant=False, noisy_eval=True),
    row("thor", fields={"evaluation": "sequence"}, noisy_eval=True, slow=True),
    row("thor", fields={"evaluation": "mean"}),
    row("forced", equivariant=False, exact_load=True),
    row("forced", fields={"pattern": "skewed"}, equivariant=False),
    row("forced", fields={"pattern": "one"}, slow=True),
    # Experts merged into one.
    row("smear"),
    row("lory", fields={"segment": 4}, equivariant=False),
    row("lory", fields={"segment": 5, "first_segment": "bos"}, equivariant=False),
    row("lory", fields={"segment": 3, "first_segment": "uniform"}, equivariant=False, slow=True),
    row("lory", fields={"segment": 8, "first_segment": "paper"}, equivariant=False),
    # choice: presets of published models, prototypes, biases from past batches, local steps
    row("deepseek_moe", slow=True),
    row("qwen_moe", slow=True),
    row("olmoe", slow=True),
    row("openmoe", slow=True),
    row("residual_moe", slow=True),
    row("prototypes"),
    row("loss_free", fields={"bias_rate": 0.1}, slow=True),
    row("top_k", fields={"bias": True}, slow=True),
    row("loss_free", fields={"score": "sqrt_softplus"}, slow=True),
    row("deepseek_v2", fields={"k": 2, "num_groups": 4, "top_groups": 2}),
    row("deepseek_v3", fields={"k": 2, "num_groups": 4, "top_groups": 2}),
    row("quantile"),
    row("gating_dropout", fields={"local_share": 0.5, "local_rows": 1}),
]


OWN = os.environ.get("MOEJAX_EXAM", "")
"""A gate from elsewhere to examine instead: "module:Gate field=value claim:name=value"."""


def own_row(text: str) -> Row:
    """The row that ``OWN`` describes."""
    gate, *pairs = text.split()
    given = dict(pair.split("=", 1) for pair in pairs)
    claims = {k.removeprefix("claim:"): v for k, v in given.items() if k.startswith("claim:")}
    fields = {k: _typed(v) for k, v in given.items() if not k.startswith("claim:")}
    return row(gate, fields=fields, **{k: _typed(v) for k, v in claims.items()})


def _typed(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


if OWN:
    ROWS = [own_row(OWN)]

PARAMS = [pytest.param(r, id=r.name, marks=[pytest.mark.slow] * r.slow) for r in ROWS]
DISTINCT = [pytest.param(r, id=r.name) for r in ROWS if not r.slow]
"""The rows whose code no other row shares."""


def forgetting(every: int = 16) -> Any:
    """A fixture that frees compiled programs after so many tests, where they have become many."""
    done = iter(range(1, 10**9))

    @pytest.fixture(autouse=True)
    def forget() -> Iterator[None]:
        yield
        if next(done) % every == 0:
            forget_programs_if_many()

    return forget


def token_counts() -> np.ndarray:
    """A Zipf-like count of each token."""
    return (1000 / np.arange(1, V + 1)).astype(np.int64)


def spec(experts: int = E) -> GateSpec:
    return GateSpec(D, experts, V, 0, TASKS, token_counts)


def drawn(gate: Gate, experts: int = E, seed: int = 0, scale: float = 1.0) -> Any:
    """Parameters at random, so that a gate that starts at zero decides something."""
    params = gate.init(jax.random.key(seed), spec(experts))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), max(len(leaves), 1))
    normal = [scale * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=False)]
    return jax.tree.unflatten(tree, normal)


def tokens(seed: int = 0, groups: int = G) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (groups, T, D))


def context(
    train: bool, *, step: int = 0, groups: int = G, keyed: bool = True, rows: int = 1, **known: Any
) -> GateContext:
    """Random token ids and tasks; a key only where the gate may ask for one."""
    rng = np.random.default_rng(7)
    drawn_known = {
        "token_BL": jnp.asarray(rng.integers(0, V, (groups, T)), jnp.int32),
        "task_B": jnp.asarray(rng.integers(0, TASKS, groups), jnp.int32),
        "step": jnp.int32(step),
        "key": jax.random.key(3) if keyed else None,
    }
    return Context.of(groups, T, **{**drawn_known, **known}).grouped(rows, train)


@functools.cache
def program(row: Row, experts: int = E):
    """The gate, jitted: (params, state, x, context) -> output."""
    gate = row.make()

    def call(params: Any, state: Any, x_GTD: jax.Array, given: GateContext) -> GateOutput:
        return gate(params, state, x_GTD, given)

    return jax.jit(call)


def stats_of(output: GateOutput, valid_GT: jax.Array) -> MoEStats:
    """The statistics that a layer without capacity would hand to the gate's update."""
    from moejax.layers.routing_stats import collect_stats, sum_over_groups

    kept_GTK = jnp.ones(output.routing.expert_GTK.shape, bool)
    stats = collect_stats(output.routing, output.stats.probs_GTE, kept_GTK, valid_GT)
    return dataclasses.replace(stats, gate=sum_over_groups(output.means, valid_GT))

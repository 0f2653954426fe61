"""The rows that a step computes and sends, derived from the config and the counts of a row.

A MoE layer of a micro-batch of T tokens in G routing groups, with E experts on S expert shards, has
N pairs, of which N' are kept. At least N' rows must be computed, and at least N (S - 1) / S rows of
D numbers sent to other devices, with tokens and experts spread over the shards. The formulas are
those of docs/benchmarks.md, where the sends are counted on compiled programs.

    transport       rows computed     rows sent / ((S - 1) / S)
    cells           G E C             G E C
    dropless        N'                N
    dropless_once   N'                a token once per shard with experts of it: not recorded
    gather          N'                T S
    all_experts     T E               T S

Each transport states its own row of this table (``Transport.rows``).
"""

import dataclasses
import math

import numpy as np

from moejax.analysis.run import Row, RunData
from moejax.config import from_dict, make_gate, moe_config
from moejax.config.tasks import task_entry
from moejax.errors import UserError
from moejax.options import DepthsOptions
from moejax.types import Counts

BYTES = {"float32": 4, "bfloat16": 2}


@dataclasses.dataclass(frozen=True)
class Traffic:
    """The traffic of one layer in one step, mean over layers.

    ``sent`` counts bytes one way over all devices.
    """

    computed_over_kept: float
    sent_over_minimum: float | None
    sent: float | None


def of_row(run: RunData, row: Row) -> Traffic | None:
    """The traffic of the training step of a row of metrics.jsonl.

    None if the config is of another version or its gate cannot be imported here.
    """
    try:
        resolved = from_dict(run.config)
        gate, moe = make_gate(resolved), moe_config(resolved)
    except UserError:
        return None
    if "transport" not in resolved.moe:  # experts that all examples visit: no rows are sent
        return None
    train, shards = resolved.train, _expert_shards(run)
    per_row = task_entry(resolved.task.name).sequences_per_row
    sequences, length = train.batch_size * per_row, run.units.tokens_per_row // per_row
    model = resolved.model
    if model.get("mod_capacity"):  # the experts' layers are of the blocks that take some tokens
        length = DepthsOptions(model.mod_capacity, model.mod_every).chosen(length)
    tokens = sequences * length
    load_ME, dropped_ME = np.asarray(row["moe/load"]), np.asarray(row["moe/dropped"])
    pairs = load_ME.sum() / len(load_ME)
    kept = pairs - dropped_ME.sum() / len(load_ME)
    slots, rules = 0.0, moe.transport.slot_rules
    if rules is not None:
        rows = moe.rows_per_group(sequences // train.grad_accum)
        capacity = gate.capacity(rows * length, moe.num_experts, rules.capacity_factor)
        slots = float(sequences // rows * moe.num_experts * capacity)
    counts = Counts(float(tokens), pairs, kept, slots, moe.num_experts, shards)
    computed, sent = moe.transport.rows(counts)
    if shards < 2 or sent is None:
        return Traffic(computed / max(kept, 1), None, None)
    width = resolved.model.d_model * BYTES[resolved.model.dtype]
    return Traffic(
        computed / max(kept, 1), sent / max(pairs, 1), sent * width * (shards - 1) / shards
    )


def _expert_shards(run: RunData) -> int:
    """The size of the mesh's expert axis; -1 takes the devices that the other axes leave."""
    sizes = {axis: run.field(f"mesh.{axis}", 1) for axis in ("data", "fsdp", "expert", "tensor")}
    if sizes["expert"] > 0:
        return sizes["expert"]
    others = math.prod(size for axis, size in sizes.items() if axis != "expert")
    return run.saved.get("devices", {}).get("count", 0) // others

"""The costs of runs, counted on their traced programs in a separate process.

``python -m moejax.sweep.count`` reads a JSON list of resolved configs from standard input and
writes the list of their costs as the last line of its output. It runs on the CPU and compiles
nothing.
"""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from moejax.config import from_dict
from moejax.errors import UserError
from moejax.types import GateTraits

_ONE_DEVICE = {f"mesh.{axis}": 1 for axis in ("data", "fsdp", "expert", "tensor")}
_ANYWHERE = {**_ONE_DEVICE, "mesh.cpu_devices": 0, "distributed.mode": "off"}
"""Overrides that let any config be traced in this process without changing its FLOPs."""

_KNOWN: dict[str, "Counted"] = {}
"""Costs counted by this process so far; a trace takes about a second."""


@dataclasses.dataclass(frozen=True)
class Counted:
    """The cost of a run in which every token visits as many experts as its gate aims at.

    ``total_params`` counts all parameters. ``active_flops`` counts floating-point operations of
    matrix products per training token, forward and backward, without drops. A row of a batch has
    ``tokens_per_row`` tokens.
    """

    total_params: int
    active_flops: float
    tokens_per_row: int


def count(configs: Sequence[dict[str, Any]]) -> list[Counted]:
    """The costs of resolved configs; those that differ only in seed and steps are counted once.

    Raises:
      UserError: a config that cannot run.
    """
    keys = [_key(config) for config in configs]
    new = [key for key in dict.fromkeys(keys) if key not in _KNOWN]
    if new:
        _KNOWN.update(zip(new, _in_process(new), strict=True))
    return [_KNOWN[key] for key in keys]


def _key(config: dict[str, Any]) -> str:
    train = {**config["train"], "seed": 0, "steps": 1}
    return json.dumps({**config, "train": train}, sort_keys=True)


def _in_process(configs: Sequence[str]) -> list[Counted]:
    ended = subprocess.run(
        [sys.executable, "-m", "moejax.sweep.count"],
        input=f"[{','.join(configs)}]",
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    if ended.returncode == 2:
        raise UserError(ended.stderr.strip().splitlines()[-1])
    if ended.returncode:
        raise RuntimeError(f"counting FLOPs failed:\n{ended.stderr}")
    return [Counted(**cost) for cost in json.loads(ended.stdout.splitlines()[-1])]


def main() -> int:
    """Count the configs on standard input. A user's mistake is the last line of standard error."""
    try:
        costs = [_counted(config) for config in json.load(sys.stdin)]
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps([dataclasses.asdict(cost) for cost in costs]))
    return 0


def _counted(saved: dict[str, Any]) -> Counted:
    from moejax.train import setup
    from moejax.train.cost import budget
    from moejax.train.state import count_parameters

    config = from_dict(saved)
    config.update_from_flattened_dict(_ANYWHERE)
    if config.model.attention == "cudnn":
        config.model.attention = "auto"  # the same products, on any device
    run = setup.prepare(config)
    flops, per_row = budget.train_flops(run), run.task.units.tokens_per_row
    share = budget.routed_share(run.task.model, per_row, train=True)
    return Counted(
        total_params=count_parameters(run.abstract_state.params),
        active_flops=flops.fixed + flops.per_pair * share * _nominal_pairs(run.task.model),
        tokens_per_row=per_row,
    )


def _nominal_pairs(model: Any) -> float:
    """(token, expert) pairs of a token that reaches all layers: the gate's slots at factor 1.

    That is k for token choice, the target mean for gates with a varying number, and all columns of
    a mixing gate, which has no slots.
    """
    if not model.num_moe_layers:
        return 0.0
    experts = model.moe.num_experts
    columns = model.gate.columns(experts)
    if GateTraits.of(model.gate).mixes:
        return model.num_moe_layers * columns
    tokens = 1000 * experts
    slots = model.gate.capacity(tokens, experts, 1.0)
    return model.num_moe_layers * min(slots * experts / tokens, columns)


if __name__ == "__main__":
    sys.exit(main())

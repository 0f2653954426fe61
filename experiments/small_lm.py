"""The model that the experiments share: configs/lm.py in small, for runs of a few hundred steps.

Two layers of width 96 on 200 batches of 16 x 128 bytes; ten seconds of training on two idle cores.
Training is dropless, so that a gate is not judged by what a capacity drops, and one routed expert
of width 256, two of 128 or four of 64 cost what the dense feed-forward layer costs.

The setting ``longer`` of an experiment's argument multiplies the steps and is meant for results
that one wants to rely on: `:longer=5,seeds=5`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from moejax.config import Config, choose, default

Variant = dict[str, Any]

STEPS, SEEDS = 200, 3
WIDTH = 256
"""Of the dense feed-forward layer, and of the routed experts of a token together."""


def small_lm(longer: int = 1, transport: str = "dropless") -> Config:
    """The config that every variant starts from."""
    config = default()
    config.update_from_flattened_dict(
        {
            "model.d_model": 96,
            "model.num_layers": 2,
            "model.d_ff": WIDTH,
            "moe.d_ff": WIDTH,
            "moe.transport": transport,
            "optim.learning_rate": 6e-3,
            "optim.warmup_steps": 20,
            "train.steps": STEPS * longer,
            "train.log_every": 5,
            "train.eval_every": STEPS * longer // 4,
            "train.eval_rows": 256,
            "train.checkpoint_every": STEPS * longer // 2,
        }
    )
    return config


def chosen(variants: Mapping[str, Variant], only: str, seeds: int) -> Iterator[Variant]:
    """The variants as `sweep()` yields them; ``only`` names some, as only=switch+base."""
    for name in only.split("+") if only else variants:
        yield {"name": name, "seeds": seeds, **choose("only", name, variants)}


def compared(baseline: str, only: str, match: str | None = "active_flops") -> dict[str, Any]:
    """What `comparison()` says: the baseline and what is matched; nothing if ``only`` omits it."""
    if only and baseline not in only.split("+"):
        return {}
    return {"match": match, "baseline": baseline}

"""Six gates in a small language model: a first look, in ten minutes.

Question: at this size and length, what held-out loss does each gate reach, and at what cost in
measured FLOPs, time, imbalance and drops?

It makes no claim about which gate is better. Two seeds of a model this small, trained on 0.3 MB,
distinguish what is broken from what works, and little more. Read losses next to costs, because the
variants differ in cost: all sparse ones have the same experts, and hence the same number of
parameters except for the router, but top-2 costs as much as the dense feed-forward layer, the top-1
gates (Switch, BASE, S-BASE) half as much in that layer, and DSelect-k between two experts and all
eight while it is undecided. With slots per sequence of 128 bytes, many of them equal, Switch and
top-2 drop 20 to 30 % of their pairs in training and S-BASE an eighth. This is due to that default
and not to the gate.

    moejax sweep --experiment=experiments/gating_smoke.py --workdir=runs/gating_smoke

Cost: 12 trials of half a minute to a minute each on two idle cores, half of it start-up and
compilation. On shared cores it takes longer, and times say nothing about the gates.

Argument, as key=value,key=value:

    steps  updates per trial (150)
    seeds  seeds per variant (2)
    size   smoke: 2 layers of width 96 (the default); tiny: that of configs/lm.py, 4 of width 192
    only   some of the variants, as only=switch+base

A longer version is `:size=tiny,steps=1000,seeds=5`, 30 trials of about ten minutes each on two
cores.

BASE and S-BASE assign the tokens of a sequence (or of the batch) jointly in training, so that a
token's output depends on later tokens; their evaluation is causal. Metrics, table, CSV and picture
carry this mark.
"""

from collections.abc import Iterator
from typing import Any

from experiments.small_lm import TOP_1
from moejax.config import Config, choose, default, parse_arg

VARIANTS: dict[str, dict[str, Any]] = {
    "dense_ffn": {"moe.every": 0},
    "top_2": {"moe.gate.name": "top_k"},
    "switch": TOP_1,
    "base": {"moe.gate.name": "base"},
    "sbase": {"moe.gate.name": "sbase"},
    "dselect_k": {"moe.gate.name": "dselect_k", "moe.transport": "dropless"},
}
"""DSelect-k is dropless because, undecided, it sends a token to more experts than cells hold."""

SIZES: dict[str, dict[str, Any]] = {
    "smoke": {
        "model.d_model": 96,
        "model.num_layers": 2,
        "model.d_ff": 256,
        "moe.d_ff": 128,
        "optim.learning_rate": 6e-3,
        "optim.warmup_steps": 20,
        "train.eval_rows": 128,
    },
    "tiny": {},  # the defaults
}


def _options(arg: str | None) -> Any:
    return parse_arg(arg, steps=150, seeds=2, size="smoke", only="")


def get_config(arg: str | None = None) -> Config:
    options = _options(arg)
    config = default()
    config.update_from_flattened_dict(choose("size", options.size, SIZES))
    config.train.steps = options.steps
    config.train.log_every = 5
    config.train.eval_every = max(options.steps, 1)  # at the end
    config.train.checkpoint_every = 50
    return config


def sweep(arg: str | None = None) -> Iterator[dict[str, Any]]:
    options = _options(arg)
    for name in options.only.split("+") if options.only else VARIANTS:
        yield {"name": name, "seeds": options.seeds, **choose("only", name, VARIANTS)}

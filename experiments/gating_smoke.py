"""Six ways to choose experts, one small language model: a first look, in a quarter of an hour.

Question: at this size and length, what held-out loss does each gate reach, and at what cost in
measured FLOPs, time, imbalance and drops?

Claim: none about which gate is better. Two seeds of a model this small, trained on 0.3 MB, tell
apart what is broken from what works, and little more; the loss of a gate is to be read beside its
cost, because the variants differ in it. Every sparse variant has the same experts, hence the same
number of parameters but for the router. Top-2 costs what the dense feed-forward network costs,
top-1 gates (Switch, BASE, S-BASE) half of its feed-forward part, DSelect-k between two experts and
all eight while it decides.

    moejax sweep --experiment=experiments/gating_smoke.py --workdir=runs/gating_smoke

Cost: 12 trials of about a minute each on two cores, half of it start-up and compilation.

Argument, as key=value,key=value:

    steps  updates per trial (150)
    seeds  seeds per variant (2)
    size   smoke: 2 layers of width 96 (the default); tiny: that of configs/lm.py, 4 of width 192
    only   some of the variants, as only=switch+base

A run to take more seriously: `:size=tiny,steps=1000,seeds=5`, about seven hours on two cores.

BASE and S-BASE assign a sequence's (or batch's) tokens together in training, so there a token's
output depends on later tokens; their evaluation is causal. Table, CSV and figure carry the mark.
"""

from collections.abc import Iterator
from typing import Any

from moejax.config import Config, choose, default, parse_arg

VARIANTS: dict[str, dict[str, Any]] = {
    "dense_ffn": {"moe.every": 0},
    "top_2": {"moe.gate.name": "mixtral"},
    "switch": {"moe.gate.name": "switch"},
    "base": {"moe.gate.name": "base"},
    "sbase": {"moe.gate.name": "sbase"},
    "dselect_k": {"moe.gate.name": "dselect_k", "moe.transport": "dropless"},
}
"""An undecided DSelect-k sends a token to many experts, for which cells would have no room."""

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

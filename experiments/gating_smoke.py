"""Six ways to choose experts, one small language model: a first look, in ten minutes.

Question: at this size and length, what held-out loss does each gate reach, and at what cost in
measured FLOPs, time, imbalance and drops?

Claim: none about which gate is better. Two seeds of a model this small, trained on 0.3 MB,
tell what is broken from what works, and little more. Read a loss beside its cost, because the
variants differ in it: every sparse one has the same experts, hence the same number of parameters
but for the router; top-2 costs what the dense feed-forward layer costs, the top-1 gates (Switch,
BASE, S-BASE) half as much in that layer, DSelect-k between two experts and all eight while it
decides. With slots per sequence of 128 bytes, many of them equal, Switch and top-2 drop 20 to 30 %
of their pairs in training and S-BASE an eighth, which is the price of that default and not of the
gate.

    moejax sweep --experiment=experiments/gating_smoke.py --workdir=runs/gating_smoke

Cost: 12 trials of half a minute to a minute each on two idle cores, half of it start-up and
compilation. Beside other work it takes longer, and the times say nothing about the gates.

Argument, as key=value,key=value:

    steps  updates per trial (150)
    seeds  seeds per variant (2)
    size   smoke: 2 layers of width 96 (the default); tiny: that of configs/lm.py, 4 of width 192
    only   some of the variants, as only=switch+base

For longer: `:size=tiny,steps=1000,seeds=5`, 30 trials of some ten minutes each on two cores.

BASE and S-BASE assign tokens of a sequence (or of the batch) together in training, where a token's
output therefore depends on later tokens; their evaluation is causal. Rows, table, CSV and picture
carry the mark.
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

"""The small language model of the experiments, for runs of a few hundred steps.

A smaller version of configs/lm.py: two layers of width 96 on 200 batches of 16 x 128 bytes, ten
seconds of training on two idle cores. Training is dropless, so that a gate is not judged by what a
capacity drops. One routed expert of width 256, two of 128 or four of 64 cost as much as the dense
feed-forward layer.

For reliable results, multiply the steps with ``longer`` in an experiment's argument:
`:longer=5,seeds=5`.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from moejax.config import Config, choose, default, parse_arg

Variant = dict[str, Any]

STEPS, SEEDS = 200, 3
WIDTH = 256
"""Hidden width of the dense feed-forward layer, and total width of a token's routed experts."""


TOP_1: Variant = {
    "moe.gate.name": "top_k",
    "moe.gate.k": 1,
    "moe.gate.renormalize": False,
    "moe.gate.jitter": 0.01,
}
"""Switch's gate, with the capacity and losses of the page instead of Switch's own."""


def small_lm(longer: int = 1) -> Config:
    """The config from which every variant starts."""
    config = default()
    config.update_from_flattened_dict(
        {
            "model.d_model": 96,
            "model.num_layers": 2,
            "model.d_ff": WIDTH,
            "moe.d_ff": WIDTH,
            "moe.transport": "dropless",
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


@dataclasses.dataclass(frozen=True)
class Question:
    """Variants of the small model and their comparison: the functions of an experiment page.

    In their argument, ``longer`` multiplies the steps, ``seeds`` is the number of seeds,
    ``baseline`` names a variant, and ``only`` selects variants, as only=switch+base.
    """

    variants: Mapping[str, Variant]
    baseline: str
    match: str | None = "active_flops"

    def get_config(self, arg: str | None = None) -> Config:
        return small_lm(self._options(arg).longer)

    def sweep(self, arg: str | None = None) -> Iterator[Variant]:
        options = self._options(arg)
        for name in options.only.split("+") if options.only else self.variants:
            variant = choose("only", name, self.variants)
            yield {"name": name, "seeds": options.seeds, **variant}

    def comparison(self, arg: str | None = None) -> dict[str, Any]:
        """The baseline and the matched cost; empty if the baseline is not among the variants."""
        options = self._options(arg)
        if options.only and options.baseline not in options.only.split("+"):
            return {}
        return {"match": self.match, "baseline": options.baseline}

    def _options(self, arg: str | None) -> Any:
        return parse_arg(arg, longer=1, seeds=SEEDS, only="", baseline=self.baseline)

"""A model's description, as JSON and as text."""

import dataclasses
from typing import Any

import numpy as np

from moejax.inspection import counts, weights
from moejax.inspection.stored import Model, part
from moejax.train.cost import units


@dataclasses.dataclass(frozen=True)
class Description:
    """Everything that ``moejax inspect`` shows."""

    model: Model
    parts: dict[str, counts.Count]
    router_norms: dict[int, list[float]]
    similarities: dict[int, weights.Similarity]

    def json(self) -> dict[str, Any]:
        """A JSON object. Layers are counted from 0."""
        model, everything = self.model, counts.total(self.parts)
        return {
            "name": model.name,
            **model.about,
            "experts_per_token": model.k,
            "num_experts": model.num_experts,
            "parameters": {"total": everything.total, "active": everything.active},
            "parts": {name: count._asdict() for name, count in self.parts.items()},
            "arrays": {
                x.path: {"part": part(x), "shape": list(x.shape), "dtype": x.dtype}
                for x in model.arrays
            },
            "router_norms": {str(layer): norms for layer, norms in self.router_norms.items()},
            "expert_similarity": {
                str(layer): {"mean": s.mean, "most": s.most, "pair": list(s.pair)}
                for layer, s in self.similarities.items()
            },
        }

    def lines(self, arrays: bool = False) -> list[str]:
        """The description for a terminal; with ``arrays`` also every array."""
        model, everything = self.model, counts.total(self.parts)
        lines = [model.name, *(f"{key:<16} {value}" for key, value in model.about.items() if value)]
        if model.k:
            lines.append(f"{'experts':<16} {model.k} of {model.num_experts} per token and layer")
        lines.append(f"{'types':<16} {', '.join(sorted({x.dtype for x in model.arrays}))}")
        lines += ["", f"{'parameters':<16} {'total':>10} {'active':>10}"]
        for name, count in {**self.parts, "all": everything}.items():
            shown = (units.count(count.total), units.count(count.active))
            lines.append(f"{name:<16} {shown[0]:>10} {shown[1]:>10}")
        if self.router_norms:
            lines += [
                "",
                "layer   router rows: least  mean  most   experts' cosine: mean  most (pair)",
            ]
            lines += [self._layer(layer) for layer in self.router_norms]
        elif self.similarities:
            lines += ["", "layer   experts' cosine: mean  most (pair)"]
            lines += [f"{layer:>5}   {_cosines(s)}" for layer, s in self.similarities.items()]
        if arrays:
            width = max(len(x.path) for x in model.arrays)
            lines += ["", *(f"{x.path:<{width}}  {x.dtype}{list(x.shape)}" for x in model.arrays)]
        return lines

    def _layer(self, layer: int) -> str:
        norms = np.asarray(self.router_norms[layer])
        text = f"{layer:>5} {norms.min():>19.3f} {norms.mean():>5.3f} {norms.max():>5.3f}"
        own = self.similarities.get(layer)
        return text if own is None else f"{text} {_cosines(own):>38}"


def _cosines(own: weights.Similarity) -> str:
    return f"{own.mean:.4f} {own.most:.4f} ({own.pair[0]}, {own.pair[1]})"


def describe(model: Model, weights_too: bool = True) -> Description:
    """Describes a model; without ``weights_too`` no weight is read.

    Raises:
      UserError: an array cannot be read.
    """
    norms = weights.router_norms(model) if weights_too else {}
    similar = dict(weights.similarities(model)) if weights_too else {}
    return Description(
        model, counts.by_part(model), {i: x.tolist() for i, x in norms.items()}, similar
    )

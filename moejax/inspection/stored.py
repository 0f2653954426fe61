"""Arrays in files, described, and read in slices."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from moejax.train.parameters import GATE_NODES, in_gate, split_name

Index = tuple[int | slice, ...]
"""Places on the leading axes of an array; the other axes are whole."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """A parameter that lies in files.

    ``path``: its path below the parameters, such as ``periods/blocks/0/ffn/up_EDF``; parameters of
    ``periods`` lead with an axis of periods. ``dtype``: its type in the files. ``read``: the values
    at an index, of any float type.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[Index], np.ndarray]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nodes(self) -> list[str]:
        return self.path.split("/")

    @property
    def name(self) -> str:
        return self.nodes[-1]

    @property
    def letters(self) -> str:
        """The letters of the trailing axes."""
        return split_name(self.name)[1]


class Model(NamedTuple):
    """The arrays of a model, and what they do not say.

    ``k``: the experts that a token visits, of ``num_experts``; 0 for a dense model. ``heads``: the
    share of a mixture of attention heads that a token visits.
    """

    name: str
    arrays: list[Stored]
    k: int
    num_experts: int
    heads: float
    about: dict[str, Any]


PARTS = (
    "embedding", "attention", "router", "experts", "shared experts", "dense FFN", "norms", "head",
    "other",
)  # fmt: skip


def part(stored: Stored) -> str:
    """The part of the model that a parameter belongs to, one of ``PARTS``."""
    nodes, name = stored.nodes[:-1], stored.name
    if in_gate(stored.nodes) or not GATE_NODES.isdisjoint(nodes):
        return "router"
    if "shared" in nodes:
        return "shared experts"
    if any(node == "norm" or node.endswith("_norm") for node in nodes):
        return "norms"
    if "attention" in nodes:
        return "attention"
    if "ffn" in nodes or "experts" in nodes:
        return "experts" if stored.letters.startswith("E") else "dense FFN"
    if "embed" in name:
        return "embedding"
    return "head" if name.startswith("head") else "other"


@dataclasses.dataclass(frozen=True)
class InLayer:
    """A parameter of one layer: the array and the place of the layer on its leading axis."""

    stored: Stored
    leading: Index

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape[len(self.leading) :]

    def read(self, index: Index = ()) -> np.ndarray:
        """float32 values, of the whole parameter or at an index of it."""
        return np.asarray(self.stored.read((*self.leading, *index)), np.float32)


def by_layer(arrays: list[Stored]) -> dict[int, dict[str, InLayer]]:
    """The parameters of each layer, counted from 0, by their paths below the layer."""
    first = {int(x.nodes[1]) for x in arrays if x.nodes[0] == "first"}
    repeated = [x for x in arrays if x.nodes[:2] == ["periods", "blocks"]]
    period = 1 + max((int(x.nodes[2]) for x in repeated), default=0)
    layers: dict[int, dict[str, InLayer]] = {}
    for x in arrays:
        if x.nodes[0] == "first":
            below, places = "/".join(x.nodes[2:]), {int(x.nodes[1]): ()}
        elif x in repeated:
            below, place = "/".join(x.nodes[3:]), int(x.nodes[2])
            places = {len(first) + period * i + place: (i,) for i in range(x.shape[0])}
        else:
            continue
        for layer, leading in places.items():
            layers.setdefault(layer, {})[below] = InLayer(x, leading)
    return dict(sorted(layers.items()))

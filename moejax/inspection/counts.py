"""Numbers of parameters, by part, in all and for one token."""

from typing import NamedTuple

from moejax.inspection.stored import PARTS, Model, Stored, part
from moejax.train.parameters import HEAD_MATRICES


class Count(NamedTuple):
    """Parameters of a part, and those of them that a token uses."""

    total: int
    active: int


def by_part(model: Model) -> dict[str, Count]:
    """The parts that the model has. A token uses k experts of each layer, and its own heads of a
    mixture; everything else is used by every token, the whole embedding too."""
    counts: dict[str, Count] = {}
    for name in PARTS:
        own = [x for x in model.arrays if part(x) == name]
        if own:
            counts[name] = Count(sum(x.size for x in own), sum(_active(model, x) for x in own))
    return counts


def total(counts: dict[str, Count]) -> Count:
    """The sum over parts."""
    return Count(sum(c.total for c in counts.values()), sum(c.active for c in counts.values()))


def _active(model: Model, stored: Stored) -> int:
    if part(stored) == "experts":
        return stored.size * model.k // model.num_experts
    if stored.name in HEAD_MATRICES:
        return round(stored.size * model.heads)
    return stored.size

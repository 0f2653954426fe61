"""The plan of a conversion: each tensor of theirs beside the pieces of our arrays that it holds."""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from moejax.hf.families.family import Family
from moejax.hf.rows import GATE_STATE, Row
from moejax.options import StackOptions
from moejax.train.checkpoint.pieces import Index


@dataclasses.dataclass(frozen=True)
class Place:
    """A piece of an array of our checkpoint: its trailing axes at ``index``."""

    array: str
    index: Index
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Copy:
    """A tensor of theirs, or the part of it that belongs to one expert, and its places in ours."""

    theirs: str
    row: Row
    places: tuple[Place, ...]
    expert: int | None = None
    """The number of the expert in a tensor that leads with experts."""
    experts: int = 0
    """The number of experts in that tensor."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole tensor."""
        own = self.row.shape([place.shape for place in self.places])
        return own if self.expert is None else (self.experts, *own)


@dataclasses.dataclass(frozen=True)
class Plan:
    """All copies of a conversion, in the order of the family's table.

    ``leading``: the axes of each of our arrays that index its pieces.
    """

    copies: tuple[Copy, ...]
    leading: dict[str, int]

    def tensors(self) -> dict[str, list[Copy]]:
        """The copies by tensor of theirs."""
        grouped: dict[str, list[Copy]] = {}
        for copy in self.copies:
            grouped.setdefault(copy.theirs, []).append(copy)
        return grouped


def plan(family: Family, model: StackOptions, arrays: Mapping[str, Any]) -> Plan:
    """The plan for a model of ours.

    Args:
      arrays: of its checkpoint, with their shapes, by path.

    Raises:
      ValueError: the family's table has no row for a parameter, naming it.
    """
    rows = [dataclasses.replace(row, theirs=family.prefix + row.theirs) for row in family.rows]
    copies = [copy for row in rows for copy in _copies(row, model, arrays)]
    leading: dict[str, int] = {}
    found: Counter[str] = Counter()
    for copy in copies:
        for place in copy.places if not copy.row.zeros else ():
            leading[place.array] = len(place.index)
            found[place.array] += 1
    for name, x in arrays.items():
        if not name.startswith(("params/", GATE_STATE)):
            continue
        pieces = math.prod(x.shape[: leading.get(name, 0)])
        if name.startswith("params/") and found[name] != pieces:
            raise ValueError(f"{family.model_type} has no tensor for {name.partition('/')[2]}")
    return Plan(tuple(copies), leading)


def _copies(row: Row, model: StackOptions, arrays: Mapping[str, Any]) -> Iterator[Copy]:
    if "{layer}" not in row.theirs:
        places = _places(row, "params/", (), arrays)
        if places:
            yield Copy(row.theirs, row, places)
        return
    sparse = [i for i in range(model.num_layers) if model.is_sparse(i)]
    for layer in range(model.num_layers):
        prefix, index = _layer(model, layer)
        if row.ours[0].startswith(GATE_STATE):
            if layer not in sparse:
                continue
            prefix, index = "", (sparse.index(layer),)
        if row.zeros and layer not in sparse:
            continue
        yield from _of_layer(row, row.theirs.replace("{layer}", str(layer)), prefix, index, arrays)


def _of_layer(
    row: Row, theirs: str, prefix: str, index: Index, arrays: Mapping[str, Any]
) -> Iterator[Copy]:
    if not row.of_experts:
        places = _places(row, prefix, index, arrays)
        if places:
            yield Copy(theirs, row, places)
        return
    known = arrays.get(prefix + row.ours[0])
    count = known.shape[len(index)] if known is not None else 0
    for expert in range(count):
        places = _places(row, prefix, (*index, expert), arrays)
        name = theirs.replace("{expert}", str(expert))
        if row.stacked:
            yield Copy(name, row, places, expert, count)
        else:
            yield Copy(name, row, places)


def _places(row: Row, prefix: str, index: Index, arrays: Mapping[str, Any]) -> tuple[Place, ...]:
    """The row's places; none if the model does not have its parameters."""
    known = [prefix + name for name in row.ours if prefix + name in arrays]
    lacking = row.beside and prefix + row.beside not in arrays
    if len(known) < len(row.ours) or lacking or prefix + row.instead in arrays:
        return ()
    return tuple(Place(name, index, tuple(arrays[name].shape[len(index) :])) for name in known)


def _layer(model: StackOptions, layer: int) -> tuple[str, Index]:
    """The path of a layer's parameters, and its place in their leading axis."""
    if layer < model.first_dense:
        return f"params/first/{layer}/", ()
    period, place = divmod(layer - model.first_dense, model.period)
    return f"params/periods/blocks/{place}/", (period,)

"""Reading the collectives out of a compiled program's text."""

import math
import re
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh

KINDS = (
    "all-gather", "all-reduce", "all-to-all", "collective-broadcast", "collective-permute",
    "ragged-all-to-all", "reduce-scatter",
)  # fmt: skip
_OP = re.compile(rf"= (.+?) ({'|'.join(KINDS)})(?:-start)?\((.*)$")
_IOTA, _ORDER = r"\[([0-9,]+)\]", r"(?:T\(([0-9,]+)\))?"
_SHAPE = re.compile(r"([a-z]+[0-9]*)\[([0-9,]*)\]")


class Collective(NamedTuple):
    """A collective instruction: what it is, between whom, and the shapes of its results."""

    kind: str
    axes: frozenset[str]
    """Mesh axes along which its participants differ; empty for groups of one device."""
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Elements of each result, on one device."""
        return tuple(math.prod(shape) for shape in self.shapes)


def collectives(text: str | None, mesh: Mesh) -> list[Collective]:
    """Every collective of a compiled program once, however often a loop around it runs."""
    assert text is not None, "this platform does not show its programs"
    found = []
    for line in text.splitlines():
        match = _OP.search(line)
        if not match:
            continue
        result, kind, rest = match.groups()
        shapes = [(d, tuple(map(int, dims.split(","))) if dims else ()) for d, dims in
                  _SHAPE.findall(result)]  # fmt: skip
        dtypes, dims = zip(*shapes, strict=True)
        found.append(Collective(kind, _axes(_groups(rest, mesh.size), mesh), dtypes, dims))
    return found


def _groups(attributes: str, devices: int) -> list[list[int]]:
    """The groups of device numbers that take part together, in whichever form XLA writes them."""
    pairs = re.search(r"source_target_pairs=\{(\{.*?\})\}", attributes)
    listed = pairs or re.search(r"replica_groups=\{(\{.*?\})\}", attributes)
    if listed:  # {{0,1},{2,3}}
        return [[int(i) for i in g.split(",")] for g in re.findall(r"\{([0-9,]+)\}", listed[1])]
    iota = re.search(rf"replica_groups={_IOTA}<={_IOTA}{_ORDER}", attributes)
    if iota:  # [2,2]<=[4]: so many groups of so many out of 0, 1, 2, ...
        return _numbers(iota[2], iota[3]).reshape(_ints(iota[1])).tolist()
    named = re.search(
        rf"replica_groups=mesh\[(.*?)\](?:, device_ids=\({_IOTA}{_ORDER}\))? \{{(.*?)\}}",
        attributes,
    )
    if named:  # mesh['a'=2,'b'=4] {'b'}: groups along the named axes
        axes = re.findall(r"'(\w+)'=(\d+)", named[1])
        shape = [int(size) for _, size in axes]
        along = [i for i, (name, _) in enumerate(axes) if f"'{name}'" in named[4]]
        numbers = _numbers(named[2] or str(math.prod(shape)), named[3]).reshape(shape)
        last = np.moveaxis(numbers, along, range(-len(along), 0))
        return last.reshape(-1, math.prod(shape[i] for i in along)).tolist()
    assert "replica_groups={}" in attributes, f"replica groups not understood: {attributes}"
    return [list(range(devices))]


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(i) for i in text.split(","))


def _numbers(shape: str, order: str | None) -> np.ndarray:
    """0, 1, 2, ... in the given shape, transposed, flat."""
    numbers = np.arange(math.prod(_ints(shape))).reshape(_ints(shape))
    return (numbers.transpose(_ints(order)) if order else numbers).reshape(-1)


def _axes(groups: list[list[int]], mesh: Mesh) -> frozenset[str]:
    coordinates = np.stack(np.unravel_index(np.arange(mesh.size), mesh.devices.shape), axis=1)
    differ = np.zeros(len(mesh.axis_names), bool)
    for group in groups:
        differ |= (coordinates[group] != coordinates[group[0]]).any(axis=0)
    return frozenset(n for n, d in zip(mesh.axis_names, differ, strict=True) if d)

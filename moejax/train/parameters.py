"""Parameter names: the only reader of the axis letters at their ends and of the nodes above them.

A parameter's name ends in one upper-case letter per axis: ``up_EDF`` has the stem ``up`` and the
axes E, D, F. Sharding, weight decay, Muon, Adafactor, the count of active parameters and the
router cosines of the probe all follow from the names, through this module.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from moejax.types import ExpertWeights

STACKED = "periods"
"""Weights below this node lead with an axis of layers."""
ROUTER = "router"
"""The node below which a layer keeps its gate's parameters."""
GATE_NODES = frozenset({"router", "gate"})
GATE_STEMS = frozenset({"residual", "residual_bias", "shared_gate"})
"""Parameters that weigh outputs against each other: everything below a node of `GATE_NODES`, and
the parameters with these stems beside a layer's experts."""
STACKS = "EM"
"""Letters of experts and tasks. They lead where each expert or task has weights of its own."""

EXPERT_WEIGHTS = (*ExpertWeights._fields, "down_bias_ED")
"""The weights and biases of routed experts."""
HEAD_MATRICES = ("query_EDI", "out_EID")
"""The weights that each head of a mixture of attention heads has for itself."""


def path_names(path: Sequence[Any]) -> list[str]:
    """The names along a path of JAX's tree utilities."""
    return [str(getattr(key, "key", getattr(key, "name", key))) for key in path]


def split_name(name: str) -> tuple[str, str]:
    """Stem and axis letters: ``"up_EDF" -> ("up", "EDF")``, ``"logit_scale" -> (..., "")``."""
    stem, _, letters = name.rpartition("_")
    if stem and letters.isalpha() and letters.isupper():
        return stem, letters
    return name, ""


class Parameter(NamedTuple):
    """The properties of a parameter that follow from its path and its number of axes."""

    stem: str
    """The name without its axis letters."""
    letters: str
    """The letters of the trailing axes. Stacked layers (and gates) lead and have no letter. A name
    without letters stands for a vector or, from two axes on, for matrices in the last two."""
    is_gate: bool
    """True if it belongs to a gate or weighs what experts give (see ``GATE_STEMS``)."""

    @property
    def own_axes(self) -> tuple[int, ...]:
        """The axes, counted from the end, that belong to one layer and one expert or task."""
        leads = not (self.is_gate or "embed" in self.stem) and self.letters[:1] in tuple(STACKS)
        return tuple(range(-len(self.letters) + leads, 0))

    @property
    def sides(self) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """The axes of a matrix's rows and columns; None for vectors and biases.

        Heads and their width are one side: ``query_DHI`` is D x HI, ``out_HID`` is HI x D. A rank R
        is a side too: ``key_RHI`` is R x HI.
        """
        own = self.own_axes
        if len(own) < 2 or self.stem.endswith("_bias"):
            return None
        first = 1 if self.letters[own[0]] in "DR" else len(own) - 1
        return own[:first], own[first:]

    @property
    def decays(self) -> bool:
        """True if weight decay applies: to matrices, but no gate's, and no norm or bias by name."""
        return self.sides is not None and not self.is_gate and self.stem not in ("scale", "bias")

    @property
    def orthogonal(self) -> bool:
        """True if Muon orthogonalises it: a matrix that decays and has no vocabulary axis."""
        return self.decays and "embed" not in self.stem and "V" not in self.letters

    def letters_of(self, axes: tuple[int, ...]) -> str:
        """The letters of these axes."""
        return "".join(self.letters[axis] for axis in axes)


def parameter(path: Sequence[Any], leaf: Any) -> Parameter:
    """The parameter at a path; only the shape of ``leaf`` is read."""
    names = path_names(path)
    *nodes, name = names or [""]
    stem, letters = split_name(name)
    if not letters or len(letters) > leaf.ndim:
        # The gates of several tasks are stacked too.
        stacked = STACKED in nodes or {"mixture", ROUTER} <= set(nodes)
        stem, letters = name, "DF"[: leaf.ndim - stacked]
    return Parameter(stem, letters, in_gate(names))


def in_gate(names: Sequence[str]) -> bool:
    """True if the names of a path lead to a gate's parameter, or to optimizer state of one."""
    stems = (name.rpartition("_")[0] for name in names)
    return not (GATE_NODES.isdisjoint(names) and GATE_STEMS.isdisjoint(stems))


def size(shape: tuple[int, ...], axes: tuple[int, ...]) -> int:
    """The number of elements that these axes span."""
    return math.prod(shape[axis] for axis in axes)

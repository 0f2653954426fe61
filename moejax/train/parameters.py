"""The rule that a parameter's place and name set: what is one matrix of it, and who treats it."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

STACKED = "periods"
"""Weights below this name lead with an axis of layers."""
GATE_NODES = frozenset({"router", "gate"})
GATE_STEMS = frozenset({"residual", "residual_bias", "shared_gate"})
"""What weighs outputs against each other: everything below a node of these names, and in a layer
beside its experts the parameters of these names."""
STACKS = "EM"
"""Letters of experts and tasks, which lead where each has weights of its own."""


class Rule(NamedTuple):
    """What a parameter's path and shape say about it."""

    stem: str
    """The leaf's name without its axis letters."""
    letters: str
    """Its trailing axes: the upper-case letters after the last ``_``, as in ``up_EDF``. Stacked
    layers (and gates) lead and have no letter. A name without letters stands for a vector or, from
    two axes on, for matrices in the last two."""
    is_gate: bool
    """A gate's own parameter, or another that weighs what experts give (see ``GATE_STEMS``)."""

    @property
    def own(self) -> tuple[int, ...]:
        """The axes, counted from the end, of what belongs to one layer and one expert or task."""
        leads = not (self.is_gate or "embed" in self.stem) and self.letters[:1] in tuple(STACKS)
        return tuple(range(-len(self.letters) + leads, 0))

    @property
    def sides(self) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """The axes of a matrix's rows and columns; None for vectors.

        Heads and their width are one side: ``query_DHI`` is D x HI, ``out_HID`` is HI x D.
        """
        own = self.own
        if len(own) < 2:
            return None
        first = 1 if self.letters[own[0]] == "D" else len(own) - 1
        return own[:first], own[first:]

    @property
    def is_weight(self) -> bool:
        """A matrix of weights that no gate decides with, and no norm or bias by name."""
        return self.sides is not None and not self.is_gate and self.stem not in ("scale", "bias")

    @property
    def decays(self) -> bool:
        """Weight decay applies: to weight matrices and embeddings."""
        return self.is_weight

    @property
    def orthogonal(self) -> bool:
        """Muon orthogonalises it: weights without a vocabulary axis, embeddings left out."""
        return self.is_weight and "embed" not in self.stem and "V" not in self.letters

    def letter(self, axes: tuple[int, ...]) -> str:
        """The letters of these axes."""
        return "".join(self.letters[axis] for axis in axes)


def rule(path: tuple[Any, ...], leaf: Any) -> Rule:
    """The rule of the parameter at ``path``; of ``leaf`` only the shape is read."""
    names = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
    *nodes, name = names or [""]
    stem, _, letters = name.rpartition("_")
    if not (stem and letters.isalpha() and letters.isupper() and len(letters) <= leaf.ndim):
        # The gates of several tasks are stacked too.
        stacked = STACKED in nodes or {"mixture", "router"} <= set(nodes)
        stem, letters = name, "DF"[: leaf.ndim - stacked]
    return Rule(stem, letters, in_gate(names))


def in_gate(names: Sequence[str]) -> bool:
    """Whether the names of a path lead to a gate's parameter, or to what is known of one."""
    stems = (name.rpartition("_")[0] for name in names)
    return not (GATE_NODES.isdisjoint(names) and GATE_STEMS.isdisjoint(stems))


def size(shape: tuple[int, ...], axes: tuple[int, ...]) -> int:
    """How many numbers these axes hold."""
    return math.prod(shape[axis] for axis in axes)

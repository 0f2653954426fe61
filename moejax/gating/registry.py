"""Gates by name: the table, and what ``make`` builds from it.

A new gate is one file and one line in ``GATES``. A gate's module is imported when it is first asked
for, so that the table costs nothing.
"""

import dataclasses
import importlib
import typing
from collections.abc import Mapping
from typing import Any

from moejax.errors import UserError, suggest
from moejax.gating.presets import CELLS, PRESETS, UNBALANCED
from moejax.types import Gate, GateTraits


@dataclasses.dataclass(frozen=True)
class Entry:
    """A gate's "module:Class" below ``moejax.gating``, and the settings around it.

    ``moe``: values of other ``moe.*`` fields. ``source``: where they are from, if the gate's own
    page does not have it.
    """

    target: str
    moe: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    source: str = ""


OF_SEQUENCES = {"transport": "dropless", "balance_scope": "batch"}
"""For gates that route whole sequences: a sequence loads few experts, and cannot be balanced."""

OF_SHAZEER = {
    "transport": "dropless",
    "balance_scope": "batch",
    "losses.load_balance": 0.0,
    "losses.importance": 0.1,
    "losses.load": 0.1,
    "losses.z": 0.0,
}
"""Shazeer et al., arXiv 1701.06538: nothing is dropped; both losses over a batch, with weight 0.1
(appendix C.1)."""

GATES: dict[str, Entry] = {
    # Token choice.
    "top_k": Entry("top_k:TopK"),
    "prototypes": Entry("prototypes:Prototypes"),
    "gating_dropout": Entry(
        "gating_dropout:GatingDropout", {"transport": "dropless", "balance_scope": "batch"}
    ),
    "loss_free": Entry("loss_free:LossFree", UNBALANCED),
    "quantile": Entry("quantile:Quantile", {"losses.load_balance": 0.0}),
    "shazeer": Entry("noisy_top_k:NoisyTopK", OF_SHAZEER),
    "hierarchical": Entry("hierarchical:Hierarchical", OF_SHAZEER),
    "gshard": Entry(
        "gshard:GShard",
        {
            **CELLS,
            "capacity_factor": 1.0,
            "priority": "choice",
            "balance_scope": "group",
            "losses.load_balance": 0.01,
            "losses.z": 0.0,
        },
        source="Lepikhin et al. (GShard, algorithm 1; weight of the loss as in Mesh TensorFlow), "
        "arXiv 2006.16668",
    ),
    "sparsemixer": Entry("sparsemixer:SparseMixer", {"transport": "dropless"}),
    "xmoe": Entry("xmoe:XMoE", {"losses.z": 0.0}),
    "stablemoe": Entry("stablemoe:StableMoE", {"capacity_factor": 2.0, **UNBALANCED}),
    "rl": Entry("rl:RL", {"losses.policy": 0.1, "losses.baseline": 0.01}),
    # Token choice of any number of experts.
    "dense": Entry("dense:Dense", {"transport": "all_experts", "losses.load_balance": 0.0}),
    "dselect_k": Entry("dselect_k:DSelectK", {"transport": "dropless", **UNBALANCED}),
    "remoe": Entry("remoe:ReMoE", {"transport": "dropless", **UNBALANCED}),
    "evomoe": Entry("evomoe:EvoMoE", {"transport": "dropless"}),
    # Assignments of a whole group.
    "base": Entry("base_layer:Base", UNBALANCED),
    "sbase": Entry("sbase:SBase", UNBALANCED),
    "expert_choice": Entry("expert_choice:ExpertChoice", UNBALANCED),
    # Token ids, tasks, sequences and recordings.
    "hash": Entry("hash:Hash", UNBALANCED),
    "task": Entry("task:Task", OF_SEQUENCES),
    "sentence": Entry("sentence:Sentence", OF_SEQUENCES),
    "replay": Entry("replay:Replay", {"transport": "dropless", **UNBALANCED}),
    # Mixtures of tokens or of experts' weights.
    "soft": Entry("soft:Soft", UNBALANCED),
    "smear": Entry("smear:Smear", UNBALANCED),
    "lory": Entry("lory:Lory", UNBALANCED),
    # Controls without a router.
    "random": Entry("random:Random", UNBALANCED),
    "thor": Entry("thor:Thor", {"transport": "dropless", "losses.consistency": 0.5, **UNBALANCED}),
    "forced": Entry("forced:Forced", UNBALANCED),
}
"""Gates by name."""


def names() -> list[str]:
    """Every name that ``make`` knows, gates and presets, sorted."""
    return sorted({*GATES, *PRESETS})


def classes() -> dict[str, str]:
    """The gates' class names, each with its module."""
    targets = (entry.target.partition(":") for entry in GATES.values())
    return {name: f"moejax.gating.{module}" for module, _, name in targets}


def make(name: str, **overrides: Any) -> Gate:
    """The gate called ``name`` with its preset fields, then ``overrides``.

    Raises:
      UserError: unknown name or field; the message lists the valid ones.
    """
    gate_class, preset = _class(name), _preset_fields(name)
    valid = fields(name)
    for field in overrides:
        if field not in valid:
            raise UserError(f"gate {name!r} has no field {field!r}; {suggest(field, valid)}")
    gate = gate_class(**{**preset, **overrides})
    if not isinstance(gate, Gate):
        methods = [m for m in vars(Gate) if callable(getattr(Gate, m)) and not m.startswith("_")]
        missing = [m for m in (*methods, "trained_by", "__call__") if not hasattr(gate, m)]
        raise UserError(f"gate {name!r} lacks {', '.join(missing)} of moejax.types.Gate")
    try:
        GateTraits.of(gate)
    except ValueError as error:
        raise UserError(str(error)) from error
    return gate


def fields(name: str) -> dict[str, tuple[Any, str]]:
    """The gate's hyper-parameters under this name: field -> (default, comment)."""
    gate_class, preset = _class(name), _preset_fields(name)
    hints = typing.get_type_hints(gate_class, include_extras=True)
    table = {}
    for field in dataclasses.fields(gate_class):
        comment = next(iter(getattr(hints[field.name], "__metadata__", ())), "")
        table[field.name] = (preset.get(field.name, field.default), comment)
    return table


def preset_overrides(name: str) -> dict[str, Any]:
    """Fields outside the gate, relative to ``moe``, that this name sets."""
    known = PRESETS.get(name) or GATES.get(name)
    if known is None:
        _class(name)  # a gate of the user's, or no gate at all
        return {}
    return dict(known.moe)


def loss_weights(name: str) -> dict[str, float]:
    """Weights of the losses in ``info.losses`` that this name sets."""
    prefix = "losses."
    preset = preset_overrides(name).items()
    return {key.removeprefix(prefix): value for key, value in preset if key.startswith(prefix)}


def source(name: str) -> str:
    """The published model of this preset; empty if the gate's own page has it."""
    known = PRESETS.get(name) or GATES.get(name)
    return known.source if known else ""


def _preset_fields(name: str) -> dict[str, Any]:
    return dict(PRESETS[name].fields) if name in PRESETS else {}


def _class(name: str) -> type:
    """The class behind a name of ours, or behind "module:Class"."""
    known = PRESETS[name].gate if name in PRESETS else name
    if known in GATES:
        module_name, _, attribute = GATES[known].target.partition(":")
        return getattr(importlib.import_module(f"moejax.gating.{module_name}"), attribute)
    if ":" not in name:
        raise UserError(f"gate {name!r} is unknown; {suggest(name, names())}")
    module_name, _, attribute = name.partition(":")
    try:
        gate = getattr(importlib.import_module(module_name), attribute)
    except Exception as error:  # the module is the user's program: it may raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"gate {name!r} cannot be imported: {reason}") from error
    if not (dataclasses.is_dataclass(gate) and isinstance(gate, type)):
        raise UserError(f"gate {name!r} must be a dataclass with the moejax.types.Gate protocol")
    return gate

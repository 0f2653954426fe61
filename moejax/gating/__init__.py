"""Gating functions: one per file, chosen by value in code and by name in a config.

``make("switch")`` builds a gate from its name; ``GATES`` is the one table of names. A name is
either a gate or a preset of a published model, which fixes a gate's fields and may also set other
``moe.*`` fields. A gate of your own is any object with the ``moejax.types.Gate`` protocol, named
``"my_package.my_module:MyGate"``.
"""

import dataclasses
import importlib
import typing
from collections.abc import Mapping
from typing import Any

from moejax.errors import UserError, suggest
from moejax.gating.base_layer import Base
from moejax.gating.column_choice import choose_tokens
from moejax.gating.dense import Dense
from moejax.gating.dselect_k import DSelectK
from moejax.gating.evomoe import EvoMoE
from moejax.gating.expert_choice import ExpertChoice
from moejax.gating.expert_groups import limit_groups
from moejax.gating.forced import Forced
from moejax.gating.gating_dropout import GatingDropout
from moejax.gating.gshard import GShard
from moejax.gating.hash import Hash
from moejax.gating.hierarchical import Hierarchical
from moejax.gating.lory import Lory
from moejax.gating.loss_free import LossFree
from moejax.gating.noisy_top_k import NoisyTopK, load_probability
from moejax.gating.ops import top_k_routing
from moejax.gating.prototypes import Prototypes
from moejax.gating.quantile import Quantile, quantile_prices
from moejax.gating.random import Random
from moejax.gating.remoe import ReMoE
from moejax.gating.replay import Replay
from moejax.gating.rl import RL
from moejax.gating.sbase import SBase
from moejax.gating.sentence import Sentence
from moejax.gating.sinkhorn import sinkhorn_bias, sinkhorn_plan
from moejax.gating.smear import Smear
from moejax.gating.soft import Soft
from moejax.gating.solvers.assignment import BalancedAssignment, balanced_assignment
from moejax.gating.solvers.selectors import dselect_k_weights, smooth_step
from moejax.gating.stablemoe import StableMoE
from moejax.gating.tables import balanced_table
from moejax.gating.task import Task
from moejax.gating.thor import Thor
from moejax.gating.top_k import TopK
from moejax.gating.xmoe import XMoE
from moejax.types import Gate

__all__ = [
    "GATES",
    "RL",
    "BalancedAssignment",
    "Base",
    "DSelectK",
    "Dense",
    "EvoMoE",
    "Forced",
    "ExpertChoice",
    "GShard",
    "Hierarchical",
    "Random",
    "ReMoE",
    "GatingDropout",
    "Hash",
    "Lory",
    "LossFree",
    "NoisyTopK",
    "Prototypes",
    "Quantile",
    "Replay",
    "SBase",
    "Smear",
    "Soft",
    "StableMoE",
    "Thor",
    "Sentence",
    "Task",
    "TopK",
    "XMoE",
    "balanced_assignment",
    "balanced_table",
    "choose_tokens",
    "dselect_k_weights",
    "fields",
    "limit_groups",
    "load_probability",
    "loss_weights",
    "make",
    "names",
    "preset_overrides",
    "quantile_prices",
    "sinkhorn_bias",
    "sinkhorn_plan",
    "smooth_step",
    "source",
    "top_k_routing",
]


@dataclasses.dataclass(frozen=True)
class Entry:
    """A name in the table: the gate, the fields it presets, and what else of ``moe`` it sets.

    ``source``: whose published model that is, where the gate's own page does not say.
    """

    gate: type
    preset: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    moe: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    source: str = ""


UNBALANCED = {"losses.load_balance": 0.0, "losses.z": 0.0}
"""For gates that need no loss to balance them, and whose logits need not stay small."""

OF_SEQUENCES = {"transport": "dropless", "balance_scope": "batch"}
"""For gates that route whole sequences: one of them loads few experts, and cannot be balanced."""

CELLS = {"transport": "cells"}
"""For models that drop what exceeds a capacity; they name their factor."""

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
    "top_k": Entry(TopK),
    "switch": Entry(
        TopK,
        {"k": 1, "renormalize": False, "jitter": 0.01},
        moe={
            **CELLS,
            "capacity_factor": 1.25,
            "balance_scope": "batch",
            "losses.load_balance": 0.01,
            "losses.z": 0.0,
        },
        source="Fedus, Zoph, Shazeer (Switch: alpha = 0.01 in section 2.2; capacity 1.25 and "
        "jitter 0.01 as in Mesh TensorFlow), arXiv 2101.03961",
    ),
    "mixtral": Entry(
        TopK,
        {"k": 2, "renormalize": True},
        moe={
            "transport": "dropless",
            "balance_scope": "batch",
            "losses.load_balance": 0.04,
            "losses.z": 0.0,
        },
        source="Jiang et al. (Mixtral 8x7B; router_aux_loss_coef 0.02 of its config.json, of a "
        "loss that is k at balance), arXiv 2401.04088",
    ),
    # Coefficients of losses are converted to losses that are 1 at balance, not for the number of
    # layers (docs/losses.md).
    "deepseek_moe": Entry(
        TopK,
        {"k": 6, "renormalize": False},
        moe={
            "shared_experts": 2,
            "transport": "dropless",
            "losses.load_balance": 0.001,
            "losses.z": 0.0,
        },
        source="Dai et al. (DeepSeekMoE 16B: 6 of 64, section 5.1.2), arXiv 2401.06066",
    ),
    "qwen_moe": Entry(
        TopK,
        {"k": 4, "renormalize": False},
        moe={
            "shared_experts": 4,
            "shared_gate": True,
            "transport": "dropless",
            "balance_scope": "batch",
            "losses.load_balance": 0.004,
            "losses.z": 0.0,
        },
        source="Qwen Team (Qwen1.5-MoE-A2.7B: 4 of 60; router_aux_loss_coef 0.001 of its "
        "config.json, of a loss that is k at balance); Yang et al. (Qwen2), arXiv 2407.10671",
    ),
    "olmoe": Entry(
        TopK,
        {"k": 8, "renormalize": False},
        moe={
            "transport": "dropless",
            "balance_scope": "batch",
            "losses.load_balance": 0.01,
            "losses.z": 0.001,
        },
        source="Muennighoff et al. (OLMoE 1B-7B: 8 of 64), arXiv 2409.02060",
    ),
    "openmoe": Entry(
        TopK,
        {"k": 2, "renormalize": False},
        moe={
            "shared_experts": 1,
            **CELLS,
            "capacity_factor": 1.25,
            "priority": "choice",
            "losses.load_balance": 0.02,
            "losses.z": 0.0001,
        },
        source="Xue et al. (OpenMoE: 2 of 32; 0.01 of a loss that is k at balance; slots as in "
        "Flaxformer's TokensChooseMaskedRouter), arXiv 2402.01739",
    ),
    "residual_moe": Entry(
        TopK,
        {"k": 1, "renormalize": False},
        moe={
            "shared_experts": 1,
            "residual": True,
            **CELLS,
            "capacity_factor": 1.0,
            "balance_scope": "batch",
            "losses.load_balance": 0.01,
            "losses.z": 0.0,
        },
        source="Rajbhandari et al. (DeepSpeed-MoE, the residual of PR-MoE; loss and capacity of "
        "its training scripts), arXiv 2201.05596",
    ),
    "prototypes": Entry(Prototypes),
    "gating_dropout": Entry(GatingDropout, moe={"transport": "dropless", "balance_scope": "batch"}),
    "loss_free": Entry(LossFree, moe=UNBALANCED),
    "deepseek_v2": Entry(
        LossFree,
        {
            "k": 6,
            "score": "softmax",
            "renormalize": False,
            "route_scale": 16.0,
            "bias_rate": 0.0,
            "num_groups": 8,
            "top_groups": 3,
            "group_score": "max",
            "sequence_loss": 0.0,
            "device_loss": 0.05,
        },
        moe={
            "shared_experts": 2,
            "transport": "dropless",
            "losses.load_balance": 0.003,
            "losses.z": 0.0,
        },
        source="DeepSeek-AI (DeepSeek-V2: 6 of 160 on 3 of 8 devices, section 3.1.2), "
        "arXiv 2405.04434",
    ),
    "deepseek_v3": Entry(
        LossFree,
        {
            "k": 8,
            "score": "sigmoid",
            "renormalize": True,
            "route_scale": 2.5,
            "bias_rate": 0.001,
            "num_groups": 8,
            "top_groups": 4,
            "group_score": "top2",
            "sequence_loss": 0.0001,
        },
        moe={"shared_experts": 1, "transport": "dropless", **UNBALANCED},
        source="DeepSeek-AI (DeepSeek-V3: 8 of 256 on 4 of 8 nodes, section 4.2), arXiv 2412.19437",
    ),
    "quantile": Entry(Quantile, moe={"losses.load_balance": 0.0}),
    "shazeer": Entry(NoisyTopK, moe=OF_SHAZEER),
    "gshard": Entry(
        GShard,
        {"second_policy": "random", "threshold": 0.5},
        moe={
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
    "dense": Entry(Dense, moe={"transport": "all_experts", "losses.load_balance": 0.0}),
    "base": Entry(Base, moe=UNBALANCED),
    "sbase": Entry(SBase, moe=UNBALANCED),
    "dselect_k": Entry(DSelectK, moe={"transport": "dropless", **UNBALANCED}),
    "hash": Entry(Hash, moe=UNBALANCED),
    "task": Entry(Task, moe=OF_SEQUENCES),
    "sentence": Entry(Sentence, moe=OF_SEQUENCES),
    "expert_choice": Entry(ExpertChoice, moe=UNBALANCED),
    "expert_choice_causal": Entry(ExpertChoice, {"eval_policy": "threshold"}, moe=UNBALANCED),
    "replay": Entry(Replay, moe={"transport": "dropless", **UNBALANCED}),
    "soft": Entry(Soft, moe=UNBALANCED),
    # Routers of the literature, and controls without one.
    "hierarchical": Entry(Hierarchical, moe=OF_SHAZEER),
    "xmoe": Entry(XMoE, moe={"losses.z": 0.0}),
    "stablemoe": Entry(StableMoE, moe={"capacity_factor": 2.0, **UNBALANCED}),
    "remoe": Entry(ReMoE, moe={"transport": "dropless", **UNBALANCED}),
    "evomoe": Entry(EvoMoE, moe={"transport": "dropless"}),
    "rl": Entry(RL, moe={"losses.policy": 0.1, "losses.baseline": 0.01}),
    "random": Entry(Random, moe=UNBALANCED),
    "thor": Entry(Thor, moe={"transport": "dropless", "losses.consistency": 0.5, **UNBALANCED}),
    "forced": Entry(Forced, moe=UNBALANCED),
    # Experts merged into one.
    "smear": Entry(Smear, moe=UNBALANCED),
    "lory": Entry(Lory, moe=UNBALANCED),
}


def names() -> list[str]:
    """Every name ``make`` knows, sorted."""
    return sorted(GATES)


def make(name: str, **overrides: Any) -> Gate:
    """The gate called ``name`` with its preset fields, then ``overrides``.

    Raises:
      UserError: unknown name or field; the message lists the valid ones.
    """
    entry = _entry(name)
    valid = fields(name)
    for field in overrides:
        if field not in valid:
            raise UserError(f"gate {name!r} has no field {field!r}; {suggest(field, valid)}")
    gate = entry.gate(**{**entry.preset, **overrides})
    if not isinstance(gate, Gate):
        methods = [m for m in vars(Gate) if callable(getattr(Gate, m)) and not m.startswith("_")]
        missing = [m for m in (*methods, "trained_by", "__call__") if not hasattr(gate, m)]
        raise UserError(f"gate {name!r} lacks {', '.join(missing)} of moejax.types.Gate")
    return gate


def fields(name: str) -> dict[str, tuple[Any, str]]:
    """The gate's hyper-parameters under this name: field -> (default, comment)."""
    entry = _entry(name)
    hints = typing.get_type_hints(entry.gate, include_extras=True)
    table = {}
    for field in dataclasses.fields(entry.gate):
        comment = next(iter(getattr(hints[field.name], "__metadata__", ())), "")
        default = entry.preset.get(field.name, field.default)
        table[field.name] = (default, comment)
    return table


def preset_overrides(name: str) -> dict[str, Any]:
    """Fields outside the gate, relative to ``moe``, that this name's published model sets."""
    return dict(_entry(name).moe)


def loss_weights(name: str) -> dict[str, float]:
    """Weights of the losses in ``info.losses`` that this name's published model sets."""
    prefix = "losses."
    preset = preset_overrides(name).items()
    return {key.removeprefix(prefix): value for key, value in preset if key.startswith(prefix)}


def source(name: str) -> str:
    """Whose published model this name presets; empty for a gate under its own name."""
    return _entry(name).source


def _entry(name: str) -> Entry:
    if name in GATES:
        return GATES[name]
    if ":" not in name:
        raise UserError(f"gate {name!r} is unknown; {suggest(name, GATES)}")
    module_name, _, attribute = name.partition(":")
    try:
        gate = getattr(importlib.import_module(module_name), attribute)
    except Exception as error:  # the module is the user's program: it may raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"gate {name!r} cannot be imported: {reason}") from error
    if not (dataclasses.is_dataclass(gate) and isinstance(gate, type)):
        raise UserError(f"gate {name!r} must be a dataclass with the moejax.types.Gate protocol")
    return Entry(gate)

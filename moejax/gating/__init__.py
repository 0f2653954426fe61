"""Gating functions: one per file, chosen by value in code and by name in a config.

``make("switch")`` builds a gate from its name; ``GATES`` is the table of gates and ``PRESETS`` that
of published models, which fix a gate's fields and may also set other ``moe.*`` fields. A gate of
your own is any object with the ``moejax.types.Gate`` protocol, named
``"my_package.my_module:MyGate"``.

Beside the gates: ``registry`` and ``presets`` (the tables), ``gate`` (base classes), ``ops``
(arithmetic of routers), ``spans`` (arithmetic of stretches of a sequence), ``visibility`` (effects
of competition for slots) and ``solvers`` (assignment, transport, selectors).
"""

import importlib
from typing import Any

from moejax.gating.presets import PRESETS
from moejax.gating.registry import (
    GATES,
    classes,
    fields,
    loss_weights,
    make,
    names,
    preset_overrides,
    source,
)

FUNCTIONS = {
    "BalancedAssignment": "solvers.assignment",
    "balanced_assignment": "solvers.assignment",
    "balanced_table": "hash",
    "choose_tokens": "expert_choice",
    "dselect_k_weights": "solvers.selectors",
    "limit_groups": "loss_free",
    "load_probability": "noisy_top_k",
    "quantile_prices": "quantile",
    "sinkhorn_bias": "solvers.sinkhorn",
    "sinkhorn_plan": "solvers.sinkhorn",
    "smooth_step": "solvers.selectors",
    "top_k_routing": "ops",
}
"""Functions of arrays that are of use without a gate, each with its module."""

_MODULES = {**classes(), **{name: f"{__name__}.{module}" for name, module in FUNCTIONS.items()}}

__all__ = [  # pyright: ignore[reportUnsupportedDunderAll]
    "GATES", "PRESETS", "fields", "loss_weights", "make", "names", "preset_overrides", "source",
    *_MODULES,
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """A gate's class or a function, imported when it is first asked for."""
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

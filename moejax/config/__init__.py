"""Configs: a typed tree of defaults, pages that set fields, and overrides on the command line.

A page is a file with ``get_config(arg=None)``::

    from moejax.config import default, parse_arg, set_gate

    def get_config(arg=None):
        options = parse_arg(arg, gate="top_k", experts=8)
        config = default()
        set_gate(config, options.gate)
        config.moe.num_experts = options.experts
        return config

and is run as ``moejax train --config=page.py:gate=switch --config.train.steps=500 --workdir=DIR``.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from moejax.config.build import make_gate, moe_config
from moejax.config.checks import validate
from moejax.config.field import Field
from moejax.config.overrides import apply_overrides, choose, parse_arg, take_overrides
from moejax.config.sources import from_dict, read, to_dict
from moejax.config.table import FIELDS, SECTIONS
from moejax.config.tree import Config, default, flatten, set_gate, table_of

__all__ = [
    "FIELDS",
    "MAY_CHANGE",
    "SECTIONS",
    "Config",
    "Field",
    "Loaded",
    "all_differences",
    "choose",
    "config_differences",
    "default",
    "flatten",
    "from_dict",
    "load",
    "make_gate",
    "moe_config",
    "parse_arg",
    "set_gate",
    "table_of",
    "take_overrides",
    "to_dict",
    "validate",
]

MAY_CHANGE = tuple(name for name, field in FIELDS.items() if field.may_change)
"""Fields that may differ when a run is resumed in its workdir."""


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A config with its origin; ``file_config`` is the page's, before the overrides."""

    config: Config
    file_config: Config
    source: str
    overrides: tuple[str, ...]


def load(source: str, overrides: Sequence[str] = ()) -> Loaded:
    """Read a config and apply overrides, without semantic checks (see ``validate``).

    Args:
      source: ``path.py[:arg]``, ``package.module[:arg]``, a workdir, or its config.json.
      overrides: ``--config.field=value`` (``field=value`` for short), typed by the field's default.
        ``moe.gate.name`` is applied first, wherever it stands.

    Raises:
      UserError: in one line: the fault of the page, a field or a value.
    """
    config = read(source)
    file_config = config.copy_and_resolve_references()
    apply_overrides(config, overrides)
    return Loaded(config.copy_and_resolve_references(), file_config, source, tuple(overrides))


def config_differences(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Fields in which two configs (from ``to_dict``) differ and a resumed run may not.

    See `all_differences`.
    """
    return [change for change in all_differences(old, new) if change[0] not in MAY_CHANGE]


def all_differences(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Fields in which two configs (from ``to_dict``) differ.

    A list of (dotted name, old value, new value); a field that one of them lacks (another gate's)
    counts as None there. The gate's name comes first, since its other fields follow from it.
    """
    before, after = flatten(old), flatten(new)
    names = sorted(before | after, key=lambda name: (name != "moe.gate.name", name))
    differences = []
    for name in names:
        pair = tuple(
            list(value) if isinstance(value, tuple) else value
            for value in (before.get(name), after.get(name))
        )
        if pair[0] != pair[1]:
            differences.append((name, before.get(name), after.get(name)))
    return differences

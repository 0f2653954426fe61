"""The config tree, made from the fields of the table that its task has.

The table is in ``moejax.config.table``. The fields below ``task`` are the task's own
(``moejax.config.tasks``), those below ``moe.gate`` the gate's (``moejax.gating.fields``).
"""

import dataclasses
from typing import TYPE_CHECKING, Any

import ml_collections
import numpy as np

from moejax import gating
from moejax.config.field import Field
from moejax.config.table import DEFAULT_GATE, FIELDS
from moejax.config.tasks import LANGUAGE, task_entry
from moejax.errors import UserError


class Config(ml_collections.ConfigDict):
    """The config tree: ``config.moe.num_experts`` reads and sets a field, and keeps its type."""

    if TYPE_CHECKING:  # any name is allowed here; the fields are known when a config is loaded

        def __getattr__(self, attribute: str) -> Any: ...
        def __getitem__(self, key: str) -> Any: ...

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, _plain(value, self[key] if key in self else None))


def _plain(value: Any, known: Any) -> Any:
    """A NumPy or JAX number as a Python number; 1e3 as 1000 where ``known`` is an int; and where it
    is text a dict as its literal (``data.mixture``)."""
    if isinstance(known, str) and isinstance(value, dict):
        return repr(value)
    if isinstance(known, tuple) and isinstance(value, (list, tuple, np.ndarray)):
        return tuple(_plain(item, known[0] if known else None) for item in value)
    if isinstance(value, np.generic) or getattr(value, "ndim", None) == 0:
        value = value.item()
    if type(known) is int and isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def fields_for(gate: str, task: str) -> dict[str, Field]:
    """The whole table for a config with this gate and task: dotted name -> Field, in reading order.

    Raises:
      UserError: unknown task or gate, or a gate with a field that has no typed default.
    """
    entry = task_entry(task)
    table = {}
    for name, field in FIELDS.items():
        if not entry.has(name):
            continue
        known = {"task.name": task, **entry.defaults}
        table[name] = dataclasses.replace(field, default=known.get(name, field.default))
        if name == "task.name":
            if task not in field.choices:  # a task outside the package
                table[name] = dataclasses.replace(table[name], choices=())
            table |= {f"task.{own}": field for own, field in entry.fields.items()}
        if name == "moe.gate.name":
            table |= _gate_fields(gate)
    return table


def _gate_fields(gate: str) -> dict[str, Field]:
    table = {}
    for name, (default, comment) in gating.fields(gate).items():
        if not isinstance(default, (bool, int, float, str, tuple)):
            given = "none" if default is dataclasses.MISSING else repr(default)
            raise UserError(
                f"gate {gate!r}: field {name!r} needs a default that is a bool, int, float, str or "
                f"tuple, so that overrides can be typed; it has {given}"
            )
        table[f"moe.gate.{name}"] = Field(default, comment)
    return table


def table_of(config: Config) -> dict[str, Field]:
    """The table for the gate and the task that the config names."""
    return fields_for(config.moe.gate.name, config.task.name)


def default(task: str = LANGUAGE) -> Config:
    """A task's config with all fields at their defaults and gate ``top_k``, locked.

    Raises:
      UserError: unknown task; the message lists the valid ones.
    """
    table = fields_for(DEFAULT_GATE, task)
    config = _sections(nested({name: field.default for name, field in table.items()}))
    config.lock()
    set_gate(config, DEFAULT_GATE)
    return config


def _sections(tree: dict[str, Any]) -> Config:
    """The tree with every section as a Config; a ConfigDict's sections are ConfigDicts."""
    return Config({k: _sections(v) if isinstance(v, dict) else v for k, v in tree.items()})


class GateConfig(Config):
    """``config.moe.gate``. Its name cannot be assigned: the other fields belong to the name."""

    def __setitem__(self, key: str, value: Any) -> None:
        if key == "name" and self.get(key, value) != value:
            raise UserError(
                f"moe.gate.name cannot be set to {value!r} by assignment, since the other fields "
                f"of moe.gate belong to {self[key]!r}; call moejax.config.set_gate(config, "
                f"{value!r}) first"
            )
        super().__setitem__(key, value)


def set_gate(config: Config, name: str) -> None:
    """Chooses the gate: ``moe.gate`` gets its fields at their defaults, ``moe`` its preset.

    A preset of a published model may set other ``moe`` fields (``moejax gates NAME`` lists them),
    where the task has them. Fields that still have the value of the previous gate's preset return
    to their defaults, so the result does not depend on the previous gate.

    Raises:
      UserError: unknown gate; the message lists the valid ones.
    """
    fields = _gate_fields(name)
    table = table_of(config)
    previous = gating.preset_overrides(config.moe.gate.name)
    for key, value in previous.items():
        if f"moe.{key}" in table and get_field(config, f"moe.{key}") == value:
            set_field(config, f"moe.{key}", table[f"moe.{key}"].default)
    gate = {field.removeprefix("moe.gate."): entry.default for field, entry in fields.items()}
    with config.unlocked():
        config.moe.gate = GateConfig({"name": name, **gate})
    for key, value in gating.preset_overrides(name).items():
        if f"moe.{key}" in table:
            set_field(config, f"moe.{key}", value)


def flatten(tree: dict[str, Any] | ml_collections.ConfigDict, prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` as ``{"a.b": 1}``; takes a dict or a ConfigDict."""
    flat = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, (dict, ml_collections.ConfigDict)):
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = value
    return flat


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *sections, leaf = name.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[leaf] = value
    return tree


def get_field(config: Config, name: str) -> Any:
    """The value at a dotted name."""
    for part in name.split("."):
        config = config[part]
    return config


def set_field(config: Config, name: str, value: Any) -> None:
    """Sets the value at a dotted name."""
    section, _, leaf = name.rpartition(".")
    get_field(config, section)[leaf] = value

"""Reading configs that older versions wrote.

Saved configs carry the number of their schema. Adding, renaming or removing a field raises `SCHEMA`
by one. A config that lacks an added field gets the field's ``before``, or its default, which must
then mean what the program did without the field. `CHANGES` lists renamed and removed fields.
"""

import dataclasses
from typing import Any

from moejax.config.field import HUGE, Field
from moejax.config.table import FIELDS
from moejax.config.tasks import LANGUAGE, task_entry
from moejax.config.tree import fields_for, flatten, nested
from moejax.errors import UserError

SCHEMA = 3
"""0: version 0.1.0, which wrote no number. 1: ``optim.decay_steps``, ``data.split``,
``data.eval_path``, ``model.matmul_precision``, ``mesh.device_gib``. 2: the options of published
decoders in ``model`` and ``moe``, which are off by default, and ``bias`` of the gate ``top_k``.
3: formats, mixtures, packing and streaming in ``data``."""


@dataclasses.dataclass(frozen=True)
class Change:
    """A field that was renamed or removed.

    ``schema``: the first one without it. ``now``: its new name; "" if it was removed, which is fine
    for runs that had it at ``off``.
    """

    schema: int
    field: str
    now: str = ""
    off: Any = None


CHANGES: tuple[Change, ...] = ()


def migrated(tree: dict[str, Any], schema: int, origin: str) -> tuple[dict[str, Any], list[str]]:
    """A saved config with the fields of this version, and the names of the fields it lacked.

    Args:
      tree: the nested config, from ``to_dict``.
      schema: the number that it was saved with.
      origin: the file, for messages.

    Raises:
      UserError: a newer version wrote it, or it uses a removed field.
    """
    if is_newer(schema):
        raise UserError(
            f"{origin} has schema {schema} and this moejax reads up to {SCHEMA}: a newer version "
            "wrote it; upgrade moejax, or use another --workdir"
        )
    flat = flatten(tree)
    for change in CHANGES:
        if schema < change.schema and change.field in flat:
            value = flat.pop(change.field)
            if change.now:
                flat[change.now] = value
            elif value != change.off:
                raise UserError(
                    f"{origin}: {change.field}={value}, which this version of moejax does not have "
                    "any more; use the version that wrote it"
                )
    added = {}
    for name, field in _table(flat).items():
        if name not in flat:
            added[name] = field.default if field.before is None else field.before
    if schema == 0 and "task" not in tree:  # older than tasks: all were of text
        added["task.name"] = LANGUAGE
    return nested({**flat, **added}), list(added)


def is_newer(schema: Any) -> bool:
    """True if no version up to this one has this schema."""
    return type(schema) is not int or schema > SCHEMA


def misfit(tree: dict[str, Any]) -> str:
    """The first field of a saved config with an impossible value; "" if there is none.

    Unknown and missing fields are ignored, since another version may have written the config.
    """
    flat = flatten(tree)
    for name in ("task.name", "moe.gate.name"):
        if not isinstance(flat.get(name, ""), str):
            return f"{name}={flat[name]!r} must be text (str)"
    table = _table(flat)
    for name, value in flat.items():
        if name in table and not _fits(value, table[name]):
            return f"{name}={value!r} must be {table[name].range or table[name].type.__name__}"
        if any(field.startswith(f"{name}.") for field in table):
            return f"{name}={value!r} must be a section"
    return ""


def _fits(value: Any, field: Field) -> bool:
    """True if the field may have a value from JSON, which has no tuples and writes 1.0 as 1."""
    if field.type is tuple:
        return isinstance(value, list | tuple)
    if field.type is float:
        return type(value) in (int, float) and abs(value) <= HUGE and field.allows(value)
    return type(value) is field.type and (bool(field.choices) or field.allows(value))


def _table(flat: dict[str, Any]) -> dict[str, Any]:
    """The fields of a saved config, without those of a gate that cannot be imported here."""
    gate, task = flat.get("moe.gate.name", ""), flat.get("task.name", LANGUAGE)
    try:
        return fields_for(gate, task)
    except UserError:
        pass
    try:
        entry = task_entry(task)
    except UserError:
        return {}
    return {name: field for name, field in FIELDS.items() if entry.has(name)}

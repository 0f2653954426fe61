"""The tasks by name. A task is one folder, and one line in ``TASKS``.

The fields of ``moejax.config.table.FIELDS`` hold for every task, except those that a task is
``without``; a task's own fields are below ``task``.
"""

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

from moejax.config.field import Field
from moejax.errors import UserError, suggest
from moejax.options import RopeOptions, TextOptions, option_fields

LANGUAGE = "language"
"""The task of a config that names none, and of runs from before there were other tasks."""

TASKS: dict[str, str] = {
    LANGUAGE: "moejax.tasks.language.fields:TASK",
    "images": "moejax.tasks.images.fields:TASK",
    "multimodal": "moejax.contrib.multimodal.fields:TASK",
    "multitask": "moejax.contrib.multitask.fields:TASK",
}
"""Name -> "module:attribute" of a ``TaskEntry``. A task outside the package needs no line here: its
name is "module:attribute" itself."""


@dataclasses.dataclass(frozen=True)
class TaskEntry:
    """A task's part of the config, and the function that builds it.

    Attributes:
      build: "module:function", config -> (Task, Source).
      fields: the task's own fields.
      without: common fields that the task does not use; a name that ends in a dot is a section.
      uses: fields of these sections that the task does use.
      defaults: defaults that differ from the common table.
      sequences_per_row: sequences in the layers per row of a batch; groups and the gates' view of
        the data count these.
    """

    build: str
    fields: Mapping[str, Field] = dataclasses.field(default_factory=dict)
    without: tuple[str, ...] = ()
    uses: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    sequences_per_row: int = 1

    def has(self, name: str) -> bool:
        """True if the task uses this field of the common table."""
        sections = tuple(out for out in self.without if out.endswith("."))
        return name in self.uses or not (name in self.without or name.startswith(sections))


def task_entry(name: str) -> TaskEntry:
    """The entry of a task: a name in ``TASKS``, or "module:attribute" of a task elsewhere.

    Raises:
      UserError: unknown name, or an attribute that cannot be imported or is no ``TaskEntry``.
    """
    module, _, attribute = TASKS.get(name, name).partition(":")
    if name in TASKS:
        return getattr(importlib.import_module(module), attribute)
    if not attribute:
        raise UserError(f"task.name={name!r} is unknown; {suggest(name, TASKS)}")
    try:
        entry = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # the module is the user's program: it may raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"task.name={name!r} cannot be imported: {reason}") from error
    if not isinstance(entry, TaskEntry):
        raise UserError(
            f"task.name={name!r} is a {type(entry).__name__}; name a moejax.config.tasks.TaskEntry"
        )
    return entry


OF_MODALITIES = tuple(
    f"moe.losses.{kind}_entropy_{task}" for kind in ("local", "global") for task in (0, 1)
)
"""Fields for tasks with tokens of two kinds."""

OF_TEXT = (
    "model.vocab_size",
    *(f"model.rope_{field.name}" for field in option_fields(RopeOptions)),
    *(f"model.{field.name}" for field in option_fields(TextOptions)),
    "moe.replay",
    "moe.allow_future_leak",
    "moe.losses.consistency",
    "train.seq_len",
    "data.mixture",
    "data.text_field",
    "data.tokenizer",
    "data.bos",
    "data.packing",
    "data.stream",
    "data.duplicates",
    "data.on_error",
    "data.split",
    "data.eval_path",
)
"""Fields for tasks that read text from left to right."""

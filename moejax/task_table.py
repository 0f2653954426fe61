"""The tasks by name: which config fields each has, and where it is built.

Fields of ``moejax.fields.FIELDS`` hold for every task, but for those that a task is ``without``;
the task's own fields are below ``task``.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from moejax.field import Field

LANGUAGE = "language"
"""The task of a config that names none, and of runs from before there were others."""


@dataclasses.dataclass(frozen=True)
class TaskEntry:
    """A task's place in the config. ``build``: "module:function", config -> (Task, Source).

    ``without``: names of fields it has no use for, and of whole sections (ending in a dot).
    ``defaults``: values that differ from the table's.
    """

    build: str
    fields: Mapping[str, Field] = dataclasses.field(default_factory=dict)
    without: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def has(self, name: str) -> bool:
        """Whether a field of the common table is one of this task's."""
        sections = tuple(out for out in self.without if out.endswith("."))
        return name not in self.without and not name.startswith(sections)


TASKS: dict[str, TaskEntry] = {
    LANGUAGE: TaskEntry("moejax.tasks.language:build"),
}

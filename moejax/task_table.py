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


MULTITASK = TaskEntry(
    "moejax.tasks.multitask:build",
    fields={
        "data": Field(
            "correlated",
            "two regressions of known relation, two groups of them, users and items, or your file",
            choices=("correlated", "groups", "recommender", "file"),
        ),
        "sharing": Field(
            "mmoe",
            "a gate per task, one gate for all, or no experts (with moe.every=0)",
            choices=("mmoe", "omoe", "shared_bottom"),
        ),
        "gate_input": Field(
            "example",
            "what gates see: the example, or the constant 1 (one choice for all examples)",
            choices=("example", "constant"),
        ),
        "d_embed": Field(8, "numbers that embed a category", low=1),
        "d_bottom": Field(0, "width of a shared layer below the experts (0: none)", low=0),
        "d_out": Field(16, "width of an expert's output", low=1),
        "d_tower": Field(8, "hidden width of a task's tower", low=1),
        "data_seed": Field(0, "of generated tables; train.seed is of everything else", low=0),
        "rows": Field(20_000, "of generated tables, held-out ones included", low=2),
        "rho": Field(0.5, "correlated: cosine of the tasks' weights", low=-1.0, high=1.0),
        "tasks": Field(16, "groups: tasks in all, half of them in each group", low=2),
        "num_users": Field(500, "recommender: users", low=2),
        "num_items": Field(200, "recommender: items", low=2),
        "shared": Field(0.5, "recommender: what the two tasks have in common", low=0.0, high=1.0),
        "targets": Field("", "file: columns to predict, as stars=rating,liked=rating>=4"),
        "categorical": Field("", "file: columns of categories, separated by commas"),
        "numeric": Field("", "file: columns of numbers, separated by commas"),
        "split": Field(
            "hash", "file: held-out rows, by row number or the latest", choices=("hash", "time")
        ),
        "time": Field("", "file: the column that task.split=time sorts by"),
        "min_count": Field(2, "file: rarer categories count as unknown", low=1),
    },
    without=(
        "model.vocab_size",
        "model.d_model",
        "model.d_ff",
        "model.num_layers",
        "model.num_heads",
        "model.num_kv_heads",
        "model.head_dim",
        "model.activation",
        "model.rope_theta",
        "model.norm_eps",
        "model.tie_embeddings",
        "model.remat",
        "model.attention",
        "moe.first_dense",
        "moe.shared_experts",
        "moe.shared_gate",
        "moe.transport",
        "moe.capacity_factor",
        "moe.eval_transport",
        "moe.eval_capacity_factor",
        "moe.priority",
        "moe.reroute",
        "moe.group",
        "moe.balance_scope",
        "moe.allow_future_leak",
        "moe.losses.policy",
        "moe.losses.baseline",
        "moe.losses.consistency",
        "train.seq_len",
        "optim.output_z_loss",
        "data.tokenizer",
    ),
    defaults={
        "moe.d_ff": 16,
        "moe.activation": "relu",
        "moe.losses.load_balance": 0.0,
        "moe.losses.z": 0.0,
        "train.steps": 2000,
        "train.batch_size": 256,
        "train.log_every": 100,
        "train.eval_every": 500,
        "train.eval_rows": 20_000,
        "train.checkpoint_every": 1000,
        "optim.weight_decay": 0.0,
        "data.eval_fraction": 0.1,
    },
)

TASKS: dict[str, TaskEntry] = {
    LANGUAGE: TaskEntry("moejax.tasks.language:build"),
    "multitask": MULTITASK,
}

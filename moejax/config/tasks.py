"""The tasks by name: which config fields each has, and where it is built.

Fields of ``moejax.config.table.FIELDS`` hold for every task, but for those that a task is
``without``; the task's own fields are below ``task``.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from moejax.config.field import Field

LANGUAGE = "language"
"""The task of a config that names none, and of runs from before there were others."""


@dataclasses.dataclass(frozen=True)
class TaskEntry:
    """A task's place in the config. ``build``: "module:function", config -> (Task, Source).

    ``without``: names of fields it has no use for, and of whole sections (ending in a dot).
    ``defaults``: values that differ from the table's. ``sequences_per_row``: how many sequences the
    layers see of a row of a batch; groups and what gates are told of the data count these.
    """

    build: str
    fields: Mapping[str, Field] = dataclasses.field(default_factory=dict)
    without: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    sequences_per_row: int = 1

    def has(self, name: str) -> bool:
        """Whether a field of the common table is one of this task's."""
        sections = tuple(out for out in self.without if out.endswith("."))
        return name not in self.without and not name.startswith(sections)


OF_MODALITIES = tuple(
    f"moe.losses.{kind}_entropy_{task}" for kind in ("local", "global") for task in (0, 1)
)
"""Fields of tasks whose tokens are of two kinds."""

OF_TEXT = (
    "model.vocab_size",
    "model.rope_theta",
    "model.tie_embeddings",
    "moe.allow_future_leak",
    "moe.losses.consistency",
    "train.seq_len",
    "data.tokenizer",
    "data.split",
    "data.eval_path",
)
"""Fields of tasks that read text from left to right."""

OF_LAYERS = (
    *(
        f"model.{name}"
        for name in (
            "d_model", "d_ff", "num_layers", "num_heads", "num_kv_heads", "head_dim", "activation",
            "norm_eps", "remat", "attention", "mod_capacity", "mod_every", "mod_predictor",
            "moa_experts", "moa_k",
        )
    ),
    "moe.first_dense",
    "moe.shared_experts",
    "moe.shared_gate",
    "moe.residual",
    "moe.losses.mod_predictor",
    "moe.losses.moa_load_balance",
    "moe.losses.moa_z",
)  # fmt: skip
"""Fields of transformers."""

OF_TRANSPORT = (
    *(
        f"moe.{name}"
        for name in (
            "transport", "capacity_factor", "eval_transport", "eval_capacity_factor", "priority",
            "reroute", "group", "balance_scope",
        )
    ),
    "moe.losses.policy",
    "moe.losses.baseline",
)  # fmt: skip
"""Fields of layers that send tokens to experts."""

MULTITASK = TaskEntry(
    "moejax.contrib.multitask.task:build",
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
    without=(*OF_TEXT, *OF_MODALITIES, *OF_LAYERS, *OF_TRANSPORT, "optim.output_z_loss"),
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
    LANGUAGE: TaskEntry("moejax.tasks.language.task:build", without=OF_MODALITIES),
    "images": TaskEntry(
        "moejax.tasks.images.task:build",
        fields={
            "image_size": Field(8, "pixels on a side; images are cut and resized to it", low=1),
            "patch_size": Field(2, "pixels on a side of a patch, which is a token", low=1),
            "channels": Field(1, "of the pixels: 1 (grey) or 3 (RGB)", low=1, high=3),
            "shift": Field(0, "training images are moved by up to so many pixels", low=0),
        },
        without=(*OF_TEXT, *OF_MODALITIES),
        defaults={"data.eval_fraction": 0.2, "train.eval_rows": 1000},
    ),
    "multimodal": TaskEntry(
        "moejax.contrib.multimodal.task:build",
        fields={
            "patch_size": Field(2, "height and width of a patch, in pixels", low=1),
            "caption_length": Field(26, "bytes a caption is padded to", low=1),
            "embed_dim": Field(64, "width of the space of images and captions", low=1),
            "image_experts": Field(
                4.0, "experts that global_entropy_0 spreads images over, at least", low=1.0
            ),
            "text_experts": Field(
                4.0, "experts that global_entropy_1 spreads text over, at least", low=1.0
            ),
        },
        without=(*OF_TEXT, "optim.output_z_loss", "data.path"),
        defaults={
            "model.d_model": 64,
            "model.d_ff": 256,
            "model.num_layers": 3,
            "model.activation": "gelu",
            "moe.d_ff": 256,
            "moe.activation": "gelu",
            "moe.capacity_factor": 0.75,  # of positions, a third of which is padding
            "moe.priority": "gate",
            "moe.group": "8",
            "moe.balance_scope": "batch",
            "moe.losses.local_entropy_1": 0.04,
            "moe.losses.global_entropy_0": 0.04,
            "moe.losses.global_entropy_1": 0.04,
            "train.batch_size": 64,
            "train.eval_rows": 320,
            "data.eval_fraction": 0.2,
        },
        sequences_per_row=2,  # image and caption
    ),
    "multitask": MULTITASK,
}

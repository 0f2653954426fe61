"""Config of multi-task learning on the rows of a table."""

from moejax.config.field import Field
from moejax.config.tasks import OF_TEXT, TaskEntry

TASK = TaskEntry(
    "moejax.contrib.multitask.task:build",
    fields={
        "data": Field(
            "correlated",
            "two related regressions, two groups of regressions, users and items, or your file",
            choices=("correlated", "groups", "recommender", "file"),
        ),
        "sharing": Field(
            "mmoe",
            "a gate per task, one gate for all, or no experts (with moe.every=0)",
            choices=("mmoe", "omoe", "shared_bottom"),
        ),
        "gate_input": Field(
            "example",
            "input of the gates: the example, or the constant 1 (one choice for all examples)",
            choices=("example", "constant"),
        ),
        "d_embed": Field(8, "width of the embedding of a category", low=1),
        "d_bottom": Field(0, "width of a shared layer below the experts (0: none)", low=0),
        "d_out": Field(16, "width of an expert's output", low=1),
        "d_tower": Field(8, "hidden width of a task's tower", low=1),
        "data_seed": Field(
            0, "seed of generated tables; train.seed is the seed of everything else", low=0
        ),
        "rows": Field(20_000, "rows of generated tables, held-out ones included", low=2),
        "rho": Field(0.5, "correlated: cosine of the tasks' weights", low=-1.0, high=1.0),
        "tasks": Field(16, "groups: tasks in all, half of them in each group", low=2),
        "num_users": Field(500, "recommender: users", low=2),
        "num_items": Field(200, "recommender: items", low=2),
        "shared": Field(
            0.5, "recommender: share of structure common to the two tasks", low=0.0, high=1.0
        ),
        "targets": Field("", "file: columns to predict, as stars=rating,liked=rating>=4"),
        "categorical": Field("", "file: columns of categories, separated by commas"),
        "numeric": Field("", "file: columns of numbers, separated by commas"),
        "split": Field(
            "hash", "file: held-out rows, by row number or the latest", choices=("hash", "time")
        ),
        "time": Field("", "file: the column that task.split=time sorts by"),
        "min_count": Field(2, "file: rarer categories count as unknown", low=1),
    },
    without=("model.", "moe.", *OF_TEXT, "optim.output_z_loss"),
    uses=(
        "model.dtype",
        "model.matmul_precision",
        "moe.num_experts",
        "moe.d_ff",
        "moe.every",
        "moe.activation",
        "moe.losses.load_balance",
        "moe.losses.z",
        "moe.losses.importance",
        "moe.losses.load",
        "moe.gate.name",
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

"""Config of the majority task: its own fields, unused common fields, and defaults."""

from moejax.config.field import Field
from moejax.config.tasks import OF_MODALITIES, OF_TEXT, TaskEntry

TASK = TaskEntry(
    "tests.majority.task:build",
    fields={"bits": Field(7, "length of a vector of bits", low=2, high=16)},
    without=(*OF_TEXT, *OF_MODALITIES, "data.path", "optim.output_z_loss"),
    defaults={"data.eval_fraction": 0.25},
)

"""Config of the parity task: its own fields, the common fields that it leaves out, its defaults."""

from moejax.config.field import Field
from moejax.config.tasks import OF_MODALITIES, OF_TEXT, TaskEntry

TASK = TaskEntry(
    "tests.parity.task:build",
    fields={"bits": Field(5, "length of a vector of bits", low=2, high=16)},
    without=(*OF_TEXT, *OF_MODALITIES, "data.path", "optim.output_z_loss"),
    defaults={"data.eval_fraction": 0.25},
)

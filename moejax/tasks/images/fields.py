"""Config of image classification."""

from moejax.config.field import Field
from moejax.config.tasks import OF_MODALITIES, OF_TEXT, TaskEntry

TASK = TaskEntry(
    "moejax.tasks.images.task:build",
    fields={
        "image_size": Field(8, "height and width that images are cut and resized to", low=1),
        "patch_size": Field(2, "height and width of a patch, which is a token, in pixels", low=1),
        "channels": Field(1, "channels of a pixel: 1 (grey) or 3 (RGB)", low=1, high=3),
        "shift": Field(0, "largest random move of a training image, in pixels", low=0),
    },
    without=(*OF_TEXT, *OF_MODALITIES),
    defaults={"data.eval_fraction": 0.2, "train.eval_rows": 1000},
)

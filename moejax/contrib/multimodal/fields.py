"""Config of contrastive learning on images and captions."""

from moejax.config.field import Field
from moejax.config.tasks import OF_TEXT, TaskEntry

TASK = TaskEntry(
    "moejax.contrib.multimodal.task:build",
    fields={
        "patch_size": Field(2, "height and width of a patch, in pixels", low=1),
        "caption_length": Field(26, "bytes that a caption is padded to", low=1),
        "embed_dim": Field(64, "width of the joint space of images and captions", low=1),
        "image_experts": Field(
            4.0, "fewest experts that global_entropy_0 spreads images over", low=1.0
        ),
        "text_experts": Field(
            4.0, "fewest experts that global_entropy_1 spreads text over", low=1.0
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
        "moe.capacity_factor": 0.75,  # counted on all positions, a third of which are padding
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
)

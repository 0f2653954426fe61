"""A vision transformer whose feed-forward layers, or every second one, are mixtures of experts.

An image is cut into patches, and the gate named in the argument routes every patch as a token. The
model is not autoregressive, so that every gate and every priority can be used: patches see the
whole image, and with moe.group=8 (the default here, as in V-MoE) eight images share the slots of
the experts. A segment of lory is a row of patches.

    moejax train --config=configs/vit.py --workdir=runs/digits
    moejax train --config=configs/vit.py:gate=expert_choice --workdir=runs/expert_choice
    moejax train --config=configs/vit.py:priority=gate --workdir=runs/bpr
    moejax train --config=configs/vit.py:size=photos --config.data.path=DIR --workdir=runs/photos

Argument, as key=value,key=value:

    gate      a name from `moejax gates` (top_k: top-2 with weights that add up to 1)
    priority  tokens that a full expert keeps: position (the first ones), or gate (those of largest
              weight: V-MoE's batch-prioritised routing)
    size      digits: 4 layers of width 64 on 8 x 8 pixels in patches of 2 x 2 (the default)
              debug: 2 layers of width 32 for 60 steps; trains in seconds and learns a little
              photos: 6 layers of width 192 on 64 x 64 pixels, RGB, in patches of 8 x 8
    experts   experts per MoE layer (8)

The default images are scikit-learn's digits (pip install 'moejax[vision]'): 1,797 handwritten
digits, of which 359, a fifth of every class, are held out. data.path names a folder of your own,
with one folder of pictures per class, or with train/ and val/ of such folders (or, for val/,
validation/, valid/, dev/ or test/); or Parquet files, WebDataset's tar shards, or the files of
MNIST and CIFAR (docs/images.md). All images are decoded before the first step and stay in memory,
one byte per pixel and channel. MNIST wants task.image_size=28 and task.patch_size=4, CIFAR
size=photos with task.image_size=32 and task.patch_size=4.

After the default 2500 steps, two minutes on two cores, two seeds classify 98.9 and 98.3 % of the
held-out digits correctly (support vectors: 98.6 %; one image is 0.3 %). Training images are
shifted by up to a pixel (task.shift).

Papers: Dosovitskiy et al. 2020, arXiv 2010.11929 (the vision transformer); Riquelme et al. 2021,
arXiv 2106.05974 (V-MoE: experts for patches, groups of images, batch-prioritised routing); Zhou et
al. 2022, arXiv 2202.09368 (expert choice); Puigcerver et al. 2023, arXiv 2308.00951 (soft MoE).

Override any field to vary the run: `--config.moe.eval_transport=cells`,
`--config.task.patch_size=4`. `moejax config --config=configs/vit.py` lists them all.
"""

from moejax.config import Config, choose, default, parse_arg, set_gate

SIZES = {
    "debug": {
        "model.d_model": 32,
        "model.d_ff": 64,
        "model.num_layers": 2,
        "model.num_heads": 2,
        "model.num_kv_heads": 2,
        "moe.d_ff": 32,
        "train.steps": 60,
        "train.eval_every": 30,
        "train.checkpoint_every": 30,
        "optim.learning_rate": 1e-2,
        "optim.warmup_steps": 10,
    },
    "digits": {
        "task.shift": 1,
        "model.d_model": 64,
        "model.d_ff": 128,
        "moe.every": 1,
        "moe.d_ff": 128,
        "optim.b2": 0.99,
        "optim.final_fraction": 0.0,
        "optim.weight_decay": 0.3,
        "train.steps": 2500,
        "train.eval_every": 250,
        "train.checkpoint_every": 250,
        "optim.learning_rate": 2e-3,
    },
    "photos": {
        "task.shift": 4,
        "task.image_size": 64,
        "task.patch_size": 8,
        "task.channels": 3,
        "model.num_layers": 6,
        "train.steps": 5000,
        "train.eval_every": 500,
        "train.checkpoint_every": 500,
        "optim.learning_rate": 1e-3,
        "optim.warmup_steps": 200,
    },
}

COMMON = {
    "model.activation": "gelu",
    "moe.activation": "gelu",
    "moe.every": 2,
    "moe.capacity_factor": 1.05,
    "moe.group": "8",
    "moe.balance_scope": "group",
    "train.batch_size": 64,
}


def get_config(arg: str | None = None) -> Config:
    options = parse_arg(arg, gate="top_k", priority="position", size="digits", experts=8)
    config = default("images")
    config.update_from_flattened_dict({**COMMON, **choose("size", options.size, SIZES)})
    set_gate(config, options.gate)
    config.moe.num_experts = options.experts
    config.moe.priority = options.priority
    if options.gate == "lory":  # its own is longer than an image of digits
        config.moe.gate.segment = config.task.image_size // config.task.patch_size
    return config

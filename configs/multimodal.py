"""Images and their captions in one tower of experts, learned by contrast, in the manner of LIMoE.

The data are 1797 handwritten digits of 8 x 8 pixels (scikit-learn) with captions made of their
names ("seven", "a photo of the digit seven"). Patches and bytes run through the same layers and the
same experts. The outputs are averaged, projected and compared: an image should be most similar to
captions of its digit. Labels have no other use. Held-out images are classified zero-shot by the ten
captions "a photo of the digit ...", without training on classes.

    moejax train --config=configs/multimodal.py --workdir=runs/multimodal
    moejax train --config=configs/multimodal.py:entropy=off --workdir=runs/no-entropy
    moejax train --config=configs/multimodal.py:size=debug --workdir=runs/multimodal-debug

Needs scikit-learn: pip install 'moejax[vision]'.

Argument, as key=value,key=value:

    gate     a name from `moejax gates` except replay (top_k, here with one expert and a softmax
             over all); lory gets segments of 4 tokens, a row of patches
    size     debug: 1 layer of width 16, 20 steps, learns little
             tiny: 3 layers of width 64, 300 steps of 64 pairs (the default)
    experts  experts per MoE layer (8)
    entropy  on: LIMoE's entropy losses with the weights below moe.losses (the default); off: 0

The default run is 300 steps, 13 epochs. Expect 96 to 98 % of held-out digits to be classified
correctly (10 % by chance) after three minutes on two busy cores, including a minute of compilation.
The loss counts all captions of a digit as correct, so that its minimum is not 0: in a batch of 64
each digit occurs about six times, and log 6 is 1.8. `accuracy` is zero-shot; `image_to_text` and
`text_to_image` are retrieval within the batch; `moe/load_by_task`, `moe/experts_of_task` and
`moe/task_split` show how the modalities share the experts (docs/multimodal.md).

Routing is top-1. Slots go to the tokens of largest weight (priority "gate") among the tokens of
four pairs, as in the paper's batch-prioritised routing. moe.capacity_factor counts positions, a
third of which are padding: 0.75 leaves room for 1.2 times the mean load.

Papers: Mustafa et al. 2022, "Multimodal Contrastive Learning with LIMoE", arXiv 2206.02770 (one
tower, entropy losses); Radford et al. 2021, arXiv 2103.00020 (CLIP: loss, temperature, prompts);
Yang et al. 2022, "Unified Contrastive Learning", arXiv 2204.03610 (several captions are right);
Riquelme et al. 2021, arXiv 2106.05974 (V-MoE: priority by weight).
"""

from moejax.config import Config, choose, default, parse_arg, set_gate

SIZES = {
    "debug": {
        "model.d_model": 16,
        "model.d_ff": 32,
        "model.num_layers": 1,
        "moe.d_ff": 16,
        "task.embed_dim": 16,
        "train.steps": 20,
        "train.batch_size": 16,
        "train.eval_every": 10,
        "train.eval_rows": 24,
        "train.checkpoint_every": 10,
        "report.probe_rows": 8,
    },
    "tiny": {},  # the task's defaults
}
ENTROPY = {
    "on": {},
    "off": {
        f"moe.losses.{kind}_entropy_{modality}": 0.0
        for kind in ("local", "global")
        for modality in (0, 1)
    },
}


def get_config(arg: str | None = None) -> Config:
    options = parse_arg(arg, gate="top_k", size="tiny", experts=8, entropy="on")
    config = default("multimodal")
    set_gate(config, options.gate)
    if options.gate == "top_k":  # LIMoE's: one expert, by a softmax over all
        config.moe.gate.update(k=1, renormalize=False, jitter=0.01)
    config.moe.num_experts = options.experts
    config.update_from_flattened_dict(choose("size", options.size, SIZES))
    config.update_from_flattened_dict(choose("entropy", options.entropy, ENTROPY))
    if options.gate == "lory":  # its default is longer than a caption
        config.moe.gate.segment = 4
    return config

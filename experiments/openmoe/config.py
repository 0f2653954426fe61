"""A small OpenMoE, for its three findings (Xue et al. 2024, arXiv 2402.01739).

Like OpenMoE: top-2 of many experts with a softmax over all, a shared expert beside them (the
paper's residual MoE), the paper's losses (gate `openmoe`), slots for 1.25 times the mean load given
out first come, first served within a sequence, and a tokenizer of subwords. Unlike it: 16 experts
in each of 4 layers of width 128, where OpenMoE-8B has 32 in every sixth of 24 layers; 2048 subwords
for 256,000; sequences of 256 tokens for 2048; and 2.5 M tokens of Python for 1.1 T of everything.

    python experiments/openmoe/texts.py runs/openmoe/texts
    moejax train --config=experiments/openmoe/config.py --workdir=runs/openmoe/run

Argument, as key=value,key=value:

    texts  the folder that texts.py made (runs/openmoe/texts)
    steps  updates (600)
    k      experts per token (2)

A checkpoint is kept every 25 steps, 41 MB each. README.md in this folder has the report's command
and what it says.
"""

import os
from pathlib import Path

from moejax.config import Config, default, parse_arg, set_gate


def get_config(arg: str | None = None) -> Config:
    options = parse_arg(arg, texts="runs/openmoe/texts", steps=600, k=2)
    config = default()
    set_gate(config, "openmoe")
    config.moe.gate.k = options.k
    texts = Path(os.path.expanduser(options.texts)).absolute()
    config.update_from_flattened_dict(
        {
            "data.path": str(texts / "code"),
            "data.tokenizer": str(texts / "tokenizer.json"),
            "data.eval_fraction": 0.1,
            "model.d_model": 128,
            "model.d_ff": 384,
            # The paper's third finding is about slots given out first come, first served. The
            # preset's order (first choices first) would show later tokens to earlier ones.
            "moe.priority": "position",
            "moe.num_experts": 16,
            "moe.d_ff": 128,
            "train.steps": options.steps,
            "train.seq_len": 256,
            "train.eval_every": 25,
            "train.eval_rows": 32,
            "train.checkpoint_every": 25,
            "train.keep_checkpoints": 50,
            "optim.warmup_steps": 40,
        }
    )
    return config

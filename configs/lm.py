"""A decoder-only language model whose feed-forward layers are mixtures of experts.

The gate named in the argument routes every token of a sequence. The rest is a plain decoder
(RMSNorm, rotary positions, SwiGLU, tied embedding) on bytes of the built-in corpus, the source of
Python's standard library. Pages that compare gates start from this one, so that two runs differ
only in the gate.

    moejax train --config=configs/lm.py --workdir=runs/top_2
    moejax train --config=configs/lm.py:gate=switch --workdir=runs/switch
    moejax train --config=configs/lm.py:size=debug --workdir=runs/debug

Argument, as key=value,key=value:

    gate     a name from `moejax gates` (top_k: the two best experts, with weights that add up to
             1); the name of a published model also sets its capacity, losses and shared experts
    size     debug: 2 layers of width 32; trains in seconds and learns little
             tiny: 4 layers of width 192, 8 experts on four virtual CPU devices (the default)
             small: about 25 M active parameters, for one GPU
             base: about 120 M active parameters, for a GPU node
    experts  experts per MoE layer (8)

"Active" counts two experts per token; with 8 experts tiny has 5.4 M parameters (1.8 M active),
small 78 M, base 397 M. Hidden widths are chosen so that two experts cost what one dense
feed-forward layer of the same model costs: `--config.moe.every=0` is the dense baseline at equal
compute.

tiny and debug set mesh.expert=4, which virtual CPU devices provide. Override it on other devices,
for example with `--config.mesh.expert=1` for one GPU. small and base distribute the experts over
all devices.

The default run is 300 steps of 16 sequences of 128 bytes: 0.6 MB, a twentieth of the corpus, so
that held-out and training loss stay close and a gate is judged by what it learns. Expect about 1.65
nats per byte on held-out files (bigram 2.47, trigram 1.90) after three to four minutes on two
cores. debug starts from a badly balanced router and drops a third of its pairs; use it to check
that a command works.

Papers: Shazeer et al. 2017, arXiv 1701.06538 (the sparse layer); Lepikhin et al. 2020, arXiv
2006.16668 (experts over devices); Fedus et al. 2021, arXiv 2101.03961 (load-balancing loss and
router initialisation); Zoph et al. 2022, arXiv 2202.08906 (router z-loss); Jiang et al. 2024, arXiv
2401.04088 (the default gate, without Mixtral's losses: top-2 of 8, softmax over the two).

Override any field to vary the run: `--config.moe.capacity_factor=2.0`, `--config.train.seed=1`,
`--config.moe.gate.k=1`. `moejax config --config=configs/lm.py` lists them all.
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
        "mesh.expert": 4,
        "train.steps": 60,
        "train.batch_size": 8,
        "train.seq_len": 64,
        "train.eval_every": 20,
        "train.eval_rows": 16,
        "train.checkpoint_every": 20,
        "optim.learning_rate": 1e-2,
        "optim.warmup_steps": 10,
    },
    "tiny": {  # 192 wide, 4 layers, 300 steps of 16 x 128 bytes: the defaults
        "mesh.expert": 4,
    },
    "small": {
        "model.d_model": 512,
        "model.d_ff": 1408,
        "model.num_layers": 8,
        "model.num_heads": 8,
        "model.num_kv_heads": 8,
        "model.dtype": "bfloat16",
        "moe.d_ff": 704,
        "mesh.expert": -1,
        "train.steps": 10_000,
        "train.batch_size": 64,
        "train.seq_len": 1024,
        "train.eval_every": 500,
        "train.checkpoint_every": 500,
        "optim.learning_rate": 1e-3,
        "optim.warmup_steps": 500,
    },
    "base": {
        "model.d_model": 768,
        "model.d_ff": 3328,
        "model.num_layers": 12,
        "model.num_heads": 12,
        "model.num_kv_heads": 12,
        "model.dtype": "bfloat16",
        "model.remat": "dots",
        "moe.d_ff": 1664,
        "mesh.expert": -1,
        "train.steps": 50_000,
        "train.batch_size": 128,
        "train.seq_len": 1024,
        "train.eval_every": 1000,
        "train.checkpoint_every": 1000,
        "optim.learning_rate": 6e-4,
        "optim.warmup_steps": 1000,
    },
}


def get_config(arg: str | None = None) -> Config:
    options = parse_arg(arg, gate="top_k", size="tiny", experts=8)
    config = default()
    set_gate(config, options.gate)
    config.moe.num_experts = options.experts
    config.update_from_flattened_dict(choose("size", options.size, SIZES))
    return config

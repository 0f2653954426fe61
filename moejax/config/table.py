"""Every config field that is not a gate's own or a task's own, in one table, in reading order.

The config tree, the typing of overrides, the range checks, ``moejax config`` and ``docs/config.md``
are all read from it.
"""

from moejax.config.field import CPU_DEVICES, Field
from moejax.config.tasks import LANGUAGE, TASKS
from moejax.dispatch import TRANSPORTS, FlatMoEConfig
from moejax.types import PREDICTORS, PRIORITIES, SCOPES

ACTIVATIONS = ("swiglu", "gelu", "relu")
DEFAULT_GATE = "top_k"

SECTIONS: dict[str, str] = {
    "task": "What is learned, chosen by the config page; and the task's own fields.",
    "mesh": "How devices are arranged. One axis may be -1: it takes the devices left over.",
    "model": "The layers, and what is around them.",
    "moe": "The Mixture-of-Experts layers.",
    "moe.losses": "Weight of each auxiliary loss. Balance losses are 1 at perfect balance.",
    "moe.gate": "The gate's name and its own hyper-parameters; `moejax gates` lists them.",
    "train": "Length, batch and intervals. A step is one optimizer update.",
    "optim": "Optimizer and learning-rate schedule.",
    "data": "What is learned from.",
    "distributed": "Several processes.",
    "report": "What is written besides metrics.jsonl.",
}

FIELDS: dict[str, Field] = {
    "task.name": Field(LANGUAGE, "the page's task", choices=tuple(TASKS)),
    "mesh.data": Field(1, "replicas of the model", may_change=True),
    "mesh.fsdp": Field(1, "shards of every weight", may_change=True),
    "mesh.expert": Field(1, "shards of the experts", may_change=True),
    "mesh.tensor": Field(1, "shards of attention heads and hidden widths", may_change=True),
    "mesh.cpu_devices": Field(
        0,
        "virtual CPU devices per process (0: the mesh's product / processes)",
        low=0,
        high=CPU_DEVICES,
        may_change=True,
    ),
    "mesh.device_gib": Field(
        0.0,
        "GiB that a run may expect to take per device (0: what the device has)",
        low=0.0,
        may_change=True,
    ),
    "model.vocab_size": Field(0, "rows of the embedding (0: the tokenizer's)", low=0),
    "model.d_model": Field(192, "model width", low=1),
    "model.d_ff": Field(512, "hidden width of a dense FFN", low=1),
    "model.num_layers": Field(4, "attention + FFN layers", low=1),
    "model.num_heads": Field(4, "query heads", low=1),
    "model.num_kv_heads": Field(4, "key/value heads; fewer than num_heads: grouped queries", low=1),
    "model.head_dim": Field(0, "width of one head (0: d_model / num_heads)", low=0),
    "model.activation": Field("swiglu", "of a dense FFN", choices=ACTIVATIONS),
    "model.rope_theta": Field(10000.0, "base of the rotary position angles", above=0.0),
    "model.norm_eps": Field(1e-6, "added to the mean square in RMSNorm", above=0.0),
    "model.tie_embeddings": Field(True, "output matrix = embedding"),
    "model.dtype": Field(
        "float32",
        "of activations and matmuls; weights and router are float32",
        choices=("float32", "bfloat16"),
    ),
    "model.matmul_precision": Field(
        "default",
        "of float32 matmuls on TPU and GPU; the router's are always exact",
        choices=("default", "tensorfloat32", "high", "highest"),
    ),
    "model.remat": Field(
        "none",
        "what backward recomputes: nothing, the cheap, experts too, exchanges too, everything",
        choices=("none", "experts", "exchange", "dots", "full"),
    ),
    "model.attention": Field("auto", "implementation", choices=("auto", "xla", "cudnn")),
    "model.mod_capacity": Field(
        0.0,
        "Mixture-of-Depths: share of tokens a routed block computes (0: off)",
        low=0.0,
        high=1.0,
    ),
    "model.mod_every": Field(2, "Mixture-of-Depths: every n-th block is routed", low=1),
    "model.mod_predictor": Field(
        "mlp", "Mixture-of-Depths: who decides in evaluation", choices=PREDICTORS
    ),
    "model.moa_experts": Field(
        0, "Mixture of Attention heads: heads to choose from (0: ordinary attention)", low=0
    ),
    "model.moa_k": Field(2, "Mixture of Attention heads: heads per token", low=1),
    "moe.num_experts": Field(8, "experts per MoE layer", low=1),
    "moe.d_ff": Field(256, "hidden width of one expert", low=1),
    "moe.every": Field(1, "every n-th layer is an MoE layer (0: none, a dense model)", low=0),
    "moe.first_dense": Field(0, "layers at the bottom that stay dense", low=0),
    "moe.shared_experts": Field(0, "experts of width moe.d_ff that every token visits", low=0),
    "moe.shared_gate": Field(False, "weigh the shared experts by a sigmoid of the token"),
    "moe.residual": Field(
        False,
        "weigh routed and shared experts by a softmax of the token (DeepSpeed's residual MoE)",
    ),
    "moe.activation": Field("swiglu", "of an expert", choices=ACTIVATIONS),
    "moe.transport": Field(
        FlatMoEConfig.transport, "how tokens travel in training", choices=TRANSPORTS
    ),
    "moe.capacity_factor": Field(
        FlatMoEConfig.capacity_factor,
        "cells: slots per expert / mean load, in training",
        above=0.0,
    ),
    "moe.eval_transport": Field(
        FlatMoEConfig.eval_transport, "how tokens travel in evaluation", choices=TRANSPORTS
    ),
    "moe.eval_capacity_factor": Field(
        FlatMoEConfig.eval_capacity_factor,
        "cells: slots per expert / mean load, in evaluation",
        above=0.0,
    ),
    "moe.priority": Field(
        FlatMoEConfig.priority, "who keeps a slot when an expert is full", choices=PRIORITIES
    ),
    "moe.reroute": Field(
        FlatMoEConfig.reroute,
        "cells: times an overflowing pair tries its next-best expert (0: dropped)",
        low=0,
    ),
    "moe.group": Field(
        FlatMoEConfig.group,
        "tokens routed together: sequence, a number of sequences (as '4'), or batch",
    ),
    "moe.balance_scope": Field(
        "sequence", "tokens over which balance losses take their means", choices=SCOPES
    ),
    "moe.allow_future_leak": Field(
        False, "run although evaluation lets a token see later tokens; results are marked"
    ),
    "moe.losses.load_balance": Field(0.01, "Switch's load-balancing loss", low=0.0),
    "moe.losses.z": Field(0.001, "router z-loss: mean squared logsumexp of the logits", low=0.0),
    "moe.losses.importance": Field(0.0, "Shazeer's importance loss", low=0.0),
    "moe.losses.load": Field(0.0, "Shazeer's load loss", low=0.0),
    "moe.losses.mod_predictor": Field(
        0.01, "Mixture-of-Depths: cross-entropy of what is predicted and chosen", low=0.0
    ),
    "moe.losses.moa_load_balance": Field(
        0.01, "Switch's load-balancing loss, of attention heads", low=0.0
    ),
    "moe.losses.moa_z": Field(0.001, "router z-loss, of attention heads", low=0.0),
    "moe.losses.policy": Field(0.0, "REINFORCE, of gates trained by policy", low=0.0),
    "moe.losses.baseline": Field(0.0, "squared error of the expected reward", low=0.0),
    "moe.losses.consistency": Field(
        0.0,
        "symmetric KL of two passes with different noise (above 0: training runs twice)",
        low=0.0,
    ),
    "moe.losses.local_entropy_0": Field(0.0, "LIMoE: decided routing, of images", low=0.0),
    "moe.losses.local_entropy_1": Field(0.0, "LIMoE: decided routing, of text", low=0.0),
    "moe.losses.global_entropy_0": Field(0.0, "LIMoE: spread routing, of images", low=0.0),
    "moe.losses.global_entropy_1": Field(0.0, "LIMoE: spread routing, of text", low=0.0),
    "moe.gate.name": Field(
        DEFAULT_GATE,
        "a name from `moejax gates`, or my_package.module:MyGate",
        before="mixtral",  # which was the same gate and set nothing else
    ),
    "train.steps": Field(300, "optimizer updates", low=1, may_change=True),
    "train.batch_size": Field(16, "sequences per step, over all devices", low=1),
    "train.seq_len": Field(128, "tokens per sequence", low=1),
    "train.seed": Field(0, "of initial weights, data order and noise", low=0, high=2**32 - 1),
    "train.grad_accum": Field(1, "micro-batches per step", low=1),
    "train.log_every": Field(10, "steps between rows of metrics.jsonl", low=1, may_change=True),
    "train.eval_every": Field(100, "steps between evaluations", low=1, may_change=True),
    "train.eval_rows": Field(256, "held-out sequences per evaluation", low=1, may_change=True),
    "train.checkpoint_every": Field(100, "steps between checkpoints", low=1, may_change=True),
    "train.keep_checkpoints": Field(2, "newest checkpoints kept", low=1, may_change=True),
    "train.init_from": Field("", "workdir whose weights the run starts from (empty: random)"),
    "optim.name": Field("adamw", "optimizer", choices=("adamw", "muon", "lion", "adafactor")),
    "optim.learning_rate": Field(3e-3, "peak learning rate", above=0.0, may_change=True),
    "optim.weight_decay": Field(0.1, "decoupled, on matrices", low=0.0, may_change=True),
    "optim.b1": Field(0.9, "decay of the first moment", low=0.0, below=1.0),
    "optim.b2": Field(0.95, "decay of the second moment", low=0.0, below=1.0),
    "optim.eps": Field(1e-8, "added to the root of the second moment", above=0.0),
    "optim.schedule": Field(
        "cosine", "after warm-up", choices=("cosine", "wsd", "constant"), may_change=True
    ),
    "optim.warmup_steps": Field(50, "steps from 0 to the peak", low=0),
    "optim.decay_steps": Field(
        0, "steps that the schedule stretches over (0: train.steps)", low=0, may_change=True
    ),
    "optim.decay_fraction": Field(
        0.2, "wsd: share of the steps in the decay", low=0.0, high=1.0, may_change=True
    ),
    "optim.final_fraction": Field(
        0.1, "final / peak learning rate", low=0.0, high=1.0, may_change=True
    ),
    "optim.clip_norm": Field(
        1.0, "largest global gradient norm (0: off)", low=0.0, may_change=True
    ),
    "optim.output_z_loss": Field(0.0, "weight of the z-loss on the output logits", low=0.0),
    "data.path": Field("", "a text file or a folder (empty: the built-in corpus)"),
    "data.tokenizer": Field("", "a tokenizer.json (empty: bytes)"),
    "data.eval_fraction": Field(0.05, "share of the data held out", above=0.0, below=1.0),
    "data.split": Field(
        "bytes",
        "the share held out is of bytes, or of documents as up to version 0.1.0",
        choices=("bytes", "documents"),
        before="documents",
    ),
    "data.eval_path": Field("", "a held-out text (empty: what data.path says, or a share of it)"),
    "distributed.mode": Field(
        "auto",
        "auto: join the processes a launcher started, if one did",
        choices=("auto", "off", "explicit"),
        may_change=True,
    ),
    "distributed.coordinator": Field("", "explicit: host:port of process 0", may_change=True),
    "distributed.num_processes": Field(0, "explicit: processes in all", low=0, may_change=True),
    "distributed.process_id": Field(-1, "explicit: this process, from 0", low=-1, may_change=True),
    "report.tensorboard": Field(
        False, "also TensorBoard events (pip install moejax[tensorboard])", may_change=True
    ),
    "report.wandb": Field(
        False, "also Weights & Biases (pip install moejax[wandb])", may_change=True
    ),
    "report.progress": Field(True, "progress bar on a terminal", may_change=True),
    "report.probe_rows": Field(
        32, "held-out sequences whose routing is recorded (0: none)", low=0, may_change=True
    ),
    "report.compile_cache": Field(
        "auto", "compiled programs: auto (user's cache), off, or folder", may_change=True
    ),
}

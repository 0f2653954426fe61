"""The table of all config fields but those of a gate or a task, in reading order.

Fields of layers come from ``moejax.options``. The config tree, the typing of overrides, the range
checks, ``moejax config`` and ``docs/config.md`` are all made from this table.
"""

from collections.abc import Iterable

from moejax.config.field import CPU_DEVICES, Field
from moejax.config.tasks import LANGUAGE, TASKS
from moejax.options import (
    AttentionOptions,
    DepthsOptions,
    DispatchOptions,
    FFNOptions,
    HeadsOptions,
    LatentOptions,
    MoEOptions,
    Options,
    RopeOptions,
    StackOptions,
    TextOptions,
    option_fields,
)

DEFAULT_GATE = "top_k"

SECTIONS: dict[str, str] = {
    "task": "The task, chosen by the config page, and its own fields.",
    "mesh": "How devices are arranged. One axis may be -1: it takes the devices left over.",
    "model": "The layers, embedding and output.",
    "moe": "The Mixture-of-Experts layers.",
    "moe.losses": "Weight of each auxiliary loss. Balance losses are 1 at perfect balance.",
    "moe.gate": "The gate's name and its own hyper-parameters; `moejax gates` lists them.",
    "train": "Length, batch and intervals. A step is one optimizer update.",
    "optim": "Optimizer and learning-rate schedule.",
    "data": "The training and held-out data.",
    "distributed": "How processes find each other.",
    "report": "Output besides metrics.jsonl.",
}

PREFIXES: dict[type[Options], str] = {
    StackOptions: "model.",
    AttentionOptions: "model.",
    RopeOptions: "model.rope_",
    TextOptions: "model.",
    FFNOptions: "model.",
    DepthsOptions: "model.mod_",
    LatentOptions: "model.mla_",
    HeadsOptions: "model.moa_",
    DispatchOptions: "moe.",
    MoEOptions: "moe.",
}
"""The classes of ``moejax.options`` whose options are config fields, with the names' prefixes."""

RENAMED = {
    "model.implementation": "model.attention",
    "model.scale": "model.attention_scale",
    "model.bias": "model.attention_bias",
    "model.score_cap": "model.attention_score_cap",
    "model.sinks": "model.attention_sinks",
    "model.dense_layers": "moe.dense_layers",
    "model.every": "moe.every",
    "model.first_dense": "moe.first_dense",
}

READING_ORDER = tuple(
    f"{section}.{name}"
    for section, names in {
        "model": "vocab_size d_model d_ff num_layers num_heads num_kv_heads head_dim activation "
        "rope_theta norm_eps tie_embeddings dtype matmul_precision remat attention",
        "moe": "num_experts d_ff every first_dense shared_experts shared_gate residual activation "
        "transport capacity_factor eval_transport eval_capacity_factor priority reroute group "
        "balance_scope",
    }.items()
    for name in names.split()
)
"""Fields that several classes contribute to. An option that is not listed follows the option before
it in its class."""


def names_of(options: type[Options]) -> dict[str, str]:
    """The config names of a class's options, by option."""
    prefix = next(PREFIXES[base] for base in options.__mro__ if base in PREFIXES)
    names = {field.name: f"{prefix}{field.name}" for field in option_fields(options)}
    return {option: RENAMED.get(name, name) for option, name in names.items()}


def _of_options(section: str, others: dict[str, Field]) -> Iterable[tuple[str, Field]]:
    """The fields of a section in reading order: those of the layers' options, and ``others``."""
    fields, order = dict(others), [*READING_ORDER]
    for options in PREFIXES:
        before, names = "", names_of(options)
        for entry in option_fields(options):
            name, allowed = names[entry.name], vars(entry.metadata["allowed"])
            fields[name] = Field(entry.default, entry.metadata["comment"], **allowed)
            if name not in order:
                order.insert(order.index(before) + 1 if before else len(order), name)
            before = name
    return ((name, fields[name]) for name in order if name.startswith(f"{section}."))


FIELDS: dict[str, Field] = {
    "task.name": Field(LANGUAGE, "task of the config page", choices=tuple(TASKS)),
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
        "GiB per device that a run may take (0: the memory of the device)",
        low=0.0,
        may_change=True,
    ),
    **dict(
        _of_options(
            "model",
            {
                "model.vocab_size": Field(0, "rows of the embedding (0: the tokenizer's)", low=0),
                "model.matmul_precision": Field(
                    "default",
                    "precision of float32 matmuls on TPU and GPU; the router's are exact",
                    choices=("default", "tensorfloat32", "high", "highest"),
                ),
            },
        )
    ),
    **dict(_of_options("moe", {})),
    "moe.replay": Field(
        "", "file of expert ids that tokens follow, weighed by the router (empty: it chooses)"
    ),
    "moe.allow_future_leak": Field(
        False, "run although evaluation lets a token see later tokens; results are marked"
    ),
    "moe.losses.load_balance": Field(0.01, "Switch's load-balancing loss", low=0.0),
    "moe.losses.z": Field(0.001, "router z-loss: mean squared logsumexp of the logits", low=0.0),
    "moe.losses.importance": Field(0.0, "Shazeer's importance loss", low=0.0),
    "moe.losses.load": Field(0.0, "Shazeer's load loss", low=0.0),
    "moe.losses.mod_predictor": Field(
        0.01, "Mixture-of-Depths: cross-entropy of the predicted choice", low=0.0
    ),
    "moe.losses.moa_load_balance": Field(
        0.01, "Switch's load-balancing loss for attention heads", low=0.0
    ),
    "moe.losses.moa_z": Field(0.001, "router z-loss for attention heads", low=0.0),
    "moe.losses.policy": Field(0.0, "REINFORCE, for gates trained by policy gradient", low=0.0),
    "moe.losses.baseline": Field(0.0, "squared error of the expected reward", low=0.0),
    "moe.losses.consistency": Field(
        0.0,
        "symmetric KL of two passes with different noise (above 0: training runs twice)",
        low=0.0,
    ),
    "moe.losses.local_entropy_0": Field(0.0, "LIMoE: confident routing of image tokens", low=0.0),
    "moe.losses.local_entropy_1": Field(0.0, "LIMoE: confident routing of text tokens", low=0.0),
    "moe.losses.global_entropy_0": Field(0.0, "LIMoE: spread routing of image tokens", low=0.0),
    "moe.losses.global_entropy_1": Field(0.0, "LIMoE: spread routing of text tokens", low=0.0),
    "moe.gate.name": Field(
        DEFAULT_GATE,
        "a name from `moejax gates`, or my_package.module:MyGate",
        before="mixtral",  # which was the same gate and set nothing else
    ),
    "train.steps": Field(300, "optimizer updates", low=1, may_change=True),
    "train.batch_size": Field(16, "sequences per step, over all devices", low=1),
    "train.seq_len": Field(128, "tokens per sequence", low=1),
    "train.seed": Field(0, "seed of initial weights, data order and noise", low=0, high=2**32 - 1),
    "train.grad_accum": Field(1, "micro-batches per step", low=1),
    "train.log_every": Field(10, "steps between rows of metrics.jsonl", low=1, may_change=True),
    "train.eval_every": Field(100, "steps between evaluations", low=1, may_change=True),
    "train.eval_rows": Field(256, "held-out sequences per evaluation", low=1, may_change=True),
    "train.checkpoint_every": Field(100, "steps between checkpoints", low=1, may_change=True),
    "train.keep_checkpoints": Field(2, "newest checkpoints kept", low=1, may_change=True),
    "train.init_from": Field("", "workdir whose weights the run starts from (empty: random)"),
    "optim.name": Field(
        "adamw", "optimizer", choices=("adamw", "muon", "lion", "adafactor", "sgd")
    ),
    "optim.learning_rate": Field(3e-3, "peak learning rate", above=0.0, may_change=True),
    "optim.weight_decay": Field(
        0.1, "decoupled weight decay of matrices", low=0.0, may_change=True
    ),
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
    "data.path": Field(
        "", "files, folders or globs, with commas between (empty: the built-in data)"
    ),
    "data.mixture": Field(
        "", "several texts instead of one: {'web': ('web/*.jsonl', 0.7), 'code': ('code/', 0.3)}"
    ),
    "data.text_field": Field("text", "the field or column of a record that holds its text"),
    "data.tokenizer": Field(
        "", "a tokenizer.json, a folder with one, or a SentencePiece file (empty: bytes)"
    ),
    "data.bos": Field(
        "auto",
        "auto: the token that the tokenizer puts before a text begins every document",
        choices=("auto", "none"),
        before="none",
    ),
    "data.packing": Field(
        "none",
        "rows of text: none (windows of all documents joined), or whole documents, each for itself",
        choices=("none", "greedy", "best_fit"),
    ),
    "data.stream": Field(False, "read the text while training, for one that memory cannot hold"),
    "data.duplicates": Field(
        "drop",
        "documents that occur twice, or on both sides of the split: drop, or keep",
        choices=("drop", "keep"),
        before="keep",
    ),
    "data.on_error": Field(
        "fail",
        "a record that cannot be read ends the run (fail), or is left out and counted (skip)",
        choices=("fail", "skip"),
    ),
    "data.eval_fraction": Field(0.05, "share of the data held out", above=0.0, below=1.0),
    "data.split": Field(
        "bytes",
        "unit of the held-out share: bytes, or documents (as up to version 0.1.0)",
        choices=("bytes", "documents"),
        before="documents",
    ),
    "data.eval_path": Field(
        "", "a held-out text (empty: the held-out part of data.path, or a share of it)"
    ),
    "distributed.mode": Field(
        "auto",
        "auto: join the processes a launcher started, if one did",
        choices=("auto", "off", "explicit"),
        may_change=True,
    ),
    "distributed.coordinator": Field("", "explicit: host:port of process 0", may_change=True),
    "distributed.num_processes": Field(0, "explicit: number of processes", low=0, may_change=True),
    "distributed.process_id": Field(
        -1, "explicit: index of this process, from 0", low=-1, may_change=True
    ),
    "report.tensorboard": Field(
        False, "write TensorBoard events too (pip install moejax[tensorboard])", may_change=True
    ),
    "report.wandb": Field(
        False, "log to Weights & Biases too (pip install moejax[wandb])", may_change=True
    ),
    "report.progress": Field(True, "progress bar on a terminal", may_change=True),
    "report.probe_rows": Field(
        32, "held-out sequences whose routing is recorded (0: none)", low=0, may_change=True
    ),
    "report.compile_cache": Field(
        "auto", "compiled programs: auto (user's cache), off, or folder", may_change=True
    ),
}

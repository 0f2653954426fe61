"""Text to typed values: ``--config.path.to.field=value`` flags and ``key=value`` config arguments.

A value's type is that of the field's default, never guessed from the text.
"""

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal, InvalidOperation
from types import SimpleNamespace
from typing import Any

from moejax import gating
from moejax.config.field import Field
from moejax.config.table import FIELDS
from moejax.config.tree import Config, set_field, set_gate, table_of
from moejax.errors import UserError, suggest

PREFIX = "--config."
GATE_NAME = "moe.gate.name"
TASK_NAME = "task.name"
_TRUTH = {
    **dict.fromkeys(("true", "yes", "on", "1"), True),
    **dict.fromkeys(("false", "no", "off", "0"), False),
}
_EXPECTED = {
    bool: "true or false (bool)",
    int: "a whole number (int)",
    float: "a number (float)",
    tuple: "numbers separated by commas (tuple)",
}


def take_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split a command line into its overrides, each as ``--config.field=value``, and the rest.

    ``--config.field value`` in two words is joined.

    Raises:
      UserError: an override without a value.
    """
    overrides, rest, words = [], [], iter(argv)
    for word in words:
        if not word.startswith(PREFIX):
            rest.append(word)
            continue
        if "=" not in word:
            value = next(words, None)
            if value is None or value.startswith("--"):
                raise UserError(f"{word} needs a value: {word}=VALUE")
            word = f"{word}={value}"
        overrides.append(word)
    return overrides, rest


def apply_overrides(config: Config, overrides: Sequence[str]) -> None:
    """Set the fields that overrides name, in order, but ``moe.gate.name`` first.

    A new gate brings its own fields and its preset; the other overrides are set afterwards and
    win. Naming the gate that the config already has changes nothing.

    Raises:
      UserError: an unknown field, a section, or a value of the wrong type.
    """
    pairs = [_split(override) for override in overrides]
    for name, text in pairs:
        if name == TASK_NAME and text != config.task.name:
            raise UserError(
                f"{TASK_NAME}={text} is chosen by the config page, and this one's is "
                f"{config.task.name!r}; name another page, such as configs/vit.py"
            )
    for name, text in pairs:
        if name == GATE_NAME and text != config.moe.gate.name:
            set_gate(config, text)
    table = table_of(config)
    for name, text in pairs:
        if name == GATE_NAME:
            continue
        if name not in table:
            raise UserError(unknown_field(name, table, config))
        set_field(config, name, parse_value(name, text, table[name].default))


def _split(override: str) -> tuple[str, str]:
    name, *text = re.split(r"[=\s]", override.removeprefix(PREFIX), maxsplit=1)
    if not text:
        raise UserError(f"override {override!r} needs a value: {PREFIX}{name}=VALUE")
    return name, text[0]


def parse_value(name: str, text: str, default: Any) -> Any:
    """Parse ``text`` as a value of the type of ``default``.

    Raises:
      UserError: naming the field, the text and the type expected.
    """
    try:
        return _typed(text, default)
    except ValueError:
        expected = _EXPECTED[type(default)]
        raise UserError(f"{name}={text!r} must be {expected}, such as {_show(default)}") from None


def _typed(text: str, default: Any) -> Any:
    if isinstance(default, bool):
        if text.strip().lower() not in _TRUTH:
            raise ValueError(text)
        return _TRUTH[text.strip().lower()]
    if isinstance(default, tuple):
        kind = default[0] if default else 0
        parts = text.strip().strip("()[]").split(",")
        return tuple(_typed(part, kind) for part in parts if part.strip())
    if isinstance(default, float):
        value = float(text)
        if not math.isfinite(value):
            raise ValueError(text)
        return value
    return _whole(text) if isinstance(default, int) else type(default)(text)


def _whole(text: str) -> int:
    """A whole number, however it is written: 1000, 1_000, 1e3, 1000.0."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        float(text)  # Decimal takes 1__0
        number = Decimal(text)
    except InvalidOperation:  # such as 1e-99999999999999999999
        raise ValueError(text) from None
    if not number.is_finite() or number.adjusted() > 30 or number != number.to_integral_value():
        raise ValueError(text)
    return int(number)


def _show(value: Any) -> str:
    return ",".join(map(str, value)) or "1,2" if isinstance(value, tuple) else str(value).lower()


def unknown_field(name: str, table: Mapping[str, Field], config: Config) -> str:
    """The message about a dotted name that is no field: the nearest name, or those that exist."""
    gate, task = config.moe.gate.name, config.task.name
    if name in FIELDS:
        return f"{name} means nothing to task {task!r}, which does not use it; leave it out"
    below = [field for field in table if field.startswith(f"{name}.")]
    if below:
        return (
            f"{name} is a section, not a field; set one of its fields, such as "
            f"{PREFIX}{below[0]}={_show(table[below[0]].default)}"
        )
    section, _, leaf = name.rpartition(".")
    if section == "moe.gate":
        if (other := known_as(name, table)).startswith("moe.gate."):
            return f"{name} is not a config field; did you mean {other!r}?"
        own = {field.rpartition(".")[2] for field in table if field.startswith("moe.gate.")}
        others = [other for other in gating.names() if leaf in gating.fields(other)]
        has_it = f" (a field of gate {', '.join(others)})" if others else ""
        return f"{name}: gate {gate!r} has no field {leaf!r}{has_it}; {suggest(leaf, own)}"
    close = _nearest(name, table)
    if close:
        return f"{name} is not a config field; did you mean {close!r}?"
    siblings = [field for field in table if field.rpartition(".")[0] == section]
    if section and siblings:
        return f"{name} is not a config field; fields of {section}: {', '.join(siblings)}"
    top = sorted({field.partition(".")[0] for field in table})
    return f"{name} is not a config field; sections: {', '.join(top)} (see `moejax config`)"


def _nearest(name: str, table: Mapping[str, Field]) -> str:
    """The field closest to ``name``: by its last part in any section, a synonym, or as a whole."""
    return known_as(name, table) or next(iter(difflib.get_close_matches(name, table, n=1)), "")


def known_as(name: str, table: Mapping[str, Field]) -> str:
    """The field that has the last part of ``name`` as its own, in any section, or as a synonym."""
    if name in table:
        return name
    leaf = name.rpartition(".")[2].replace("-", "_").lower()
    for field in table:
        if field.rpartition(".")[2] == leaf:
            return field
    synonym = next((field for field, words in SYNONYMS.items() if leaf in words.split()), "")
    return synonym if synonym in table else ""


SYNONYMS: dict[str, str] = {
    "optim.learning_rate": "lr rate max_lr peak_lr base_lr eta alpha step_size",
    "optim.weight_decay": "wd decay l2 weightdecay",
    "optim.b1": "beta1 beta_1 adam_beta1 betas momentum",
    "optim.b2": "beta2 beta_2 adam_beta2",
    "optim.eps": "epsilon adam_eps adam_epsilon",
    "optim.name": "optimizer optimiser opt",
    "optim.schedule": "scheduler lr_schedule lr_scheduler lr_scheduler_type",
    "optim.warmup_steps": "warmup warm_up warmup_iters num_warmup_steps lr_warmup",
    "optim.clip_norm": "clip clipping grad_clip clip_grad max_grad_norm grad_norm",
    "optim.final_fraction": "min_lr final_lr end_lr lr_min",
    "train.batch_size": "bs batch batchsize batch_sz global_batch_size micro_batch_size",
    "train.steps": "step num_steps n_steps max_steps total_steps train_steps iters num_iters "
    "max_iters iterations epochs num_epochs n_epochs epoch",
    "train.seq_len": "seq seqlen seq_length sequence_length context context_length ctx ctx_len "
    "block_size max_len max_length max_seq_len length",
    "train.seed": "random_seed rng prng rng_seed",
    "train.grad_accum": "accum accumulation grad_acc gradient_accumulation accumulate_grad_batches "
    "gradient_accumulation_steps grad_accum_steps microbatches",
    "train.log_every": "log_interval log_steps logging_steps log_freq",
    "train.eval_every": "eval_interval eval_steps eval_freq val_every",
    "train.eval_rows": "eval_size eval_samples eval_batches eval_iters",
    "train.checkpoint_every": "save_every save_steps save_interval checkpoint_interval ckpt_every",
    "train.keep_checkpoints": "save_total_limit keep max_to_keep",
    "train.init_from": "init pretrained resume_from load_from checkpoint init_checkpoint",
    "model.d_model": "dim width hidden hidden_size n_embd embed_dim emb_dim model_dim d",
    "model.d_ff": "ffn ffn_dim intermediate_size mlp_dim hidden_dim ff",
    "model.num_layers": "layers n_layers n_layer depth num_hidden_layers num_blocks blocks",
    "model.num_heads": "heads n_heads n_head num_attention_heads",
    "model.num_kv_heads": "kv_heads n_kv_heads num_key_value_heads",
    "model.vocab_size": "vocab n_vocab num_tokens",
    "model.dtype": "precision bf16 mixed_precision compute_dtype amp fp16",
    "model.remat": "checkpointing gradient_checkpointing recompute activation_checkpointing",
    "model.activation": "act act_fn hidden_act",
    "model.attention": "attn attn_implementation flash flash_attention",
    "moe.num_experts": "experts n_experts num_local_experts n_routed_experts e",
    "moe.gate.k": "top_k topk num_experts_per_tok experts_per_token moe_topk",
    "moe.gate.name": "gate gating router gate_name",
    "moe.capacity_factor": "capacity cf capacity_fac",
    "moe.losses.load_balance": "aux aux_loss aux_loss_coef router_aux_loss_coef balance lb_loss",
    "moe.losses.z": "z_loss zloss router_z_loss_coef",
    "moe.transport": "dispatch dispatcher",
    "mesh.data": "dp data_parallel devices gpus num_gpus n_gpus",
    "mesh.expert": "ep expert_parallel ep_size",
    "mesh.tensor": "tp tensor_parallel tp_size mp model_parallel",
    "data.path": "dataset corpus train_path text data_path dataset_path data_dir",
    "data.tokenizer": "tok tokenizer_path",
    "data.eval_fraction": "val_fraction valid_fraction test_size val_split split_fraction",
    "report.compile_cache": "cache compilation_cache",
}
"""Names of the fields in other frameworks."""


def parse_arg(arg: str | None, **defaults: Any) -> Any:
    """A config argument ``key=value,key=value`` as an object with an attribute for every key.

    ``options = parse_arg(arg, gate="mixtral", experts=8, debug=False)`` in ``get_config(arg)``
    gives ``options.gate``, ``options.experts`` and ``options.debug``, each of its default's type. A
    key on its own sets a bool to True: ``page.py:debug,experts=16``.

    Raises:
      UserError: an unknown key, one given twice, one without a value, or a value of another type.
    """
    values, given = dict(defaults), set()
    for item in filter(None, (arg or "").split(",")):
        key, equals, text = (part.strip() for part in item.partition("="))
        if key not in defaults:
            hint = suggest(key, defaults)
            raise UserError(f"config argument {arg!r}: unknown key {key!r}; {hint}")
        if key in given:
            raise UserError(f"config argument {arg!r}: {key!r} is given twice; keep one")
        given.add(key)
        if equals:
            values[key] = parse_value(f"config argument {key}", text, defaults[key])
        elif isinstance(defaults[key], bool):
            values[key] = True
        else:
            raise UserError(f"config argument {arg!r}: {key!r} needs a value: {key}=VALUE")
    return SimpleNamespace(**values)


def choose(name: str, value: str, options: Mapping[str, Any]) -> Any:
    """``options[value]``, for a config page's own choices (a size, a data set).

    Raises:
      UserError: an unknown value; the message lists the valid ones.
    """
    if value not in options:
        raise UserError(f"{name}={value!r} is unknown; {suggest(value, options)}")
    return options[value]


def check_fields(config: Config, flat: Mapping[str, Any], origin: str, remedy: str) -> None:
    """Check that a config has exactly the fields of the table, with values of their types.

    Raises:
      UserError: naming ``origin`` and the first field that is wrong, with ``remedy`` if missing.
    """
    table = table_of(config)
    for name in flat:
        if name not in table:
            raise UserError(f"{origin}: {unknown_field(name, table, config)}")
    for name, field in table.items():
        if name not in flat:
            raise UserError(f"{origin}: {name} is missing; {remedy}")
        if type(flat[name]) is not field.type:
            expected = _EXPECTED.get(field.type, "text (str)")
            raise UserError(f"{origin}: {name}={flat[name]!r} must be {expected}")

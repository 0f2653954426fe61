"""Options of layers as config fields, and the one line that adds an option."""

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moejax import config as configs
from moejax.config import FIELDS, default
from moejax.config.build import NESTED, options_of, stack_options
from moejax.config.overrides import apply_overrides
from moejax.config.table import PREFIXES, names_of
from moejax.dispatch import Cells, Gather
from moejax.errors import UserError
from moejax.options import (
    AttentionOptions,
    DispatchOptions,
    RopeOptions,
    StackOptions,
    TextOptions,
    option_fields,
    renamed,
)
from moejax.tasks.language.model import LMConfig
from moejax.types import MoEConfig

PACKAGE = Path(configs.__file__).parents[1]
ANCHOR = "    causal: bool = True\n"
EXPERTS = "    vocab_size: int = 0\n"
NOISE = '    noise: bool = option(False, "add noise to the experts")\n'
REACH = '    reach: int = option(0, "tokens a query looks back (0: all)", low=0)\n'
SET = """
import jax
from flax import nnx
from moejax import MoE
from moejax.config import FIELDS, default, table_of, validate
from moejax.config.build import stack_options
from moejax.config.overrides import apply_overrides
from moejax.models.stack import Stack

config = default()
apply_overrides(config, ["--config.model.reach=3"])
validate(config)
stack = nnx.eval_shape(lambda: Made(stack_options(config)))
for block in stack.periods.blocks:
    assert block.attention.options.reach == 3
assert MoE(8, 8, 2, gate="top_k", rngs=nnx.Rngs(0)).options.noise is False
print(*FIELDS)
apply_overrides(config, ["--config.model.reach=-1"])
validate(config)
""".replace(
    "config = default()",
    """
class Made(Stack):
    def __init__(self, options):
        self.build_layers(options, nnx.Rngs(0))


config = default()""",
)


def test_one_line_in_the_table_of_options_adds_a_config_field_that_reaches_the_layer(tmp_path):
    """A copy of the package with new options of attention, set as a command line sets it, and of
    the experts, which ``MoE`` has without a keyword argument for it."""
    shutil.copytree(PACKAGE, tmp_path / "moejax", ignore=shutil.ignore_patterns("__pycache__"))
    table = tmp_path / "moejax" / "options.py"
    text = table.read_text()
    assert text.count(ANCHOR) == text.count(EXPERTS) == 1
    table.write_text(text.replace(ANCHOR, REACH + ANCHOR).replace(EXPERTS, NOISE + EXPERTS))
    done = subprocess.run(
        [sys.executable, "-c", SET], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    names = done.stdout.split()
    assert set(names) == {*FIELDS, "model.reach", "moe.noise"}, done.stderr
    # In reading order it follows the option before it in its class.
    assert names.index("model.reach") == names.index("model.attention") + 1
    assert "UserError: model.reach=-1 must be >= 0; default 0" in done.stderr


def config_with(*overrides):
    config = default()
    apply_overrides(config, overrides)
    return config


OTHER = {bool: True, int: 7, float: 0.625, str: "x"}
FITTING = {
    "model.dtype": "bfloat16",
    "model.remat": "dots",
    "model.attention": "xla",
    "model.d_model": 32,
    "model.num_heads": 8,
    "model.num_kv_heads": 2,
    "model.head_dim": 8,
    "model.activation": "gelu",
    "model.num_layers": 6,
    "model.attention_bias": "all",
    "model.qk_norm": "head",
    "model.window_kind": "chunk",
    "model.rope_scaling": "yarn",
    "model.norm": "layer",
    "model.norm_place": "both",
    "model.global_every": 1,
    "model.mla_rope_width": 16,
    "model.rope_share": 0.5,
    "model.rope_factor": 4.0,
    "model.rope_high_turns": 8.0,
    "moe.dense_layers": "2",
    "model.mod_every": 1,
    "model.mod_predictor": "router",
    "model.moa_k": 3,
    "moe.every": 2,
    "moe.first_dense": 1,
    "moe.shared_experts": 2,
    "moe.activation": "relu",
    "moe.balance_scope": "batch",
    "moe.residual": False,
    "model.rope_whole_pairs": False,
    "model.rope_short_factors": "1,2",
    "model.rope_long_factors": "1,3",
    "model.tie_embeddings": False,
    "model.global_rope": False,
    "moe.transport": "gather",
    "moe.eval_transport": "cells",
    "moe.priority": "gate",
    "moe.group": "4",
}


ORDINARY = {"model.mla_kv_rank": 0, "model.moa_experts": 0, "model.mod_capacity": 0.0}
CHOSEN = {"model.attention_bias": "none", "model.qk_norm": "none", "model.attention_sinks": False,
          "model.temperature": 0.0, "model.window": 0}  # fmt: skip
"""Options of ordinary attention that other kinds of attention, or Mixture-of-Depths, refuse."""


@pytest.mark.parametrize(
    "fixed",
    [
        ORDINARY,
        {**CHOSEN, "model.moa_experts": 0, "model.global_rope": True},
        {**CHOSEN, "model.mla_kv_rank": 0},
    ],
    ids=["attention", "latent attention", "mixture of heads"],
)
def test_every_layer_field_sets_its_own_option_and_no_other(fixed):
    names = {name for options in PREFIXES for name in names_of(options).values()}
    wanted = {n: FITTING.get(n, OTHER[FIELDS[n].type]) for n in names} | fixed
    given = (f"{name}={value}" for name, value in wanted.items())
    config = config_with("moe.gate.k=1", *given)  # moe.weigh_input asks for it
    text = options_of(config, TextOptions)
    stack = stack_options(config, LMConfig, text=text)
    parts = {StackOptions: stack, RopeOptions: stack.attention.rope, TextOptions: text}
    parts |= {kind: getattr(stack, f) for f, kind in NESTED.items()}
    assert {*parts, DispatchOptions} == set(PREFIXES)
    for kind, part in parts.items():
        for option, name in names_of(kind).items():
            assert getattr(part, option) == wanted[name], name
    cells = Cells(capacity_factor=0.625, priority="gate", reroute=7)
    assert stack.moe == MoEConfig(7, Gather(), cells, "4")
    changed = [name for name in names if wanted[name] != FIELDS[name].default]
    assert set(names) - set(changed) == {"moe.residual", *fixed}


def test_config_defaults_equal_option_defaults_and_a_default_config_builds_them():
    stack = stack_options(default())
    given = {"gate": stack.gate, "config": stack.moe}
    for field, kind in NESTED.items():
        assert getattr(stack, field) == kind(**(given if field == "experts" else {}))
    for kind in PREFIXES:
        for field in option_fields(kind):
            assert FIELDS[names_of(kind)[field.name]].default == field.default


def test_a_task_without_a_field_decides_the_option_itself():
    stack = stack_options(
        default("images"),
        attention={"causal": False, "rope": RopeOptions(theta=None)},
        experts={"num_tasks": 3},
    )
    assert (stack.attention.causal, stack.attention.rope.theta) == (False, None)
    assert stack.experts.num_tasks == 3


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (AttentionOptions, {"num_heads": 0}, "^num_heads=0 must be >= 1$"),
        (RopeOptions, {"theta": 0.0}, "^theta=0.0 must be > 0$"),
        (AttentionOptions, {"implementation": "flash"}, "'flash' is unknown; use one of auto, xla"),
        (RopeOptions, {"scaling": "ntk"}, "scaling='ntk' is unknown; use one of none, linear"),
        (NESTED["latent"], {"rope_width": 1}, "^rope_width=1 must be >= 2$"),
        (TextOptions, {"logit_scale": 0.0}, "^logit_scale=0.0 must be > 0$"),
        (NESTED["ffn"], {"activation": "tanh"}, "activation='tanh' is unknown; use one of swiglu"),
        (NESTED["heads"], {"experts": 2, "k": 3}, "^k=3 must be at most experts=2"),
    ],
)
def test_invalid_options_made_in_code_are_refused_with_the_layers_names(kind, fields, message):
    with pytest.raises(ValueError, match=message):
        kind(**fields)


def test_invalid_options_are_refused_with_the_layers_names_or_the_configs():
    stack = stack_options(default())
    message = "^d_model=100 is not a multiple of num_heads=3; .* set head_dim$"
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(stack, d_model=100, attention=AttentionOptions(num_heads=3))
    message = "^model.d_model=100 is not .* model.num_heads=3; .* set model.head_dim$"
    with pytest.raises(UserError, match=message):
        stack_options(config_with("model.d_model=100", "model.num_heads=3"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("moa_experts=4 attention_sinks=True", "model.attention_sinks=True is not part of a mixt"),
        ("moa_experts=4 mla_kv_rank=8", "model.mla_kv_rank=8 .* or model.moa_experts=0"),
        ("mla_kv_rank=8 qk_norm=unit", "model.qk_norm=unit .* use model.qk_norm=none, or"),
        ("mla_kv_rank=8 global_every=2 global_rope=False", "model.mla_kv_rank=8 needs rotary"),
        ("attention=cudnn dtype=bfloat16 attention_score_cap=5.0", "model.attention=cudnn has no"),
        ("rope_share=0.01", "^model.rope_share=0.01 of heads of width 48 rotates 0"),
        ("rope_scaling=yarn rope_low_turns=5.0", "^model.rope_low_turns=5 must be below model.rop"),
        ("global_every=3", "model.global_every=3"),
    ],
)
def test_options_that_do_not_go_together_are_refused_in_the_configs_words(overrides, message):
    with pytest.raises(UserError, match=message) as caught:
        stack_options(config_with(*(f"model.{text}" for text in overrides.split())))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("dense_layers=a", "^moe.dense_layers='a' must be numbers of layers, as '3,7'$"),
        ("dense_layers=4", "moe.dense_layers='4' names layer 4, but layers after .* are 0 to 3"),
        ("dense_layers=0,1,2,3", "leaves no layer with experts; use moe.every=0"),
        ("shared_d_ff=8", "^moe.shared_d_ff=8 .* use moe.shared_experts=1, or moe.shared_d_ff=0"),
        (
            "expert_bias=True moe.gate.name=soft",
            "^moe.expert_bias=True .*gate.name=soft mixes tokens",
        ),
        ("weigh_input=True", "^moe.weigh_input=True scales .* use gate.k=1 or moe.weigh_input=Fal"),
    ],
)
def test_options_of_layers_with_experts_that_do_not_fit_are_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        stack_options(config_with(*f"moe.{overrides}".split()))


def test_only_mentions_of_an_option_are_renamed():
    names = {"every": "moe.every", "depths.every": "model.mod_every", "head_dim": "model.head_dim"}
    text = "every token: depths.every=2 must divide every=1; set head_dim"
    wanted = "every token: model.mod_every=2 must divide moe.every=1; set model.head_dim"
    assert renamed(text, names) == wanted

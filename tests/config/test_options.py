"""Options of layers as config fields, and the one line that adds an option."""

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moejax import config as configs
from moejax.config import FIELDS, default
from moejax.config.build import NESTED, stack_options
from moejax.config.overrides import apply_overrides
from moejax.config.table import PREFIXES, names_of
from moejax.dispatch import Cells, Gather
from moejax.errors import UserError
from moejax.options import AttentionOptions, RopeOptions, StackOptions, option_fields, renamed
from moejax.types import MoEConfig

PACKAGE = Path(configs.__file__).parents[1]
ANCHOR = "    causal: bool = True\n"
EXPERTS = "    vocab_size: int = 0\n"
BIAS = '    bias: bool = option(False, "add a bias to the experts")\n'
WINDOW = '    window: int = option(0, "tokens a query looks back (0: all)", low=0)\n'
SET = """
import jax
from flax import nnx
from moejax import MoE
from moejax.config import FIELDS, default, table_of, validate
from moejax.config.build import stack_options
from moejax.config.overrides import apply_overrides
from moejax.models.stack import Stack

config = default()
apply_overrides(config, ["--config.model.window=3"])
validate(config)
stack = nnx.eval_shape(lambda: Made(stack_options(config)))
for block in stack.periods.blocks:
    assert block.attention.options.window == 3
assert MoE(8, 8, 2, gate="top_k", rngs=nnx.Rngs(0)).options.bias is False
print(*FIELDS)
apply_overrides(config, ["--config.model.window=-1"])
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
    table.write_text(text.replace(ANCHOR, WINDOW + ANCHOR).replace(EXPERTS, BIAS + EXPERTS))
    done = subprocess.run(
        [sys.executable, "-c", SET], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    names = done.stdout.split()
    assert set(names) == {*FIELDS, "model.window", "moe.bias"}, done.stderr
    # In reading order it follows the option before it in its class.
    assert names.index("model.window") == names.index("model.attention") + 1
    assert "UserError: model.window=-1 must be >= 0; default 0" in done.stderr


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
    "model.head_dim": 6,
    "model.activation": "gelu",
    "model.num_layers": 5,
    "model.mod_every": 1,
    "model.mod_predictor": "router",
    "model.moa_k": 3,
    "moe.every": 2,
    "moe.first_dense": 1,
    "moe.shared_experts": 2,
    "moe.activation": "relu",
    "moe.balance_scope": "batch",
    "moe.residual": False,
    "moe.transport": "gather",
    "moe.eval_transport": "cells",
    "moe.priority": "gate",
    "moe.group": "4",
}


def test_every_layer_field_sets_its_own_option_and_no_other():
    names = {name for options in PREFIXES for name in names_of(options).values()}
    wanted = {n: FITTING.get(n, OTHER[FIELDS[n].type]) for n in names}
    stack = stack_options(config_with(*(f"{name}={value}" for name, value in wanted.items())))
    parts = {StackOptions: stack} | {kind: getattr(stack, f) for f, kind in NESTED.items()}
    for kind, part in parts.items():
        for option, name in names_of(kind).items():
            assert getattr(part, option) == wanted[name], name
    cells = Cells(capacity_factor=0.625, priority="gate", reroute=7)
    assert stack.moe == MoEConfig(7, Gather(), cells, "4")
    changed = [name for name in names if wanted[name] != FIELDS[name].default]
    assert set(names) - set(changed) == {"moe.residual"}


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


def test_only_mentions_of_an_option_are_renamed():
    names = {"every": "moe.every", "depths.every": "model.mod_every", "head_dim": "model.head_dim"}
    text = "every token: depths.every=2 must divide every=1; set head_dim"
    wanted = "every token: model.mod_every=2 must divide moe.every=1; set model.head_dim"
    assert renamed(text, names) == wanted

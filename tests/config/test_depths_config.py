"""Configs with routed blocks, chosen heads and residual experts: refusals and marks."""

import pytest

from moejax import config as configs
from moejax.config.overrides import apply_overrides
from moejax.errors import UserError
from moejax.train.cost.budget import count_budget
from moejax.types import Visibility
from tests import steps


def validate(*overrides):
    config = configs.default()
    apply_overrides(config, list(overrides))
    return configs.validate(config)


def test_a_routed_block_is_marked_as_a_future_leak_with_and_without_experts():
    depths = "model.mod_capacity=0.125"
    marked = Visibility(train_future=True)
    assert validate(depths, "moe.every=0") == validate(depths, "moe.every=2") == marked
    assert validate("model.mod_capacity=1.0", "moe.every=0") == Visibility()
    assert validate("model.moa_experts=8") == Visibility()
    both = validate(depths, "moe.every=2", "moe.group=2", "moe.priority=gate")
    assert both == Visibility(train_future=True, train_others=True)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.mod_capacity=0.5"], "model.mod_every=2 must divide moe.every=1"),
        (["model.mod_capacity=1.5"], "model.mod_capacity=1.5 must be >= 0 and <= 1"),
        (["model.mod_predictor=oracle"], "model.mod_predictor='oracle' is unknown"),
        (
            ["model.mod_capacity=0.5", "moe.every=0", "model.num_layers=5"],
            "not a multiple of model.mod_every=2; use model.num_layers=6",
        ),
        *(
            (
                ["model.mod_capacity=0.5", "model.mod_every=1", f"moe.gate.name={gate}", *fields],
                f"moe.gate.name={gate} needs every token",
            )
            for gate, *fields in (("rl",), ("lory",), ("replay", "moe.gate.path=a.npz"))
        ),
        (["model.moa_experts=2", "model.moa_k=3"], "model.moa_k=3 must be at most"),
        (["moe.residual=True"], "moe.residual=True weighs routed against shared experts"),
        (
            ["moe.residual=True", "moe.shared_experts=1", "moe.shared_gate=True"],
            "moe.shared_gate=True",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused_in_one_line(overrides, message):
    with pytest.raises(UserError, match=message) as error:
        validate(*overrides)
    assert "\n" not in str(error.value)


def test_residual_moe_is_a_preset_that_validates():
    assert validate("moe.gate.name=residual_moe") == Visibility()


@pytest.mark.slow
def test_the_budget_counts_the_chosen_heads_and_no_head_as_an_expert():
    plain, heads = (count_budget(steps.make({"data": 1}, model__moa_experts=e)) for e in (0, 8))
    unused = [b.parameters - b.active_parameters for b in (plain, heads)]
    width, head_dim, layers = 16, 4, 2
    assert unused[1] - unused[0] == (8 - 2) * 2 * width * head_dim * layers
    assert heads.train_flops.per_pair == plain.train_flops.per_pair > 0
    assert heads.eval_flops.per_pair == plain.eval_flops.per_pair > 0

"""The arms: ways to assign slots."""

from typing import Any

import pytest

from moejax.config import default, set_gate
from moejax.contrib.openmoe.drops import Arm
from moejax.contrib.openmoe.measure import arms, variant
from moejax.dispatch import Cells, Dropless
from moejax.tasks.language.task import LanguageModel


def task(gate, **fields):
    config = default()
    set_gate(config, gate)
    small = {"model.d_model": 8, "model.num_heads": 2, "model.num_kv_heads": 2, "moe.d_ff": 8}
    config.update_from_flattened_dict(small | {"model.num_layers": 1} | fields)
    return LanguageModel.from_config(config, 32)


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    ("gate", "other"),
    [
        ("top_k", 1),
        ("switch", 2),
        ("dselect_k", None),
        ("hash", None),
        ("gshard", None),
        ("rl", None),
    ],
)
def test_another_number_of_choices_is_tried_where_the_parameters_allow_it(gate, other):
    """DSelect-k has a selector for each of its k choices; GShard and RL-R have no field k."""
    found = [arm.k for arm in arms(task(gate)) if arm.k]
    assert found == ([other] if other else [])


def test_an_arm_changes_only_how_slots_are_assigned():
    before = task("top_k", **{"moe.group": "4", "moe.priority": "choice", "moe.reroute": 1})
    moe = variant(before, Arm(2.0)).model.moe
    assert (moe.group, moe.eval_transport) == ("sequence", Cells(2.0, "position", reroute=0))
    assert variant(before, Arm(0.0)).model.moe.eval_transport == Dropless()
    assert variant(before, Arm(1.0)).model.gate == before.model.gate
    gate: Any = variant(before, Arm(1.0, k=1)).model.gate
    assert gate.k == 1

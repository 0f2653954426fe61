"""Loading configs: defaults, pages, overrides, typing, gates, and the JSON round trip."""

import importlib.util
import json
from pathlib import Path

import pytest

from moejax import config as configs
from moejax import gating
from moejax.config import (
    FIELDS,
    config_differences,
    default,
    flatten,
    from_dict,
    load,
    set_gate,
    to_dict,
)
from moejax.config.tasks import TASKS, task_entry
from moejax.config.tree import fields_for
from moejax.errors import UserError

ROOT = Path(__file__).parents[2]

PAGE = f"{ROOT}/configs/lm.py"


@pytest.mark.parametrize("task", TASKS)
def test_the_default_has_every_field_of_the_task_and_of_the_gate(task: str):
    config, entry = default(task), task_entry(task)
    used = {name for name in FIELDS if entry.has(name)}
    assert all(any(name.startswith(out) for name in FIELDS) for out in entry.without)
    assert all(name in FIELDS for name in (*entry.uses, *entry.defaults))
    gate = {f"moe.gate.{field}" for field in gating.fields("top_k")}
    assert set(flatten(config)) == used | gate | {f"task.{own}" for own in entry.fields}
    assert config.task.name == task
    assert config == from_dict(json.loads(json.dumps(to_dict(config))))


@pytest.mark.parametrize("task", TASKS)
def test_every_default_is_allowed_and_has_a_comment(task: str):
    for name, field in fields_for("top_k", task).items():
        assert field.allows(field.default), name
        assert field.comment, name
        assert name.rpartition(".")[0] in configs.SECTIONS, name


def test_the_config_page_chooses_the_task_and_a_config_without_one_is_for_language():
    with pytest.raises(UserError, match="task.name=pictures is chosen by the config page"):
        load(PAGE, ["task.name=pictures"])
    assert load(PAGE, ["task.name=language"]).config == load(PAGE).config
    older = to_dict(default())
    del older["task"]
    assert from_dict(older) == default()
    with pytest.raises(UserError, match="task.name='pictures' is unknown"):
        default("pictures")


def test_neither_an_unknown_field_nor_a_wrong_type_can_be_set():
    config = default()
    with pytest.raises(AttributeError):
        config.moe.num_expert = 4
    with pytest.raises(TypeError):
        config.train.steps = 1.5


@pytest.mark.parametrize("name", gating.names())
def test_every_gate_has_typed_fields_and_presets_that_exist(name: str):
    config = default()
    set_gate(config, name)
    flat = flatten(config)
    for key, value in gating.preset_overrides(name).items():
        assert flat[f"moe.{key}"] == value
    assert config == from_dict(json.loads(json.dumps(to_dict(config))))


def test_set_gate_applies_fields_and_preset_and_reverts_the_old_preset():
    config = default()
    set_gate(config, "dense")
    assert config.moe.transport == "all_experts"
    assert "k" not in config.moe.gate
    set_gate(config, "top_k")
    assert config == default()


def test_set_gate_keeps_what_was_changed_after_the_old_preset():
    config = default()
    set_gate(config, "dense")
    config.moe.losses.load_balance = 0.5
    set_gate(config, "top_k")
    assert config.moe.losses.load_balance == 0.5


def test_the_gate_name_cannot_be_assigned_without_its_fields():
    with pytest.raises(UserError, match="set_gate"):
        default().moe.gate.name = "switch"


@pytest.mark.parametrize("size", ["debug", "tiny", "small", "base"])
@pytest.mark.parametrize("gate", ["top_k", "switch"])
def test_shipped_page_is_valid_in_every_size(size: str, gate: str):
    config = load(f"{PAGE}:size={size},gate={gate}").config
    assert not configs.validate(config).mark
    assert config.model.d_ff == 2 * config.moe.d_ff  # the dense baseline at equal compute


def test_json_keeps_ints_and_floats_apart():
    config = load(PAGE, ["optim.learning_rate=3", "moe.gate.init_scale=1"]).config
    again = from_dict(json.loads(json.dumps(to_dict(config))))
    for name, value in flatten(config).items():
        assert flatten(again)[name] == value and type(flatten(again)[name]) is type(value), name


def test_differences_name_fields_and_skip_those_that_may_change():
    free = ["train.steps=9", "train.keep_checkpoints=9", "report.progress=false", "mesh.data=2"]
    old, new = load(PAGE).config, load(PAGE, [*free, "optim.b2=0.9", "train.seed=1"]).config
    assert config_differences(to_dict(old), to_dict(new)) == [
        ("optim.b2", 0.95, 0.9),
        ("train.seed", 0, 1),
    ]
    assert config_differences(to_dict(old), json.loads(json.dumps(to_dict(old)))) == []


def test_another_gate_is_the_first_difference():
    new = load(PAGE, ["moe.gate.name=shazeer"]).config
    differences = config_differences(to_dict(load(PAGE).config), to_dict(new))
    assert differences[0] == ("moe.gate.name", "top_k", "shazeer")
    assert ("moe.gate.min_std", None, 0.01) in differences


def test_config_page_of_the_docs_is_current():
    script = ROOT / "scripts" / "make_config_docs.py"
    spec = importlib.util.spec_from_file_location("make_config_docs", script)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs" / "config.md").read_text() == module.render(), (
        "docs/config.md is out of date: run python scripts/make_config_docs.py"
    )

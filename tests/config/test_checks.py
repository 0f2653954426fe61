"""Semantic checks: every error names its numbers and a remedy."""

import dataclasses
import json
from pathlib import Path

import pytest

from moejax import config as configs
from moejax.config import FIELDS, Config, default, set_gate, to_dict, validate
from moejax.config.overrides import apply_overrides
from moejax.dispatch import Cells
from moejax.errors import UserError
from moejax.gating import TopK
from moejax.types import MoEConfig, Visibility


@dataclasses.dataclass(frozen=True)
class Acausal(TopK):
    """A gate that sees the future whatever surrounds it, as expert choice does."""

    def visibility(self, moe: MoEConfig) -> Visibility:
        return Visibility(True, True, True, True)


@dataclasses.dataclass(frozen=True)
class TrainLeak(TopK):
    """A gate that sees the future in training only, as BASE does."""

    def visibility(self, moe: MoEConfig) -> Visibility:
        return Visibility(train_future=True)


def config_with(*overrides: str) -> Config:
    config = default()
    apply_overrides(config, overrides)
    return config


REFUSED = {
    # numbers that int32 or float32 does not have
    "train.steps=2147483648": ["train.steps=2147483648", "at most 2147483647"],
    "optim.warmup_steps=3e9": ["optim.warmup_steps=3000000000", "at most 2147483647"],
    "train.eval_every=3000000000": ["train.eval_every=3000000000", "at most 2147483647"],
    "mesh.data=-3000000000": ["mesh.data=-3000000000", "at most 2147483647"],
    "moe.gate.k=3000000000": ["moe.gate.k=3000000000", "at most 2147483647"],
    "train.seed=4294967296": ["train.seed=4294967296", ">= 0 and <= 4294967295"],
    "optim.learning_rate=1e39": ["optim.learning_rate=1e+39", "at most 3.4e+38"],
    "optim.eps=1e-50": ["optim.eps=1e-50", "0 or at least 1.2e-38"],
    # mesh
    "mesh.expert=3": ["moe.num_experts=8", "mesh.expert=3", "6 or 9"],
    "mesh.expert=0": ["mesh.expert=0"],
    "mesh.data=-1 mesh.expert=-1": ["mesh.data", "mesh.expert", "-1"],
    "mesh.tensor=3 model.num_heads=6 model.num_kv_heads=6 moe.d_ff=256": [
        "moe.d_ff=256",
        "mesh.tensor=3",
        "255 or 258",
    ],
    "mesh.tensor=8": ["model.num_heads=4", "mesh.tensor=8", "8"],
    "mesh.tensor=2 model.num_kv_heads=1": ["model.num_kv_heads=1", "mesh.tensor=2"],
    "mesh.tensor=3 model.num_heads=6 model.num_kv_heads=6 moe.every=0": [
        "model.d_ff=512",
        "mesh.tensor=3",
    ],
    "mesh.fsdp=5": ["model.d_model=192", "mesh.fsdp=5", "190 or 195"],
    "mesh.cpu_devices=-1": ["mesh.cpu_devices=-1", ">= 0"],
    "mesh.cpu_devices=1025": ["mesh.cpu_devices=1025", "<= 1024"],
    # model
    "model.num_heads=5": ["model.d_model=192", "model.num_heads=5"],
    "model.num_heads=64 model.num_kv_heads=64": ["width 3", "even"],
    "model.num_kv_heads=3": ["model.num_heads=4", "model.num_kv_heads=3"],
    "model.activation=swigluu": ["'swigluu'", "did you mean 'swiglu'"],
    "model.dtype=bf16": ["model.dtype='bf16'", "bfloat16"],
    "model.remat=all": ["model.remat='all'", "full"],
    "model.attention=flash": ["model.attention='flash'", "cudnn"],
    "model.attention=cudnn": ["model.attention=cudnn", "model.dtype=float32", "attention=auto"],
    "model.attention=cudnn model.dtype=bfloat16 model.head_dim=4": ["the width is 4"],
    "model.num_layers=0": ["model.num_layers=0", ">= 1"],
    # moe
    "moe.first_dense=4": ["moe.first_dense=4", "model.num_layers=4"],
    "moe.every=3": ["model.num_layers=4", "moe.every=3", "model.num_layers=6"],
    "moe.every=2 moe.first_dense=1": ["= 3 layers", "moe.every=2", "model.num_layers=5"],
    "moe.every=-1": ["moe.every=-1"],
    "moe.gate.k=9": ["moe.gate.k=9", "num_experts=8"],
    "moe.gate.k=0": ["moe.gate.k=0"],
    "moe.gate.k=1": ["moe.gate.k=1", "renormalize"],
    "moe.gate.name=gshard moe.num_experts=1": ["moe.num_experts=1", "at least 2"],
    "moe.capacity_factor=0": ["moe.capacity_factor=0.0", "> 0"],
    "moe.eval_capacity_factor=-1": ["moe.eval_capacity_factor=-1.0"],
    "moe.transport=cell": ["'cell'", "did you mean 'cells'"],
    "moe.eval_transport=drop": ["moe.eval_transport='drop'", "dropless"],
    "moe.priority=positoin": ["did you mean 'position'"],
    "moe.balance_scope=global": ["moe.balance_scope='global'", "batch"],
    "moe.group=all": ["moe.group='all'", "'sequence'"],
    "moe.group=0": ["moe.group='0'"],
    "moe.shared_gate=true": [
        "moe.shared_gate=True",
        "moe.shared_experts=0",
        "use moe.shared_experts=1 or more, or moe.shared_gate=False",
    ],
    "moe.gate.name=qwen_moe moe.shared_experts=0": ["moe.shared_gate=True", "moe.shared_experts=0"],
    "moe.losses.z=-1": ["moe.losses.z=-1.0", ">= 0"],
    # groups and batch
    "train.batch_size=6 mesh.data=2 mesh.expert=2": ["train.batch_size=6", "= 4", "batch_size=8"],
    "train.grad_accum=3": ["train.batch_size=16", "train.grad_accum=3", "batch_size=18"],
    "train.grad_accum=8 mesh.data=4": ["= 2 sequences", "= 4", "train.batch_size=32"],
    "moe.group=3": ["16 sequences", "moe.group=3", "batch_size=18"],
    "moe.group=4 mesh.data=8": ["4 groups", "= 8", "batch_size=32", "moe.transport=dropless"],
    "moe.group=batch": ["moe.group=batch", "moe.transport=cells", "dropless"],
    "moe.group=batch moe.transport=dropless moe.eval_transport=cells": ["moe.eval_transport=cells"],
    "moe.group=batch moe.transport=gather train.grad_accum=2": ["moe.group=batch", "grad_accum=2"],
    # Slots of mixed tokens are like those of cells, whatever the transport.
    "moe.gate.name=soft moe.transport=dropless moe.group=batch": [
        "moe.group=batch",
        "moe.gate.name=soft",
        "moe.group=sequence",
    ],
    "moe.gate.name=soft moe.transport=dropless moe.group=4 mesh.data=8": [
        "4 groups",
        "= 8",
        "train.batch_size=32 or moe.group=sequence",
    ],
    "moe.balance_scope=batch train.grad_accum=2": ["moe.balance_scope=batch", "grad_accum=2"],
    # training
    "train.steps=0": ["train.steps=0", ">= 1"],
    "train.batch_size=0": ["train.batch_size=0"],
    "train.seq_len=0": ["train.seq_len=0"],
    "train.log_every=0": ["train.log_every=0"],
    "train.eval_every=0": ["train.eval_every=0"],
    "train.eval_rows=0": ["train.eval_rows=0"],
    "train.checkpoint_every=0": ["train.checkpoint_every=0"],
    "train.keep_checkpoints=0": ["train.keep_checkpoints=0"],
    "train.seed=-1": ["train.seed=-1"],
    "train.init_from=/no/such/run": ["train.init_from='/no/such/run'", "config.json"],
    "optim.name=adam": ["optim.name='adam'", "did you mean 'adamw'"],
    "optim.schedule=cosin": ["did you mean 'cosine'"],
    "optim.learning_rate=0": ["optim.learning_rate=0.0", "> 0"],
    "optim.b2=1": ["optim.b2=1.0", "< 1"],
    "optim.final_fraction=2": ["optim.final_fraction=2.0", "<= 1"],
    "data.path=/no/such/text": ["data.path='/no/such/text'", "does not exist"],
    "data.tokenizer=/no/such/bpe.json": ["data.tokenizer", "does not exist"],
    "data.eval_fraction=1": ["data.eval_fraction=1.0", "< 1"],
    # processes
    "distributed.mode=on": ["distributed.mode='on'", "explicit"],
    "distributed.mode=explicit": ["distributed.coordinator=''", "host:port"],
    "distributed.mode=explicit distributed.coordinator=a:1": ["num_processes=0", "process_id=-1"],
    "distributed.mode=explicit distributed.coordinator=a:1 distributed.num_processes=2 "
    "distributed.process_id=2": ["process_id=2", "num_processes=2"],
    "distributed.num_processes=2": ["distributed.num_processes=2", "distributed.mode=explicit"],
    # visibility
    "moe.eval_transport=cells moe.priority=choice": [
        "moe.gate.name=top_k",
        "moe.priority=choice",
        "moe.eval_capacity_factor=1.25",
        "moe.priority=position, moe.eval_transport=dropless, moe.eval_capacity_factor=8",
        "moe.allow_future_leak=True",
    ],
    f"moe.gate.name={__name__}:Acausal": ["later tokens", "use a causal gate, or"],
    "moe.gate.name=expert_choice": [
        "moe.gate.name=expert_choice lets a token see later tokens",
        "use moe.gate.eval_policy=threshold, or moe.allow_future_leak=True",
    ],
    "moe.gate.name=soft": ["=soft lets a token see later", "moe.allow_future_leak=True"],
    "moe.gate.name=sentence": ["use moe.gate.pool=running, or moe.allow_future_leak=True"],
    "moe.gate.name=smear": ["moe.gate.name=smear lets", "use moe.gate.name=lory, or moe.allow"],
    "moe.gate.name=lory moe.gate.first_segment=paper": [
        "later tokens of its sequence",
        "use moe.gate.first_segment=learned, or moe.allow_future_leak=True",
    ],
    # A capacity that leaks as well: the gate's remedy alone would not do.
    "moe.gate.name=sentence moe.eval_transport=cells moe.priority=choice": ["a causal gate, or"],
    "moe.gate.name=expert_choice_causal moe.gate.eval_policy=position": [
        "moe.gate.name=expert_choice_causal chooses among the sequences",
        "at least 4",
        "moe.group=sequence has 1",
        "moe.group=4 or more",
    ],
    "moe.gate.name=hash moe.gate.k=3": ["moe.gate.k=3", "num_experts=8"],
}


@pytest.mark.parametrize("overrides", REFUSED)
def test_mistake_is_refused_with_numbers_and_remedy(overrides: str):
    with pytest.raises(UserError) as caught:
        validate(config_with(*overrides.split()))
    text = str(caught.value)
    assert "\n" not in text
    for part in REFUSED[overrides]:
        assert part in text, text


ACCEPTED = [
    "",
    "mesh.expert=8",
    "mesh.data=2 mesh.fsdp=2 mesh.expert=2 mesh.tensor=2",
    "mesh.expert=-1",
    "model.num_kv_heads=2",
    "model.num_heads=5 model.num_kv_heads=5 model.head_dim=32",
    "moe.every=2",
    "moe.every=3 moe.first_dense=1",
    "moe.every=0 moe.first_dense=1",
    "moe.every=0 moe.num_experts=7 mesh.expert=2",
    "moe.gate.name=switch",
    "moe.gate.k=8",
    "moe.group=4 mesh.data=4",
    "moe.group=4 mesh.data=8 moe.transport=dropless",
    "moe.group=batch moe.transport=dropless",
    "moe.group=batch moe.transport=gather moe.eval_transport=all_experts",
    "moe.balance_scope=batch",
    "train.grad_accum=4 mesh.data=4",
    "moe.priority=choice",
    "moe.eval_transport=cells",
    "moe.eval_transport=cells moe.priority=gate moe.eval_capacity_factor=4",
    "moe.gate.name=expert_choice moe.gate.eval_policy=threshold",
    "moe.gate.name=expert_choice_causal moe.gate.eval_policy=position moe.group=4 mesh.data=4",
    "moe.gate.name=sentence moe.gate.pool=running",
    "distributed.mode=explicit distributed.coordinator=localhost:1234 "
    "distributed.num_processes=2 distributed.process_id=1",
]


@pytest.mark.parametrize("overrides", ACCEPTED)
def test_sound_config_is_accepted(overrides: str):
    assert not validate(config_with(*overrides.split())).eval_future


def test_each_remedy_for_a_leak_cures_it():
    leaky = ["moe.eval_transport=cells", "moe.priority=gate"]
    for cure in ("priority=position", "eval_transport=dropless", "eval_capacity_factor=8"):
        assert not validate(config_with(*leaky, f"moe.{cure}")).eval_future


def test_an_allowed_leak_is_marked():
    config = config_with(f"moe.gate.name={__name__}:Acausal", "moe.allow_future_leak=true")
    assert validate(config).mark == "train:future+others eval:future+others"


def test_a_leak_in_training_only_is_accepted_and_marked():
    config = config_with(f"moe.gate.name={__name__}:TrainLeak")
    assert validate(config).mark == "train:future"


def test_a_capacity_leak_in_training_only_is_accepted_and_marked():
    assert validate(config_with("moe.priority=choice")).mark == "train:future"


def test_mesh_is_checked_against_the_devices_once_they_are_known():
    config = config_with("mesh.expert=4")
    validate(config, num_devices=4)
    with pytest.raises(UserError, match="needs 4 devices but there are 8"):
        validate(config, num_devices=8)


def test_filled_axis_is_checked_once_the_devices_are_known():
    config = config_with("mesh.expert=-1")
    validate(config)
    validate(config, num_devices=8)
    with pytest.raises(UserError, match="moe.num_experts=8 .* mesh.expert=16"):
        validate(config, num_devices=16)


def test_value_of_another_type_set_in_code_is_refused():
    config = default()
    config.optim.learning_rate = float("inf")
    with pytest.raises(UserError, match="optim.learning_rate=inf must be a finite number"):
        validate(config)


def test_paths_that_exist_are_accepted(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"config": to_dict(default())}))
    validate(config_with(f"data.path={tmp_path}", f"train.init_from={tmp_path}"))


def test_the_gate_and_its_options_come_from_the_config():
    config = config_with("moe.gate.k=3", "moe.capacity_factor=2", "moe.group=4")
    gate, moe = configs.make_gate(config), configs.moe_config(config)
    assert gate.columns(8) == 3
    assert (moe.transport, moe.group, moe.num_experts) == (Cells(2.0), "4", 8)


def test_a_dense_model_has_no_gate_visibility():
    config = default()
    set_gate(config, f"{__name__}:Acausal")
    config.moe.every = 0
    assert validate(config) == Visibility()


def test_every_choice_of_remat_has_a_checkpoint_policy():
    from moejax.models import stack

    assert set(FIELDS["model.remat"].choices) == set(stack.REMAT)


def test_a_task_without_causal_predictions_is_marked_for_other_rows_only():
    config = default("images")
    set_gate(config, "expert_choice")
    assert validate(config) == Visibility()
    config.moe.group, config.moe.eval_transport = "4", "cells"
    assert validate(config) == Visibility(eval_others=True)


@pytest.mark.parametrize("task", ["images", "multimodal"])
def test_heads_of_odd_width_are_accepted_without_rotary_positions(task: str):
    config = default(task)
    config.model.head_dim = 5
    validate(config)

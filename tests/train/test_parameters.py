"""Parameter names: axis letters, weight decay, Muon, and the sides of every matrix."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import config as configs
from moejax.config.overrides import apply_overrides
from moejax.contrib.multimodal.task import Multimodal
from moejax.contrib.multitask.tables import as_rows, make_table
from moejax.contrib.multitask.task import MultiTaskLearning
from moejax.tasks.images.task import ImageClassifier
from moejax.tasks.language.task import LanguageModel
from moejax.train.parameters import (
    EXPERT_WEIGHTS,
    HEAD_MATRICES,
    Parameter,
    parameter,
    path_names,
    split_name,
)
from tests.gates import ROWS, spec

MATRICES = {
    "query_DHI": "D|HI", "key_DJI": "D|JI", "value_DJI": "D|JI", "out_HID": "HI|D",
    "query_EDI": "D|I", "key_DI": "D|I", "value_DI": "D|I", "out_EID": "I|D",
    "gate_DF": "D|F", "up_DF": "D|F", "down_FD": "F|D", "map_DF": "D|F",
    "gate_EDF": "D|F", "up_EDF": "D|F", "down_EFD": "F|D",
    "in_EDF": "D|F", "out_EFO": "F|O", "up_MOF": "O|F",
    "image_head_DZ": "D|Z", "text_head_DZ": "D|Z",
    "query_down_DR": "D|R", "query_RHI": "R|HI", "down_DR": "D|R", "key_rope_DI": "D|I",
    "key_RHI": "R|HI", "value_RHI": "R|HI",
}  # fmt: skip
"""Weights: they decay, and Muon orthogonalises them, by rows | columns of one matrix."""
TABLES = {
    "embed_VD", "head_DV", "patch_embed_CD", "patch_embed_PD", "position_embed_LD",
    "byte_embed_VD", "byte_position_embed_LD", "patch_position_embed_LD", "modality_embed_MD",
}  # fmt: skip
"""Embeddings and heads over a vocabulary: they decay, and Adam updates them."""
VECTORS = {
    "scale_D", "patch_bias_D", "head_bias_V", "logit_scale", "shift_F", "shift_EF", "shift_EO",
    "shift_MF", "read_MF", "bias_M", "bias_D", "query_bias_HI", "key_bias_JI", "value_bias_JI",
    "out_bias_D", "sink_H", "query_down_bias_R", "down_bias_R", "key_rope_bias_I", "gate_bias_EF",
    "up_bias_EF", "down_bias_ED",
}  # fmt: skip
"""Norms, biases and vectors of each task: they do not decay, and Adam updates them."""
GATES = {"residual_DN", "residual_bias_N", "shared_gate_D"}
"""Parameters that weigh outputs against each other, besides those below ``router``."""


@functools.cache
def table() -> Any:
    rng = np.random.default_rng(0)
    every = as_rows(rng.standard_normal((9, 2)), rng.integers(0, 3, (9, 1)), rng.random((9, 2)))
    known = {"dense": ("a", "b"), "category": ("c",), "category_sizes": (3,), "name": "made"}
    return make_table(every, every, ["x", "y"], ["regression", "binary"], **known)


def of(task: str, **changes: Any) -> Any:
    config = configs.default(task)
    apply_overrides(config, [f"{k.replace('__', '.')}={v}" for k, v in changes.items()])
    made: Any = {
        "language": lambda: LanguageModel.from_config(config, 64),
        "images": lambda: ImageClassifier.from_config(config, 10),
        "multimodal": lambda: Multimodal.from_config(config, 8),
        "multitask": lambda: MultiTaskLearning.from_config(config, table()),
    }[task]()
    return jax.eval_shape(lambda: made.init(jax.random.key(0)))


MODELS = {
    "default": lambda: of("language", model__tie_embeddings=False, model__head_bias=True),
    "residual": lambda: of(
        "language", moe__shared_experts=1, moe__residual=True, moe__first_dense=1, moe__every=1
    ),
    "shared_gate": lambda: of("language", moe__shared_experts=1, moe__shared_gate=True),
    "depths_and_heads": lambda: of(
        "language", model__mod_capacity=0.5, model__moa_experts=4, moe__every=2
    ),
    "biases": lambda: of(
        "language",
        model__attention_bias="all",
        model__attention_sinks=True,
        model__norm="layer",
        model__qk_norm="head",
        moe__expert_bias=True,
        moe__gate__bias=True,
    ),
    "latent": lambda: of(
        "language", model__attention_bias="all", model__mla_kv_rank=8, model__mla_query_rank=12
    ),
    "images": lambda: of("images"),
    "multimodal": lambda: of("multimodal"),
    "multitask": lambda: of("multitask", task__d_bottom=8),
    "shared_bottom": lambda: of("multitask", task__sharing="shared_bottom"),
}


def parameters(params: Any) -> dict[str, tuple[Parameter, bool]]:
    """Every parameter by its path, and whether it is below a router."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = path_names(path)
        found["/".join(names)] = (parameter(path, leaf), "router" in names)
    return found


@pytest.mark.parametrize("model", MODELS)
def test_every_parameter_of_every_task_has_the_properties_of_its_kind(model):
    seen = set()
    for path, (found, in_router) in parameters(MODELS[model]()).items():
        name = path.rpartition("/")[2]
        seen.add(name)
        if in_router or name in GATES:
            assert (found.is_gate, found.decays, found.orthogonal) == (True, False, False), path
            continue
        sides = found.sides and "|".join(map(found.letters_of, found.sides))
        rules = (found.is_gate, found.decays, found.orthogonal)
        if name in MATRICES:
            assert (rules, sides) == ((False, True, True), MATRICES[name]), path
        elif name in TABLES:
            assert rules == (False, True, False), path
        else:
            assert name in VECTORS, f"{path} is new: add it to one of the tables above"
            assert rules == (False, False, False), path
    known = {
        "residual": "residual_DN", "shared_gate": "shared_gate_D", "multitask": "up_MOF",
        "biases": "query_bias_HI", "latent": "query_down_bias_R",
    }  # fmt: skip
    assert known.get(model, "scale_D" if "bottom" not in model else "map_DF") in seen


@pytest.mark.parametrize(
    "name, stem, letters",
    [
        ("up_EDF", "up", "EDF"),
        ("position_embed_LD", "position_embed", "LD"),
        ("logit_scale", "logit_scale", ""),
        ("count", "count", ""),
        ("_DE", "_DE", ""),
        ("layer_E2", "layer_E2", ""),
    ],
)
def test_a_name_splits_into_its_stem_and_its_axis_letters(name, stem, letters):
    assert split_name(name) == (stem, letters)


@pytest.mark.parametrize(
    "model, names", [("biases", EXPERT_WEIGHTS), ("depths_and_heads", HEAD_MATRICES)]
)
def test_the_models_have_the_matrices_that_active_parameters_are_counted_by(model, names):
    """Renaming one in a layer would otherwise change the count without an error."""
    paths = jax.tree_util.tree_leaves_with_path(MODELS[model]())
    assert set(names) <= {path_names(path)[-1] for path, _ in paths}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_gates_parameters_do_not_decay_and_each_layers_are_one_block(row):
    params = jax.eval_shape(lambda: row.make().init(jax.random.key(0), spec()))
    for path, leaf in jax.tree_util.tree_leaves_with_path({"periods": {"router": params}}):
        # As in a model: the layers lead.
        stacked = jax.ShapeDtypeStruct((3, *leaf.shape), jnp.float32)
        found = parameter(path, stacked)
        assert (found.is_gate, found.decays, found.orthogonal) == (True, False, False), path
        own = math.prod(stacked.shape[axis] for axis in found.own_axes)
        assert own == math.prod(leaf.shape), f"{path}: all of one layer"

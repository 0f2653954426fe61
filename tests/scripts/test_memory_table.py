"""The table of what published models need."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILE = ROOT / "scripts" / "memory_table.py"
SPEC = importlib.util.spec_from_file_location("memory_table", FILE)
assert SPEC and SPEC.loader
memory_table = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(memory_table)

SIZES = {
    "mixtral-8x7b": (46.7, 12.9),  # arXiv 2401.04088 and its model card
    "olmoe-1b-7b": (6.9, 1.3),  # arXiv 2409.02060
    "qwen1.5-moe-a2.7b": (14.3, 2.7),  # its model card
    "deepseek-moe-16b": (16.4, 2.8),  # arXiv 2401.06066
}
"""Published parameters, in all and per token, in billions."""


@pytest.mark.parametrize("name", SIZES)
def test_the_parameters_are_the_published_ones(name):
    model = memory_table.published(name)
    total, active = SIZES[name]
    assert round(model.parameters / 1e9, 1) == total
    assert model.active_parameters / 1e9 == pytest.approx(active, abs=0.1)


def test_the_state_is_split_as_the_mesh_says():
    model = memory_table.published("olmoe-1b-7b")
    (one,), (eight, by_expert) = (memory_table.shown(model, count) for count in (1, 8))
    assert memory_table.flags(one) == ""
    whole = memory_table.parameter_bytes(model, one)
    assert whole == 4 * model.parameters
    share = memory_table.parameter_bytes(model, eight)
    # All but vectors and routers are split by 8: less than 1 % of the parameters.
    assert whole / 8 <= share < 1.01 * whole / 8
    assert memory_table.flags(by_expert) == "mesh.expert=8"
    # Attention and the ends stay whole: a tenth of the parameters.
    assert share < memory_table.parameter_bytes(model, by_expert) < 1.8 * whole / 8


def test_the_number_of_experts_limits_their_shards():
    model = memory_table.published("qwen1.5-moe-a2.7b")
    assert {mesh.shape["expert"] for mesh in memory_table.meshes(16, model)} == {1, 2, 4}


def test_the_cache_has_two_vectors_per_token_layer_and_head():
    keys = json.loads((ROOT / "configs/published/mixtral-8x7b.json").read_text())
    width = keys["hidden_size"] // keys["num_attention_heads"]
    per_token = 2 * 2 * keys["num_hidden_layers"] * keys["num_key_value_heads"] * width
    found = memory_table.cache_bytes(memory_table.published("mixtral-8x7b"))
    # A byte per token and layer says which tokens are padding, 4 are their positions.
    assert per_token * memory_table.CACHED <= found < 1.01 * per_token * memory_table.CACHED


@pytest.mark.slow
def test_the_page_has_the_table_of_this_version():
    page = (ROOT / "docs" / "real-models.md").read_text()
    text = memory_table.table()
    assert memory_table.render(page, text) == page, "run python scripts/memory_table.py"

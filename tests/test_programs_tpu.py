"""The training step compiled ahead of time for a TPU v5e of four chips, with bfloat16 compute.

Needs the compiler, no TPU: `pip install libtpu`.
"""

import jax
import pytest

from moejax.models import stack
from tests import steps
from tests.hlo import collectives

pytestmark = [pytest.mark.slow, pytest.mark.tpu]


@pytest.fixture(scope="module")
def chips():
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed: pip install libtpu")
    from jax.experimental import topologies

    return topologies.get_topology_desc("v5e:2x2", "tpu").devices


def compiled(shape, chips, transport, monkeypatch, **changes):
    """A step with its layers in a loop, so that each operation is there once."""
    # What is traced asks for the default backend to choose its kernels; here that is the CPU.
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(stack, "MOST_UNROLLED", 0)
    choices = {"moe__transport": transport, "model__dtype": "bfloat16", **changes}
    run = steps.make(shape, devices=chips, **choices)
    text = steps.compiled_text(run)
    return text or "", collectives(text, run.mesh)


@pytest.mark.parametrize("shape", [{"expert": 4}, {"data": 2, "expert": 2}], ids=str)
def test_a_step_with_cells_has_two_exchanges_each_way_in_bfloat16(shape, chips, monkeypatch):
    _, found = compiled(shape, chips, "cells", monkeypatch)
    exchanges = [c for c in found if c.kind == "all-to-all"]
    assert len(exchanges) == 4
    for exchange in exchanges:
        assert exchange.axes == {"expert"} and set(exchange.dtypes) == {"bf16"}
    moved = {(c.kind, *c.axes) for c in found for size in c.sizes if size and size % 11 == 0}
    assert moved == ({("all-reduce", "data")} if "data" in shape else set())


@pytest.mark.parametrize(("transport", "exchanges"), [("dropless", 4), ("dropless_once", 6)])
def test_a_dropless_step_runs_the_tpu_kernels(transport, exchanges, chips, monkeypatch):
    """megablox for the nine products of an expert layer, ragged all-to-all for its tokens (and for
    their experts and weights, there and back in float32, where each token is sent once)."""
    text, found = compiled({"expert": 4}, chips, transport, monkeypatch)
    assert text.count('"tpu_custom_call"') == 9
    ragged = [c for c in found if c.kind == "ragged-all-to-all"]
    assert len(ragged) == exchanges and all(c.axes == {"expert"} for c in ragged)
    assert [c.dtypes[0] for c in ragged].count("f32") == exchanges - 4
    assert not [c for c in found for size in c.sizes if size and size % 11 == 0]


@pytest.mark.parametrize(("remat", "products"), [("experts", 9), ("exchange", 11), ("full", 12)])
def test_values_that_a_remat_policy_keeps_are_not_computed_or_sent_again(
    remat, products, chips, monkeypatch
):
    """Two of the three forward products of an expert layer make its hidden layers."""
    text, found = compiled({"expert": 4}, chips, "dropless", monkeypatch, model__remat=remat)
    assert text.count('"tpu_custom_call"') == products
    ragged = [c for c in found if c.kind == "ragged-all-to-all"]
    assert len(ragged) == (6 if remat == "full" else 4)

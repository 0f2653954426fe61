"""The examples of docs/layer.md: an NNX model, one in Linen, pure functions, a mesh."""

import re
from pathlib import Path

import jax
import pytest

from moejax import gating

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "layer.md").read_text()


@pytest.mark.slow
def test_every_example_of_the_page_runs():
    shown: dict = {}
    for code in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL):
        exec(code, shown)
    assert shown["loss"].shape == () and jax.numpy.isfinite(shown["loss"])
    assert all(jax.numpy.isfinite(leaf).all() for leaf in jax.tree.leaves(shown["grads"]))
    assert shown["weights"] == gating.loss_weights("deepseek_moe")
    assert jax.tree.leaves(shown["gate_state"])[0].any()
    params = jax.tree.leaves(shown["where"])
    assert {s.spec for s in params} > {jax.sharding.PartitionSpec()}


def test_the_readme_points_to_the_page():
    assert "docs/layer.md" in (ROOT / "README.md").read_text()

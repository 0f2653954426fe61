"""Memory of a conversion: no more than 1.2 of the largest shard, on a model of 100 MB."""

import sys

import pytest

from moejax.hf.tensors import TensorFolder
from scripts import measure_convert

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc"),
]


def test_files_are_sparse_and_hold_what_the_config_says(tmp_path):
    size = measure_convert.Size.of(0.1)
    files = measure_convert.write_model(tmp_path / "hf", size, 3)
    assert len(files) == 3 and sum(files) == pytest.approx(0.1e9, rel=0.1)
    used = sum(path.stat().st_blocks for path in (tmp_path / "hf").iterdir()) * 512
    assert used < 0.1 * sum(files)
    with TensorFolder(tmp_path / "hf") as folder:
        assert {name: list(folder.shape(name)) for name in folder.names} == dict(size.shapes())
        assert (folder.read("model.norm.weight")[:8] == 1.0).all()


def test_a_conversion_holds_less_than_the_largest_shard(tmp_path):
    """A tiny model is converted first, since what any conversion needs would hide it."""
    size = measure_convert.Size.of(0.1)
    result = measure_convert.measure(tmp_path / "measured", size, 2, warm=True)
    assert result["largest_tensor"] < result["largest_shard"] / 20
    for way in ("from_hf", "to_hf"):
        assert 0 < result[way]["peak"] and result[way]["ratio"] < 1.2, result
    assert not (tmp_path / "measured").exists()
    assert "--to-hf" in measure_convert.table(result)

"""Folders of safetensors: read as the library reads them, refused in one line if broken."""

import json
import pickle
import re

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from moejax.errors import UserError
from moejax.hf import tensors as module
from moejax.hf.tensors import INDEX, SINGLE, Described, TensorFolder, write_folder

KINDS = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


def drawn(**shapes):
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def sharded(folder, shards, **index):
    """Files of these tensors by the library's own writer, and an index of them."""
    weight_map = {}
    for number, shard in enumerate(shards):
        name = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        safetensors.numpy.save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
    content = {"metadata": {"total_size": 0}, "weight_map": {**weight_map, **index}}
    (folder / INDEX).write_text(json.dumps(content))


def refused(folder, *parts):
    """Asserts that the folder is refused in one line with these words."""
    with pytest.raises(UserError) as error:
        TensorFolder(folder)
    text = str(error.value)
    assert "\n" not in text and str(folder) in text
    for part in parts:
        assert part in text, text


# ---------------------------------------------------------------- reading


def test_tensors_and_their_slices_are_those_that_were_written(tmp_path):
    first, second = drawn(a=(4, 6, 5), b=(3,)), drawn(c=(7, 2), d=())
    sharded(tmp_path, [first, second])
    with TensorFolder(tmp_path) as folder:
        assert folder.names == ["a", "b", "c", "d"] and "e" not in folder
        for name, x in {**first, **second}.items():
            assert folder.shape(name) == x.shape and folder.dtype(name) == "F32"
            np.testing.assert_array_equal(folder.read(name), x)
        np.testing.assert_array_equal(folder.read("a", (slice(1, 3),)), first["a"][1:3])
        whole, rows = slice(None), slice(2, 5)
        np.testing.assert_array_equal(folder.read("a", (whole, rows)), first["a"][:, 2:5])
        np.testing.assert_array_equal(folder.read("c", (whole, slice(1, 2))), second["c"][:, 1:])
        assert folder.file("c").name == "model-00002-of-00002.safetensors"


@pytest.mark.parametrize("kind", KINDS)
def test_every_type_is_read_bit_for_bit(tmp_path, kind):
    x = drawn(x=(5, 3))["x"].astype(KINDS[kind])
    safetensors.numpy.save_file({"x": x}, tmp_path / SINGLE)
    with TensorFolder(tmp_path) as folder:
        assert folder.dtype("x") == kind
        got = folder.read("x")
        assert got.dtype == x.dtype and got.tobytes() == x.tobytes()
        assert folder.read("x", (slice(1, 2),)).tobytes() == x[1:2].tobytes()


def test_metadata_of_a_file_is_no_tensor_and_one_file_may_have_any_name(tmp_path):
    about = {"format": "pt", "model": "x"}
    safetensors.numpy.save_file(drawn(a=(2,)), tmp_path / "other.safetensors", metadata=about)
    with TensorFolder(tmp_path) as folder:
        assert folder.names == ["a"]


# ---------------------------------------------------------------- broken folders


def test_a_file_that_the_index_names_must_be_there(tmp_path):
    sharded(tmp_path, [drawn(a=(2,))], b="model-00002-of-00002.safetensors")
    refused(tmp_path, "model-00002-of-00002.safetensors is missing", INDEX, "download it again")


@pytest.mark.parametrize("length", [0, 4, 40, -1])
def test_a_file_that_is_cut_off_is_refused(tmp_path, length):
    sharded(tmp_path, [drawn(a=(64,)), drawn(b=(64,))])
    path = tmp_path / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    refused(tmp_path, f"{path} is damaged or cut off", "download it again")


def test_a_tensor_must_be_in_the_file_that_the_index_names(tmp_path):
    sharded(tmp_path, [drawn(a=(2,)), drawn(b=(2,))], b="model-00001-of-00002.safetensors")
    with pytest.raises(UserError, match=r"missing|has the tensor 'b', but it has not"):
        TensorFolder(tmp_path)
    sharded(tmp_path, [drawn(a=(2,)), drawn(b=(2,))], c="model-00001-of-00002.safetensors")
    refused(tmp_path, "says that model-00001-of-00002.safetensors has the tensor 'c'")


def test_a_tensor_in_two_files_is_refused(tmp_path):
    sharded(tmp_path, [drawn(a=(2,), b=(3,)), drawn(a=(2,), c=(3,))])
    refused(tmp_path, "tensor 'a' is in model-00001", "and in model-00002", "empty folder")


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors"])
def test_an_index_cannot_name_files_elsewhere(tmp_path, name):
    folder = tmp_path / "model"
    folder.mkdir()
    safetensors.numpy.save_file(drawn(a=(2,)), tmp_path / "secret.safetensors")
    sharded(folder, [drawn(b=(2,))], a=name)
    refused(folder, repr(name), "is not a file beside it")


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}', "null", "\xff"]
)
def test_an_index_that_is_none_is_refused(tmp_path, content):
    (tmp_path / INDEX).write_bytes(content.encode("latin-1"))
    refused(tmp_path, f"{tmp_path / INDEX} is not an index of tensors")


class Bomb:
    """Unpickling it would leave a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "last.ckpt"])
def test_a_pickle_is_never_read(tmp_path, name):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / name).write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    refused(folder, f"{name} is a pickle", "safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    refused(folder, f"{name} is a pickle", "safetensors")
    assert not (tmp_path / "ran").exists()


def test_a_folder_without_weights_is_refused(tmp_path):
    refused(tmp_path, "has neither")
    for name in ("a", "b"):
        safetensors.numpy.save_file(drawn(x=(2,)), tmp_path / f"{name}.safetensors")
    refused(tmp_path, "has neither", INDEX)


# ---------------------------------------------------------------- writing


def write(folder, arrays, kind="F32", **options):
    """Writes arrays as tensors of one type."""
    wanted = {name: Described(kind, x.shape) for name, x in arrays.items()}
    write_folder(folder, wanted, arrays.__getitem__, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_a_written_file_is_read_by_the_library(tmp_path, kind):
    arrays = {n: x.astype(KINDS[kind]) for n, x in drawn(a=(3, 5), b=(), c=(0, 2)).items()}
    write(tmp_path, arrays, kind)
    with safetensors.safe_open(tmp_path / SINGLE, framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(arrays)
        for name, x in arrays.items():
            got = file.get_tensor(name)
            assert got.dtype == x.dtype and got.tobytes() == x.tobytes()
            assert got.shape == x.shape
    # The format aligns the data by 8 bytes.
    content = (tmp_path / SINGLE).read_bytes()
    assert int.from_bytes(content[:8], "little") % 8 == 0
    assert [path.name for path in tmp_path.iterdir()] == [SINGLE]


def sizes(folder):
    """The tensors of each shard, by the index, and that nothing else is in the folder."""
    index = json.loads((folder / INDEX).read_text())
    shards: dict = {}
    for tensor, file in index["weight_map"].items():
        shards.setdefault(file, []).append(tensor)
    assert {path.name for path in folder.iterdir()} == {*shards, INDEX}
    assert all(re.fullmatch(r"model-\d{5}-of-\d{5}\.safetensors", file) for file in shards)
    return list(shards.values()), index["metadata"]["total_size"]


@pytest.mark.parametrize(
    ("most", "shards"),
    [
        (40, [["a"], ["b"], ["c"], ["d"]]),
        (79, [["a"], ["b"], ["c"], ["d"]]),
        (80, [["a", "b"], ["c"], ["d"]]),
        (240, [["a", "b", "c"], ["d"]]),
        (3, [["a"], ["b"], ["c"], ["d"]]),
    ],
)
def test_shards_are_cut_where_they_would_be_too_large(tmp_path, most, shards):
    """A tensor that is larger than a shard has one of its own."""
    arrays = drawn(a=(10,), b=(10,), c=(40,), d=(20,))  # 40, 40, 160 and 80 bytes
    write(tmp_path, arrays, shard_bytes=most)
    assert sizes(tmp_path) == (shards, 320)
    with TensorFolder(tmp_path) as folder:
        for name, x in arrays.items():
            np.testing.assert_array_equal(folder.read(name), x)


def test_one_shard_of_exactly_the_limit_needs_no_index(tmp_path):
    write(tmp_path, drawn(a=(10,), b=(10,)), shard_bytes=80)
    assert [path.name for path in tmp_path.iterdir()] == [SINGLE]


def test_tensors_are_asked_for_one_at_a_time_in_order(tmp_path):
    arrays, asked = drawn(a=(4,), b=(4,), c=(4,)), []

    def value(name):
        asked.append(name)
        return arrays[name]

    wanted = {name: Described("F32", x.shape) for name, x in arrays.items()}
    write_folder(tmp_path, wanted, value, shard_bytes=32)
    assert asked == ["a", "b", "c"]


def test_a_written_folder_can_be_written_again_with_the_same_bytes(tmp_path):
    arrays = drawn(a=(5, 2), b=(3,))
    write(tmp_path, arrays)
    first = (tmp_path / SINGLE).read_bytes()
    with TensorFolder(tmp_path) as folder:
        again = {name: folder.read(name) for name in folder.names}
    write(tmp_path, again)
    assert (tmp_path / SINGLE).read_bytes() == first


def test_a_full_disk_leaves_no_half_of_a_file(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_write_shard", full)
    with pytest.raises(UserError, match="No space left"):
        write(tmp_path, drawn(a=(2,)))
    assert not list(tmp_path.iterdir())

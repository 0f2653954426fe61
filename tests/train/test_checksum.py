"""The checksum against a NumPy version of its formula, on every mesh, and what it detects."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from moejax.train.checkpoint import checksum
from moejax.train.checkpoint.checksum import checksums

WORD = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint32}
DTYPES = ["float32", "bfloat16", "float16", "float8_e4m3fn", "int32", "uint32", "int8", "uint16"]


def one(x) -> str:
    return checksums({"x": jnp.asarray(x)}).of["x"]


def by_numpy(x: np.ndarray) -> str:
    """The documented formula over the flattened bits, in exact Python-sized integers."""

    def mix(h):
        h = h.astype(np.uint64)
        h = ((h ^ (h >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
        h = ((h ^ (h >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
        return h ^ (h >> 16)

    x = np.ascontiguousarray(x)
    words = x.reshape(-1).view(WORD[x.dtype.itemsize]).astype(np.uint64)
    index = np.arange(words.size, dtype=np.uint64)
    sums = [int(mix(words ^ mix(index) ^ s).sum()) % 2**32 for s in (0x9E3779B9, 0x7F4A7C15)]
    return f"{sums[0]:08x}{sums[1]:08x}"


def random_bits(dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """Any bit pattern: NaNs with payload, infinities and denormals among them."""
    size = jnp.dtype(dtype).itemsize
    raw = np.random.default_rng(0).integers(0, 256, (*shape, size), dtype=np.uint8)
    return raw.view(jnp.dtype(dtype))[..., 0]


def flipped(x: np.ndarray, *bits: int) -> np.ndarray:
    raw = bytearray(x.tobytes())
    for bit in bits:
        raw[bit // 8] ^= 1 << bit % 8
    return np.frombuffer(bytes(raw), x.dtype).reshape(x.shape)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_formula_for_every_dtype(dtype):
    x = random_bits(dtype, (3, 5, 7))
    assert one(x) == by_numpy(x)


def test_equals_the_formula_for_bools_scalars_and_empty_arrays():
    bools = np.array([[True, False, True]])
    assert one(bools) == by_numpy(bools)
    zero = np.array(-0.0, np.float32)
    assert one(zero) == by_numpy(zero) != one(np.array(0.0, np.float32))
    assert one(np.zeros((0, 4), np.float32)) == "0" * 16


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_every_single_flipped_bit_changes_both_sums(dtype):
    x = random_bits(dtype, (2, 3))
    whole = one(x)
    for bit in range(8 * x.nbytes):
        changed = one(flipped(x, bit))
        assert changed[:8] != whole[:8] and changed[8:] != whole[8:], bit


def test_two_flipped_sign_bits_and_two_swapped_elements_are_detected():
    # A sum of odd multiples of the words would miss every pair of flipped sign bits.
    x = np.ones((4, 8), np.float32)
    whole = one(x)
    for first in range(32):
        for second in range(first):
            assert one(flipped(x, 32 * first + 31, 32 * second + 31)) != whole
    assert one(np.array([1.0, 0.0], np.float32)) != one(np.array([0.0, 1.0], np.float32))


LAYOUTS = {
    (8, 1): [("a",), (), (None, "a")],
    (2, 4): [("a", "b"), (("a", "b"),), (None, ("b", "a")), ("b",), (None, None, "a"), ()],
    (1, 4): [("b", "a"), (None, "b")],
}


@pytest.mark.parametrize("shape", LAYOUTS)
def test_does_not_depend_on_mesh_or_sharding(shape, eight_devices):
    devices = eight_devices[: shape[0] * shape[1]]
    mesh = jax.make_mesh(shape, ("a", "b"), axis_types=(AxisType.Auto,) * 2, devices=devices)
    x = random_bits("bfloat16", (8, 16, 2))
    arrays = {
        str(spec): jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
        for spec in LAYOUTS[shape]
    }
    assert len(arrays[str(LAYOUTS[shape][0])].addressable_shards) == len(devices) > 1
    arrays["scalar"] = jax.device_put(jnp.float32(3), NamedSharding(mesh, PartitionSpec()))
    arrays["elsewhere"] = jax.device_put(jnp.asarray(x), eight_devices[-1])
    found, diverged = checksums(arrays)
    assert list(found) == list(arrays) and not diverged
    assert found.pop("scalar") == by_numpy(np.array(3, np.float32))
    assert set(found.values()) == {by_numpy(x)}


@pytest.mark.parametrize("device", [0, 5])
def test_a_flipped_bit_in_any_copy_is_noticed(device, eight_devices):
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    x = random_bits("float32", (8, 3))
    arrays = {}
    for name, spec in {"whole": PartitionSpec(), "half": PartitionSpec("b")}.items():
        sharding = NamedSharding(mesh, spec)
        blocks = []
        for d, index in sharding.addressable_devices_indices_map(x.shape).items():
            block = flipped(x[index], 31) if d == eight_devices[device] else x[index]
            blocks.append(jax.device_put(block, d))
        arrays[name] = jax.make_array_from_single_device_arrays(x.shape, sharding, blocks)
    arrays["good"] = jax.device_put(x, NamedSharding(mesh, PartitionSpec(None)))
    found, diverged = checksums(arrays)
    assert diverged == ["whole", "half"]
    assert (found["whole"] == by_numpy(x)) == (device != 0)


def test_a_whole_tree_takes_one_collective(eight_devices):
    # Many small programs with collectives in flight at once can deadlock virtual CPU devices.
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    specs = (PartitionSpec("a"), PartitionSpec(None, "b"), PartitionSpec())
    arrays = [jax.device_put(jnp.ones((8, 8)), NamedSharding(mesh, spec)) for spec in specs]
    program = checksum._mesh_sums(mesh, specs).lower(arrays).compile().as_text()
    assert program is not None and program.count("all-reduce(") == 1
    assert "all-gather" not in program


def test_unsupported_dtypes_are_refused():
    with pytest.raises(TypeError, match="complex64"):
        one(np.zeros(2, np.complex64))
    with pytest.raises(TypeError, match="key<fry>"):
        checksums({"key": jax.random.key(0)})

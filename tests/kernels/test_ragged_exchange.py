"""ragged_exchange on CPU against the documentation of `jax.lax.ragged_all_to_all`.

`simulate` is that documentation's pseudocode, executed on all devices at once in NumPy.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from moejax.kernels import ragged_exchange


@cache
def exchange_on(num_devices, extra_axis=False):
    """The jitted exchange over `num_devices`; operands are concatenated over the devices."""
    mesh = jax.make_mesh(
        (2, num_devices) if extra_axis else (num_devices,),
        ("data", "expert") if extra_axis else ("expert",),
        axis_types=(AxisType.Auto,) * (2 if extra_axis else 1),
        devices=jax.devices()[: num_devices * (2 if extra_axis else 1)],
    )
    spec = P(("data", "expert")) if extra_axis else P("expert")
    return jax.jit(
        jax.shard_map(
            partial(ragged_exchange, axis_name="expert"),
            mesh=mesh,
            in_specs=spec,
            out_specs=spec,
            check_vma=True,
        )
    )


def exchange(operand_SND, output_SMD, vectors):
    num_devices, num_rows = output_SMD.shape[:2]
    flat = (a.reshape(-1, *a.shape[2:]) for a in (operand_SND, output_SMD))
    args = (*flat, *(np.asarray(v, np.int32).reshape(-1) for v in vectors))
    result = exchange_on(num_devices)(*(jnp.asarray(a) for a in args))
    return np.asarray(result).reshape(num_devices, num_rows, *operand_SND.shape[2:])


def simulate(operand_SND, output_SMD, vectors):
    input_offsets, send_sizes, output_offsets, recv_sizes = (np.asarray(v) for v in vectors)
    num_devices, num_slices = send_sizes.shape
    per_peer = num_slices // num_devices
    result = output_SMD.copy()
    for sender in range(num_devices):
        for i in range(num_slices):
            receiver = i // per_peer
            size, source = send_sizes[sender, i], input_offsets[sender, i]
            assert recv_sizes[receiver, sender * per_peer + i % per_peer] == size
            target = output_offsets[sender, i]
            result[receiver, target : target + size] = operand_SND[sender, source : source + size]
    return result


def random_traffic(rng, num_devices, per_peer, shuffled=True):
    """A random legal call: gaps between slices, slices in any order, some empty, one idle device.

    Returns the four vectors [S, S n] and the rows that the operands and outputs need.
    """
    size = rng.integers(0, 5, (num_devices, num_devices, per_peer))  # [sender, receiver, slice]
    size[rng.random(size.shape) < 0.3] = 0
    size[rng.integers(num_devices)] = 0

    def place(sizes):
        """Offsets that put slices of these sizes side by side, in random order, with gaps."""
        order = rng.permutation(len(sizes)) if shuffled else np.arange(len(sizes))
        offsets, row = np.zeros(len(sizes), int), 0
        for i in order:
            row += rng.integers(0, 3)
            offsets[i] = row
            row += sizes[i]
        return offsets, row

    placed = [place(size[sender].reshape(-1)) for sender in range(num_devices)]
    input_offsets = np.stack([offsets for offsets, _ in placed])
    arrivals = [place(size[:, receiver].reshape(-1)) for receiver in range(num_devices)]
    # What the receivers laid out is the senders' knowledge: [receiver, sender n] -> [sender, ...].
    output_offsets = np.stack([offsets for offsets, _ in arrivals])
    output_offsets = output_offsets.reshape(num_devices, num_devices, per_peer).swapaxes(0, 1)
    vectors = (
        input_offsets,
        size.reshape(num_devices, -1),
        output_offsets.reshape(num_devices, -1),
        size.swapaxes(0, 1).reshape(num_devices, -1),
    )
    return vectors, max(rows for _, rows in placed), max(rows for _, rows in arrivals)


def test_the_example_in_the_jax_documentation_is_reproduced():
    vectors = ([[0, 1], [0, 1]], [[1, 2], [1, 1]], [[0, 0], [1, 2]], [[1, 1], [2, 1]])
    result = exchange(np.array([[1, 2, 2], [3, 4, 0]]), np.zeros((2, 4), int), vectors)
    np.testing.assert_array_equal(result, [[1, 3, 0, 0], [2, 2, 4, 0]])


def test_the_reverse_of_the_example_in_the_jax_documentation_restores_the_operands():
    """Sending the same slices back gives each device its operand again."""
    vectors = ([[0, 1], [0, 2]], [[1, 1], [2, 1]], [[0, 0], [1, 1]], [[1, 2], [1, 1]])
    result = exchange(np.array([[1, 3, 0, 0], [2, 2, 4, 0]]), np.zeros((2, 3), int), vectors)
    np.testing.assert_array_equal(result, [[1, 2, 2], [3, 4, 0]])


def test_offsets_follow_from_a_traffic_matrix_of_four_devices():
    """Rows sorted by destination are received sorted by sender, for traffic[sender, receiver]."""
    traffic = np.array([[2, 0, 1, 3], [1, 1, 0, 0], [0, 4, 2, 1], [3, 0, 0, 0]])
    vectors = (
        [[0, 2, 2, 3], [0, 1, 2, 2], [0, 0, 4, 6], [0, 3, 3, 3]],  # rows before, in the operand
        traffic,
        [[0, 0, 0, 0], [2, 0, 1, 3], [3, 1, 1, 3], [3, 5, 3, 4]],  # rows of earlier senders
        traffic.T,
    )
    # A row names its sender, its destination and its position.
    operand = np.full((4, 8), -1)
    for sender, row in enumerate(traffic):
        names = [100 * sender + 10 * to + i for to, size in enumerate(row) for i in range(size)]
        operand[sender, : len(names)] = names
    result = exchange(operand, np.full((4, 7), -9), vectors)
    np.testing.assert_array_equal(
        result,
        [
            [0, 1, 100, 300, 301, 302, -9],
            [110, 210, 211, 212, 213, -9, -9],
            [20, 220, 221, -9, -9, -9, -9],
            [30, 31, 32, 230, -9, -9, -9],
        ],
    )


@pytest.mark.quick(2)
@pytest.mark.parametrize("num_devices", [2, 4, 8])
@pytest.mark.parametrize("per_peer", [1, 3])
def test_exactly_the_documented_rows_are_written(num_devices, per_peer):
    """Random traffic into a buffer of NaN: rows that nobody sends stay NaN, all others match."""
    rng = np.random.default_rng(10 * num_devices + per_peer)
    for _ in range(12):
        vectors, _, _ = random_traffic(rng, num_devices, per_peer)
        rows = 7 * num_devices * per_peer  # above any need, so that one program serves all
        operand = rng.normal(size=(num_devices, rows, 2)).astype(np.float32)
        output = np.full((num_devices, rows + 1, 2), np.nan, np.float32)
        expected = simulate(operand, output, vectors)
        assert np.isnan(expected).any()
        np.testing.assert_array_equal(exchange(operand, output, vectors), expected)


@pytest.mark.parametrize("num_devices", [2, 8])
def test_slices_may_fill_the_buffers_to_the_last_row(num_devices):
    """No spare row anywhere: the busiest sender and the busiest receiver use all of theirs."""
    rng = np.random.default_rng(num_devices)
    vectors, operand_rows, output_rows = random_traffic(rng, num_devices, 1, shuffled=False)
    operand = rng.normal(size=(num_devices, operand_rows, 3)).astype(np.float32)
    output = rng.normal(size=(num_devices, output_rows, 3)).astype(np.float32)
    expected = simulate(operand, output, vectors)
    assert (expected != output).any()
    np.testing.assert_array_equal(exchange(operand, output, vectors), expected)


@pytest.mark.parametrize("num_devices,per_peer", [(2, 3), (4, 1), (8, 3)])
def test_the_gradient_returns_to_the_rows_that_were_sent(num_devices, per_peer):
    rng = np.random.default_rng(num_devices)
    rows = 7 * num_devices * per_peer
    program = exchange_on(num_devices)

    @jax.jit
    def gradients(operand, output, cotangent, *vectors):
        return jax.vjp(lambda *a: program(*a, *vectors), operand, output)[1](cotangent)

    for _ in range(4):
        vectors, _, _ = random_traffic(rng, num_devices, per_peer)
        output = np.full((num_devices, rows + 1), np.nan, np.float32)
        cotangent = rng.normal(size=output.shape).astype(np.float32)
        # Simulated on row numbers, the exchange is a permutation: 0 is a row nobody sent.
        names = np.arange(1, num_devices * rows + 1).reshape(num_devices, rows)
        source = simulate(names, np.zeros(output.shape, int), vectors)
        expected = np.zeros(num_devices * rows + 1, np.float32)
        expected[source.reshape(-1)] = cotangent.reshape(-1)
        flat = (np.zeros(num_devices * rows, np.float32), output.reshape(-1), cotangent.reshape(-1))
        args = (*flat, *(v.reshape(-1).astype(np.int32) for v in vectors))
        d_operand, d_output = gradients(*(jnp.asarray(a) for a in args))
        assert (expected[1:] != 0).any() and (expected[1:] == 0).any()
        np.testing.assert_array_equal(d_operand, expected[1:])
        np.testing.assert_array_equal(d_output, np.zeros(d_output.shape))


def test_other_mesh_axes_exchange_separately(eight_devices):
    """On a (data, expert) mesh each data row exchanges separately."""
    rng = np.random.default_rng(0)
    halves = [random_traffic(rng, 4, 2)[0] for _ in range(2)]
    operand = rng.normal(size=(2, 4, 60, 3)).astype(np.float32)
    output = np.full((2, 4, 61, 3), np.nan, np.float32)
    vectors = [np.stack(pair).reshape(-1).astype(np.int32) for pair in zip(*halves, strict=True)]
    flat = (operand.reshape(-1, 3), output.reshape(-1, 3), *vectors)
    result = exchange_on(4, extra_axis=True)(*(jnp.asarray(a) for a in flat))
    expected = np.stack([simulate(*args) for args in zip(operand, output, halves, strict=True)])
    np.testing.assert_array_equal(result, expected.reshape(-1, 3))


BROKEN = {
    "sizes of the two sides differ": (3, [[1, 1], [2, 2]]),
    "a slice leaves the output": (2, [[0, 4], [1, 2]]),
    "received slices overlap": (2, [[0, 0], [0, 2]]),
    "a slice leaves the operand": (0, [[0, 3], [0, 1]]),
}


@pytest.mark.parametrize("rule", BROKEN)
@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_a_call_that_breaks_a_rule_gives_an_unusable_output(rule, dtype):
    """On TPU and GPU such a call is undefined; on CPU a whole output is made unusable."""
    vectors = [[[0, 1], [0, 1]], [[1, 2], [1, 1]], [[0, 0], [1, 2]], [[1, 1], [2, 1]]]
    operand, output = np.array([[1, 2, 2], [3, 4, 0]], dtype), np.zeros((2, 4), dtype)
    broken = list(vectors)
    index, value = BROKEN[rule]
    broken[index] = value
    result = exchange(operand, output, broken)
    unusable = np.isnan(result) if dtype == np.float32 else result == np.iinfo(dtype).min
    assert unusable.all(axis=1).any()


def test_the_collective_itself_is_used_off_cpu(eight_devices):
    mesh = jax.make_mesh((2,), ("expert",), axis_types=(AxisType.Auto,), devices=eight_devices[:2])

    def gradient(*args):
        program = jax.shard_map(
            partial(ragged_exchange, axis_name="expert", platform="gpu"),
            mesh=mesh,
            in_specs=P("expert"),
            out_specs=P("expert"),
        )
        return jax.grad(lambda operand: program(operand, *args[1:]).sum())(args[0])

    vectors = [jnp.zeros(4, jnp.int32)] * 4
    jaxpr = str(jax.make_jaxpr(gradient)(jnp.zeros((6, 2)), jnp.zeros((8, 2)), *vectors))
    assert jaxpr.count("ragged_all_to_all[") == 2 and "all_gather" not in jaxpr


def test_arguments_that_do_not_fit_are_refused():
    vectors = np.zeros((4, 2, 3), int)
    with pytest.raises(ValueError, match="multiple of the 2 devices"):
        exchange(np.zeros((2, 3)), np.zeros((2, 4)), vectors)
    with pytest.raises(ValueError, match="differ in row shape or dtype"):
        exchange(np.zeros((2, 3)), np.zeros((2, 4), int), vectors[..., :2])

"""The exam of every gate: one row each in tests/gates.py, and no gate is named here."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import gating, losses
from moejax.mesh import batch_spec
from moejax.types import Gate, GateTraits, Merge
from tests import gates, meshes
from tests.gates import ROWS, D, E, G, T

every_row = pytest.mark.parametrize("row", gates.PARAMS)
forget = gates.forgetting()
both_phases = pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])


@pytest.mark.skipif(bool(gates.OWN), reason="one gate from elsewhere is examined")
def test_every_name_has_a_row():
    assert {row.gate for row in ROWS} == set(gating.names())


@both_phases
@every_row
def test_shapes_dtypes_and_ranges(row, train):
    gate, out = row.make(), gates.example(row, train)
    assert isinstance(gate, Gate)
    expert, weight = out.routing.expert_GTK, out.routing.weight_GTK
    assert expert.shape == weight.shape == (G, T, gate.columns(E))
    assert expert.dtype == jnp.int32 and weight.dtype == jnp.float32
    assert (expert >= 0).all() and (expert < E).all()
    assert (weight >= 0).all() and jnp.isfinite(weight).all() and (weight > 0).any()
    for stat in jax.tree.leaves(out.stats):
        assert stat.shape == (G, T, E) and stat.dtype == jnp.float32
        assert jnp.isfinite(stat).all()
    # float32: E roundings of numbers at most 1.
    np.testing.assert_allclose(out.stats.probs_GTE.sum(-1), 1.0, atol=1e-5)
    for value in out.means.values():
        assert value.shape[0] == G and value.dtype == jnp.float32
    for value in out.losses.values():
        assert value.shape == () and jnp.isfinite(value)


@both_phases
@every_row
def test_no_token_visits_an_expert_twice(row, train):
    routing = gates.example(row, train).routing
    hits = jax.nn.one_hot(routing.expert_GTK, E) * (routing.weight_GTK > 0)[..., None]
    assert hits.sum(2).max() == 1


@both_phases
@every_row
def test_large_logits_take_no_pair_from_a_token(row, train):
    """A weight that underflows to 0 would be a pair that does not exist."""
    gate = row.make()
    given = gates.context(train, step=row.step, keyed=train or row.noisy_eval)
    params, state = gates.drawn(gate), gate.init_state(gates.spec())

    def routed(scale):
        out = gates.program(row)(params, state, scale * gates.tokens(), given)
        assert jnp.isfinite(out.routing.weight_GTK).all()
        return (out.routing.weight_GTK > 0).all()

    few, many = routed(0.01), routed(100.0)
    fixed = few and not row.thins and gates.example(row, train).mixing is None
    assert many or not fixed


@every_row
def test_load_is_exact_where_promised(row):
    routing = gates.example(row, True).routing
    load = (jax.nn.one_hot(routing.expert_GTK, E) * (routing.weight_GTK > 0)[..., None]).sum((1, 2))
    if row.exact_load:
        wanted = T * row.make().columns(E) / E if row.exact_load is True else row.exact_load
        np.testing.assert_array_equal(load, wanted)
    else:
        assert load.shape == (G, E)


@both_phases
@every_row
def test_a_gate_that_merges_experts_says_so_and_its_routing_tells_the_weights(row, train):
    gate, mixing = row.make(), gates.example(row, train).mixing
    merges = GateTraits.of(gate).mixes == "weights"
    assert isinstance(mixing, Merge) == merges
    if isinstance(mixing, Merge):
        assert mixing.weight_BNE.shape == (G, -(-T // mixing.span), E)
        assert (mixing.weight_BNE >= 0).all() and mixing.weight_BNE.dtype == jnp.float32
        # float32: E roundings of numbers at most 1.
        np.testing.assert_allclose(mixing.weight_BNE.sum(-1), 1.0, atol=1e-5)
        told = gates.example(row, train).routing
        np.testing.assert_array_equal(told.expert_GTK, np.broadcast_to(np.arange(E), (G, T, E)))
        of_tokens = np.repeat(mixing.weight_BNE, mixing.span, axis=1)[:, :T]
        np.testing.assert_array_equal(told.weight_GTK, of_tokens)


@every_row
def test_order_does_not_matter_where_promised(row):
    """In evaluation: everything that belongs to a token moves with it."""
    if not row.equivariant:
        pytest.skip("the gate depends on the order of tokens, and says so")
    gate = row.make()
    order = np.random.default_rng(1).permutation(T)
    given = gates.context(False, step=row.step, keyed=row.noisy_eval)
    moved = dataclasses.replace(
        given, **{f: getattr(given, f)[:, order] for f in ("token_GT", "segment_GT", "valid_GT")}
    )
    state, params = gate.init_state(gates.spec()), gates.drawn(gate)
    run = gates.program(row)
    straight, other = (
        run(params, state, x, c)
        for x, c in ((gates.tokens(), given), (gates.tokens()[:, order], moved))
    )
    np.testing.assert_array_equal(straight.routing.expert_GTK[:, order], other.routing.expert_GTK)
    # A product over other rows may differ by an ulp.
    np.testing.assert_allclose(
        straight.routing.weight_GTK[:, order], other.routing.weight_GTK, rtol=1e-5, atol=1e-6
    )


@both_phases
@every_row
def test_padding_is_never_routed_and_changes_nothing(row, train):
    gate = row.make()
    valid = jnp.arange(T)[None] < jnp.asarray([T, T - 3, T - 8, 0])[:, None]
    given = gates.context(train, step=row.step, keyed=train or row.noisy_eval, valid_BL=valid)
    x = jnp.where(valid[..., None], gates.tokens(), 0)  # the layer blanks padding
    other = dataclasses.replace(given, token_GT=jnp.where(valid, given.token_GT, 0))
    state, params = gate.init_state(gates.spec()), gates.drawn(gate)
    out, out_ = (gates.program(row)(params, state, x, c) for c in (given, other))
    assert (out.routing.weight_GTK[~valid] == 0).all()
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(out))
    for name in ("losses", "means"):
        jax.tree.map(np.testing.assert_array_equal, getattr(out, name), getattr(out_, name))
    weight, weight_ = out.routing.weight_GTK, out_.routing.weight_GTK
    np.testing.assert_array_equal(weight, weight_)
    active = weight > 0
    np.testing.assert_array_equal(
        jnp.where(active, out.routing.expert_GTK, 0), jnp.where(active, out_.routing.expert_GTK, 0)
    )


@both_phases
@every_row
def test_padding_before_a_sequence_is_as_padding_behind_it(row, train):
    """The i-th valid token is routed the same, and so are noise, losses and the gate's means."""
    gate = row.make()
    shift = jnp.asarray([0, 3, 8, 5])[:, None]
    behind = jnp.arange(T) < T - shift
    known = dict(step=row.step, keyed=train or row.noisy_eval)
    given = gates.context(train, valid_BL=behind, **known)
    there, back = (jnp.arange(T) - shift) % T, (jnp.arange(T) + shift) % T
    at = lambda x, index: jnp.take_along_axis(x, jnp.expand_dims(index, range(2, x.ndim)), axis=1)
    tokens, valid = at(given.token_GT, there), at(behind, there)
    before = gates.context(train, token_BL=tokens, valid_BL=valid, **known)
    x = jnp.where(behind[..., None], gates.tokens(), 0)
    state, params = gate.init_state(gates.spec()), gates.drawn(gate)
    wanted = gates.program(row)(params, state, x, given)
    got = gates.program(row)(params, state, at(x, there), before)
    weight, expert = (at(a, back) for a in (got.routing.weight_GTK, got.routing.expert_GTK))
    active = wanted.routing.weight_GTK > 0
    np.testing.assert_array_equal(weight > 0, active)
    np.testing.assert_array_equal(expert[active], wanted.routing.expert_GTK[active])
    # float32 sums over a sequence in another order.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    close(weight, wanted.routing.weight_GTK)
    jax.tree.map(close, (got.losses, got.means), (wanted.losses, wanted.means))


def pull(row, train=True):
    """Gradients of each parameter and the input, from the task, the losses and the policy."""
    gate = row.make()
    given = gates.context(train, step=row.step)
    state, params = gate.init_state(gates.spec()), gates.drawn(gate, scale=0.3)
    valid = given.valid_GT

    def task(params, x):
        out = gate(params, state, x, given)
        # A random linear reading of what each expert would add; identity weights count too.
        reading = jax.random.normal(jax.random.key(5), (G, T, E))
        seen = jnp.take_along_axis(reading, out.routing.expert_GTK, axis=-1)
        total = jnp.sum(seen * out.routing.weight_GTK)
        if out.identity_weight_GT is not None:
            total += jnp.sum(out.identity_weight_GT * reading[..., 0])
        return total

    def auxiliary(params, x):
        out = gate(params, state, x, given)
        load = losses.expert_load(out.routing.expert_GTK, out.routing.weight_GTK, E)
        balance = losses.load_balance(load, out.stats.probs_GTE, valid)
        return balance + losses.z_loss(out.stats.logits_GTE, valid) + sum(out.losses.values())

    def policy(params, x):
        out = gate(params, state, x, given)
        if out.policy is None:
            return jnp.float32(0)
        stacked = jax.tree.map(lambda a: a[None], out.policy)
        reward = jax.random.normal(jax.random.key(6), (G, T))
        return sum(losses.policy_gradient(stacked, reward, valid).values())

    x = gates.tokens()
    grads = jax.jit(lambda p, x: [jax.grad(f, (0, 1))(p, x) for f in (task, auxiliary, policy)])
    return dict(zip(("task", "aux", "policy"), grads(params, x), strict=True))


@every_row
def test_gradients_are_finite_and_reach_every_parameter_from_where_the_gate_says(row):
    gate, grads = row.make(), pull(row)
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(grads))
    moved = {
        source: {
            jax.tree_util.keystr(path)
            for path, g in jax.tree_util.tree_leaves_with_path(given[0])
            if jnp.abs(g).max() > 0
        }
        for source, given in grads.items()
    }
    paths, _ = jax.tree.flatten_with_path(grads["task"][0])
    names = {jax.tree_util.keystr(path) for path, _ in paths}
    untrained = {name for name in names if any(f"'{field}'" in name for field in row.untrained)}
    assert set().union(*moved.values()) == names - untrained
    if gate.trained_by == "none":
        assert not names
    elif names - untrained:
        assert moved[gate.trained_by]
    if gate.trained_by != "task":
        assert not moved["task"]


@pytest.mark.parametrize("train", [True, pytest.param(False, marks=pytest.mark.slow)])
@every_row
def test_jit_changes_nothing(row, train):
    gate = row.make()
    given = gates.context(train, step=row.step, keyed=train or row.noisy_eval)
    plain = gate(gates.drawn(gate), gate.init_state(gates.spec()), gates.tokens(), given)
    jitted = gates.example(row, train)
    np.testing.assert_array_equal(plain.routing.expert_GTK, jitted.routing.expert_GTK)
    # XLA fuses float32 arithmetic: a few ulp.
    close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6)
    jax.tree.map(close, plain, jitted)


@every_row
def test_nothing_is_compiled_again_in_later_steps(row):
    gate, traced = row.make(), []

    def one_step(params, state, x, given):
        traced.append(given.step)
        out = gate(params, state, x, given)
        return gate.update(state, gates.stats_of(out, given.valid_GT))

    run = jax.jit(one_step)
    state, params = gate.init_state(gates.spec()), gates.drawn(gate)
    described = jax.tree.map(lambda x: (x.shape, x.dtype), state)
    for step in (0, 1, 2):
        state = run(params, state, gates.tokens(step), gates.context(True, step=step))
        assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == described
    assert len(traced) == 1


@every_row
def test_state_is_float32_or_int32_and_finite_after_an_update(row):
    gate, out = row.make(), gates.example(row, True)
    state = gate.init_state(gates.spec())
    new = gate.update(state, gates.stats_of(out, jnp.ones((G, T), bool)))
    assert jax.tree.structure(new) == jax.tree.structure(state)
    for leaf in jax.tree.leaves((state, new)):
        assert leaf.dtype in (jnp.float32, jnp.int32) and jnp.isfinite(leaf).all()


@both_phases
@every_row
def test_bfloat16_tokens_are_routed_in_float32(row, train):
    gate = row.make()
    given = gates.context(train, step=row.step, keyed=train or row.noisy_eval)
    state, params = gate.init_state(gates.spec()), gates.drawn(gate)
    half = gates.tokens().astype(jnp.bfloat16)
    run = gates.program(row)
    low, full = run(params, state, half, given), run(params, state, half.astype(jnp.float32), given)
    jax.tree.map(np.testing.assert_array_equal, low.routing, full.routing)
    assert {leaf.dtype for leaf in jax.tree.leaves(low.stats)} == {jnp.dtype("float32")}


@both_phases
@every_row
def test_ties_are_broken_the_same_way_wherever_a_sequence_lies(row, train):
    """Equal tokens in every sequence; two of the sequences alone, in another order."""
    gate = row.make()
    x = jnp.zeros((G, T, D))
    state, params = gate.init_state(gates.spec()), gates.drawn(gate)
    known = dict(step=row.step, keyed=train or row.noisy_eval)
    whole = gates.program(row)(params, state, x, gates.context(train, **known)).routing
    again = gates.context(train, **known)
    pick = jnp.asarray([2, 0])
    part = dataclasses.replace(
        again,
        **{
            f: getattr(again, f)[pick]
            for f in ("token_GT", "position_GT", "segment_GT", "valid_GT", "row_GR", "task_GR")
        },
    )
    got = gates.program(row)(params, state, x[:2], part).routing
    np.testing.assert_array_equal(got.expert_GTK, whole.expert_GTK[pick])
    np.testing.assert_allclose(got.weight_GTK, whole.weight_GTK[pick], rtol=1e-6)


@both_phases
@every_row
def test_nan_never_makes_an_expert_that_does_not_exist(row, train):
    gate = row.make()
    given = gates.context(train, step=row.step, keyed=train or row.noisy_eval)
    x = gates.tokens().at[0, 3].set(jnp.nan)
    out = gates.program(row)(gates.drawn(gate), gate.init_state(gates.spec()), x, given)
    assert (out.routing.expert_GTK >= 0).all() and (out.routing.expert_GTK < E).all()


@both_phases
@every_row
def test_parameters_that_are_nan_show_in_the_statistics(row, train):
    """A NaN weight sends nothing: by the output alone a broken router goes unseen."""
    gate = row.make()
    params = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), gates.drawn(gate))
    given = gates.context(train, step=row.step, keyed=train or row.noisy_eval)
    out = gates.program(row)(params, gate.init_state(gates.spec()), gates.tokens(), given)
    assert jnp.isnan(gates.stats_of(out, given.valid_GT).entropy) == bool(jax.tree.leaves(params))


@pytest.mark.parametrize("case", ["one expert", "fewer tokens than experts", "all experts"])
@every_row
def test_small_numbers_of_experts_and_tokens(row, case):
    """A gate either refuses in one line that names a field, or keeps the contract."""
    experts = 1 if case == "one expert" else E
    fields = dict(row.fields)
    if "k" in gating.fields(row.gate):
        k = gating.fields(row.gate)["k"][0]
        fields["k"] = {"one expert": 1, "all experts": E}.get(case, fields.get("k", k))
    try:
        gate = gating.make(row.gate, **fields)
        gate.check(experts, train=True)
    except ValueError as error:
        assert ("gate." in str(error) or "num_experts" in str(error)) and "\n" not in str(error)
        return
    length = 3 if case.startswith("fewer") else T
    given = gates.context(True, step=row.step)
    given = dataclasses.replace(
        given,
        **{
            f: getattr(given, f)[:, :length]
            for f in ("token_GT", "position_GT", "segment_GT", "valid_GT")
        },
    )
    state = gate.init_state(gates.spec(experts))
    out = jax.jit(lambda *a: gate(*a))(
        gates.drawn(gate, experts), state, gates.tokens()[:, :length], given
    )
    expert, weight = out.routing.expert_GTK, out.routing.weight_GTK
    assert expert.shape == (G, length, gate.columns(experts))
    assert (expert >= 0).all() and (expert < experts).all() and jnp.isfinite(weight).all()
    hits = (jax.nn.one_hot(expert, experts) * (weight > 0)[..., None]).sum(2)
    assert hits.max() <= 1
    assert gate.capacity(length, experts, 1.0) >= 1


def mesh_cases():
    """Every row on one mesh of eight; slow: on half of all meshes, each mesh for half of the rows,
    in evaluation on one."""
    for i, row in enumerate(ROWS):
        for train in (True, False):
            more = [meshes.ALL[(i + 2 * j) % len(meshes.ALL)] for j in range(5 if train else 1)]
            quick = {"data": 4, "expert": 2}
            for j, shape in enumerate([quick, *(shape for shape in more if shape != quick)]):
                phase = "train" if train else "eval"
                yield pytest.param(
                    row,
                    train,
                    shape,
                    id=f"{row.name}-{phase}-{meshes.name(shape)}",
                    marks=pytest.mark.slow if j or row.slow or not train else (),
                )


@pytest.mark.parametrize(("row", "train", "shape"), list(mesh_cases()))
def test_every_mesh_routes_alike(row, train, shape):
    """Routing, losses, means and the next state, against those without a mesh."""
    gate = row.make()
    groups = 8
    x = gates.tokens(groups=groups)
    given = gates.context(train, step=row.step, keyed=train or row.noisy_eval, groups=groups)
    state, params = gate.init_state(gates.spec()), gates.drawn(gate)

    def run(x, given):
        out = gate(params, state, x, given)
        return out, gate.update(state, gates.stats_of(out, given.valid_GT)) if train else state

    wanted = jax.jit(run)(x, given)
    with meshes.entered(shape):
        mesh = jax.sharding.get_mesh()
        split = jax.sharding.NamedSharding(mesh, batch_spec(mesh.abstract_mesh))
        x = jax.device_put(x, split)
        got = jax.jit(run)(x, given)
    np.testing.assert_array_equal(got[0].routing.expert_GTK, wanted[0].routing.expert_GTK)
    # Sums over the batch in another order, in float32.
    close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6)
    jax.tree.map(close, got, wanted)

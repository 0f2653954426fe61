"""The exam of every gate: one row each in tests/gates.py, and no gate is named here.

One test per row and phase tries all claims below on one compiled program; a failure names the row,
the phase and the claim.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import gating, losses
from moejax.mesh import batch_spec
from moejax.types import Gate, GateContext, GateTraits, Merge
from tests import gates, meshes
from tests.claims import Claims
from tests.gates import ROWS, D, E, G, T
from tests.hlo import collectives

forget = gates.forgetting()
TOKENS = np.random.default_rng(0).normal(size=(G, T, D)).astype(np.float32)
OTHERS = np.random.default_rng(1).normal(size=(G, T, D)).astype(np.float32)
QUICK = {"data": 2, "expert": 2}
"""The mesh of the exam itself, with one sequence per device."""

both_phases = pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
every_row = pytest.mark.parametrize("row", gates.PARAMS)

# float32 sums in another order.
close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6)


@functools.cache
def context(train: bool, keyed: bool, valid: tuple[int, ...] = (), shift: int = 0) -> GateContext:
    """The context of ``valid`` tokens per sequence (all if empty), moved to the right by ``shift``
    times their padding."""
    count = jnp.asarray(valid or (T,) * G)[:, None]
    start = shift * (T - count)
    place = jnp.arange(T) - start
    plain = gates.context(train, keyed=keyed)
    return gates.context(
        train,
        keyed=keyed,
        token_BL=jnp.take_along_axis(plain.token_GT, place % T, axis=1),
        valid_BL=(place >= 0) & (place < count),
    )


class Exam:
    """A gate of one row in one phase, its random parameters, and its compiled program."""

    def __init__(self, row: gates.Row, train: bool):
        self.row, self.train = row, train
        self.gate = row.make()
        self.state = self.gate.init_state(gates.spec())
        self.params = jax.device_get(gates.drawn(self.gate))
        self.traces: list[GateContext] = []
        self.program = jax.jit(self.step)

    def step(self, params, state, x_GTD, given):
        """Output, statistics and the next state (in evaluation the same)."""
        self.traces.append(given)
        out = self.gate(params, state, x_GTD, given)
        stats = gates.stats_of(out, given.valid_GT)
        return out, stats, self.gate.update(state, stats) if self.train else state

    def given(self, *args, **kwargs) -> GateContext:
        keyed = self.train or self.row.noisy_eval
        found = context(self.train, keyed, *args, **kwargs)
        return dataclasses.replace(found, step=jnp.int32(self.row.step))

    def run(self, x=TOKENS, given=None, params=None):
        """The program's three results, as arrays of NumPy."""
        params = self.params if params is None else params
        given = self.given() if given is None else given
        return jax.device_get(self.program(params, self.state, x, given))

    @functools.cached_property
    def result(self):
        return self.run()

    @property
    def out(self):
        return self.result[0]


def fields_of(given, names, index):
    """The context with some of its fields indexed."""
    return dataclasses.replace(given, **{f: getattr(given, f)[index] for f in names})


OF_TOKENS = ("token_GT", "position_GT", "segment_GT", "valid_GT")
OF_GROUPS = (*OF_TOKENS, "row_GR", "task_GR")


def visits(routing, experts=E):
    """Visits of each token to each expert: [G, T, E]."""
    hits = routing.expert_GTK[..., None] == np.arange(experts)
    return (hits & (routing.weight_GTK > 0)[..., None]).sum(2)


def active_experts(routing):
    return np.where(routing.weight_GTK > 0, routing.expert_GTK, -1)


# ---------------------------------------------------------------- claims in both phases


def shapes_dtypes_and_ranges_follow_the_contract(exam):
    gate, out = exam.gate, exam.out
    assert isinstance(gate, Gate)
    expert, weight = out.routing.expert_GTK, out.routing.weight_GTK
    assert expert.shape == weight.shape == (G, T, gate.columns(E))
    assert expert.dtype == np.int32 and weight.dtype == np.float32
    assert (expert >= 0).all() and (expert < E).all()
    assert (weight >= 0).all() and np.isfinite(weight).all() and (weight > 0).any()
    for stat in jax.tree.leaves(out.stats):
        assert stat.shape == (G, T, E) and stat.dtype == np.float32
        assert np.isfinite(stat).all()
    # float32: E roundings of numbers at most 1.
    np.testing.assert_allclose(out.stats.probs_GTE.sum(-1), 1.0, atol=1e-5)
    for value in out.means.values():
        assert value.shape[0] == G and value.dtype == np.float32
    for value in out.losses.values():
        assert value.shape == () and np.isfinite(value)


def no_token_visits_an_expert_twice(exam):
    assert visits(exam.out.routing).max() == 1


def large_logits_do_not_remove_a_pair_from_a_token(exam):
    """A weight that underflows to 0 would be a pair that does not exist."""
    few, many = (exam.run(scale * TOKENS)[0].routing.weight_GTK for scale in (0.01, 100.0))
    assert np.isfinite(few).all() and np.isfinite(many).all()
    fixed = (few > 0).all() and not exam.row.thins and exam.out.mixing is None
    assert (many > 0).all() or not fixed


def a_gate_that_merges_experts_declares_it_and_routes_by_the_merged_weights(exam):
    gate, mixing, routing = exam.gate, exam.out.mixing, exam.out.routing
    merges = GateTraits.of(gate).mixes == "weights"
    assert isinstance(mixing, Merge) == merges
    if isinstance(mixing, Merge):
        weight = mixing.weight_BNE
        assert weight.shape == (G, -(-T // mixing.span), E)
        assert (weight >= 0).all() and weight.dtype == np.float32
        # float32: E roundings of numbers at most 1.
        np.testing.assert_allclose(weight.sum(-1), 1.0, atol=1e-5)
        every = np.broadcast_to(np.arange(E), (G, T, E))
        np.testing.assert_array_equal(routing.expert_GTK, every)
        by_token = np.repeat(weight, mixing.span, axis=1)[:, :T]
        np.testing.assert_array_equal(routing.weight_GTK, by_token)


def padding_is_never_routed_and_its_tokens_change_nothing(exam):
    given = exam.given((T, T - 3, T - 8, 0))
    valid = np.asarray(given.valid_GT)
    x = np.where(valid[..., None], TOKENS, 0)  # the layer blanks padding
    blank = dataclasses.replace(given, token_GT=np.where(valid, given.token_GT, 0))
    out, other = (exam.run(x, c)[0] for c in (given, blank))
    assert (out.routing.weight_GTK[~valid] == 0).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(out))
    jax.tree.map(
        np.testing.assert_array_equal, (out.losses, out.means), (other.losses, other.means)
    )
    np.testing.assert_array_equal(out.routing.weight_GTK, other.routing.weight_GTK)
    np.testing.assert_array_equal(active_experts(out.routing), active_experts(other.routing))


def padding_before_a_sequence_acts_like_padding_behind_it(exam):
    """The i-th valid token is routed alike, and noise, losses and the gate's means are equal."""
    count = (T, T - 3, T - 8, T - 5)
    behind, before = exam.given(count), exam.given(count, shift=1)
    x = np.where(np.asarray(behind.valid_GT)[..., None], TOKENS, 0)
    start = T - np.asarray(count)[:, None]

    def moved(a, by):
        index = (np.arange(T) - by) % T
        return np.take_along_axis(a, index.reshape(*index.shape, *(1,) * (a.ndim - 2)), axis=1)

    wanted = exam.run(x, behind)[0]
    got = exam.run(moved(x, start), before)[0]
    weight, expert = (moved(a, -start) for a in (got.routing.weight_GTK, got.routing.expert_GTK))
    active = wanted.routing.weight_GTK > 0
    np.testing.assert_array_equal(weight > 0, active)
    np.testing.assert_array_equal(expert[active], wanted.routing.expert_GTK[active])
    # float32 sums over a sequence in another order.
    near = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    near(weight, wanted.routing.weight_GTK)
    jax.tree.map(near, (got.losses, got.means), (wanted.losses, wanted.means))


def ties_are_broken_alike_in_any_order_of_the_sequences(exam):
    """Equal tokens in every sequence, and the sequences in another order."""
    x, order = np.zeros_like(TOKENS), np.asarray([2, 0, 3, 1])
    whole = exam.run(x)[0].routing
    got = exam.run(x, fields_of(exam.given(), OF_GROUPS, order))[0].routing
    np.testing.assert_array_equal(got.expert_GTK, whole.expert_GTK[order])
    np.testing.assert_allclose(got.weight_GTK, whole.weight_GTK[order], rtol=1e-6)


def nan_tokens_never_give_an_invalid_expert(exam):
    x = TOKENS.copy()
    x[0, 3] = np.nan
    expert = exam.run(x)[0].routing.expert_GTK
    assert (expert >= 0).all() and (expert < E).all()


def nan_parameters_appear_in_the_statistics(exam):
    """A NaN weight sends nothing: by the output alone a broken router goes unnoticed."""
    params = jax.tree.map(lambda x: np.full_like(x, np.nan), exam.params)
    stats = exam.run(params=params)[1]
    assert np.isnan(stats.entropy) == bool(jax.tree.leaves(params))


def the_order_of_tokens_does_not_matter_where_promised(exam):
    """In evaluation: everything that belongs to a token moves with it."""
    if exam.train or not exam.row.equivariant:
        return
    order = np.random.default_rng(1).permutation(T)
    fields = ("token_GT", "segment_GT", "valid_GT")
    moved = fields_of(exam.given(), fields, (slice(None), order))
    routing, other = exam.out.routing, exam.run(TOKENS[:, order], moved)[0].routing
    np.testing.assert_array_equal(routing.expert_GTK[:, order], other.expert_GTK)
    # A product over other rows may differ by an ulp.
    np.testing.assert_allclose(routing.weight_GTK[:, order], other.weight_GTK, rtol=1e-5, atol=1e-6)


def the_gate_is_traced_once(exam):
    assert len(exam.traces) == 1, "values of the inputs decided what is compiled"


BOTH = (
    shapes_dtypes_and_ranges_follow_the_contract,
    no_token_visits_an_expert_twice,
    large_logits_do_not_remove_a_pair_from_a_token,
    a_gate_that_merges_experts_declares_it_and_routes_by_the_merged_weights,
    padding_is_never_routed_and_its_tokens_change_nothing,
    padding_before_a_sequence_acts_like_padding_behind_it,
    ties_are_broken_alike_in_any_order_of_the_sequences,
    nan_tokens_never_give_an_invalid_expert,
    nan_parameters_appear_in_the_statistics,
    the_order_of_tokens_does_not_matter_where_promised,
)


# ---------------------------------------------------------------- claims in training


def load_is_exact_where_promised(exam):
    if exam.row.exact_load:
        wanted = T * exam.gate.columns(E) / E
        wanted = wanted if exam.row.exact_load is True else exam.row.exact_load
        np.testing.assert_array_equal(visits(exam.out.routing).sum(1), np.full((G, E), wanted))


def state_is_float32_or_int32_finite_and_keeps_its_structure(exam):
    state = exam.state
    for x in (TOKENS, OTHERS, TOKENS):
        _, _, new = exam.program(exam.params, state, x, exam.given())
        assert jax.tree.structure(new) == jax.tree.structure(state)
        described = [jax.tree.map(lambda a: (a.shape, a.dtype), s) for s in (new, state)]
        assert described[0] == described[1]
        state = new
    for leaf in jax.tree.leaves((exam.state, jax.device_get(state))):
        assert leaf.dtype in (jnp.float32, jnp.int32) and np.isfinite(leaf).all()


def later_steps_run_the_same_program(exam):
    state = exam.state
    for step in (0, 1, 2):
        given = dataclasses.replace(exam.given(), step=jnp.int32(step))
        state = exam.program(exam.params, state, TOKENS, given)[2]


def gradients_are_finite_and_reach_each_parameter_from_the_declared_source(exam):
    row, gate = exam.row, exam.gate
    grads = gradients_by_source(exam)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    paths = jax.tree_util.tree_leaves_with_path(grads[0])
    names = {jax.tree_util.keystr(path) for path, _ in paths}
    moved = {
        source: {jax.tree_util.keystr(path) for path, g in paths if np.abs(g[i]).max() > 0}
        for i, source in enumerate(("task", "aux", "policy"))
    }
    untrained = {name for name in names if any(f"'{field}'" in name for field in row.untrained)}
    assert set().union(*moved.values()) == names - untrained
    if gate.trained_by == "none":
        assert not names
    elif names - untrained:
        assert moved[gate.trained_by]
    if gate.trained_by != "task":
        assert not moved["task"]


def gradients_by_source(exam):
    """Gradients of parameters and input, of the task, the losses and the policy: [3, ...]."""
    gate, state, given = exam.gate, exam.state, exam.given()
    valid = given.valid_GT

    def sources(params, x):
        out = gate(params, state, x, given)
        # A random linear reading of what each expert would add; identity weights count too.
        reading = jax.random.normal(jax.random.key(5), (G, T, E))
        read = jnp.take_along_axis(reading, out.routing.expert_GTK, axis=-1)
        task = jnp.sum(read * out.routing.weight_GTK)
        if out.identity_weight_GT is not None:
            task += jnp.sum(out.identity_weight_GT * reading[..., 0])
        load = losses.expert_load(out.routing.expert_GTK, out.routing.weight_GTK, E)
        balance = losses.load_balance(load, out.stats.probs_GTE, valid)
        aux = balance + losses.z_loss(out.stats.logits_GTE, valid) + sum(out.losses.values())
        policy = jnp.float32(0)
        if out.policy is not None:
            stacked = jax.tree.map(lambda a: a[None], out.policy)
            reward = jax.random.normal(jax.random.key(6), (G, T))
            policy = sum(losses.policy_gradient(stacked, reward, valid).values(), policy)
        return jnp.stack([task, aux, policy])

    params = jax.tree.map(lambda x: 0.3 * x, exam.params)
    return jax.device_get(jax.jit(jax.jacrev(sources, (0, 1)))(params, TOKENS))


def bfloat16_tokens_are_routed_in_float32(exam):
    half = TOKENS.astype(jnp.bfloat16)
    low, full = exam.run(half)[0], exam.run(half.astype(np.float32))[0]
    jax.tree.map(np.testing.assert_array_equal, low.routing, full.routing)
    assert {leaf.dtype for leaf in jax.tree.leaves(low.stats)} == {np.dtype("float32")}


def small_numbers_of_experts_and_tokens_are_refused_or_keep_the_contract(exam):
    """A refusal is one line that names a field."""
    own = gating.fields(exam.row.gate)
    cases = {"one expert": (1, T), "fewer tokens than experts": (E, 3)}
    if "k" in own:  # otherwise the gate as it is
        cases["all experts"] = E, T
    ran = {}
    for case, (experts, length) in cases.items():
        fields = dict(exam.row.fields)
        if "k" in own:
            k = {"one expert": 1, "all experts": E}
            fields["k"] = k.get(case, fields.get("k", own["k"][0]))
        try:
            gate = gating.make(exam.row.gate, **fields)
            gate.check(experts, train=True)
        except ValueError as error:
            assert "gate." in str(error) or "num_experts" in str(error), case
            assert "\n" not in str(error), case
            continue
        assert gate.capacity(length, experts, 1.0) >= 1, case
        given = fields_of(exam.given(), OF_TOKENS, (slice(None), slice(length)))
        state = gate.init_state(gates.spec(experts))
        args = gates.drawn(gate, experts), state, TOKENS[:, :length], given
        ran[case] = gate, args
    run = jax.jit(lambda args: {case: ran[case][0](*a).routing for case, a in args.items()})
    routings = jax.device_get(run({case: args for case, (_, args) in ran.items()}))
    for case, routing in routings.items():
        experts, length = cases[case]
        expert, weight = routing.expert_GTK, routing.weight_GTK
        assert expert.shape == (G, length, ran[case][0].columns(experts)), case
        assert (expert >= 0).all() and (expert < experts).all() and np.isfinite(weight).all(), case
        assert visits(routing, experts).max() <= 1, case


def jit_changes_nothing(exam):
    params, x = jax.device_put((exam.params, TOKENS))
    plain = jax.device_get(exam.gate(params, exam.state, x, exam.given()))
    np.testing.assert_array_equal(plain.routing.expert_GTK, exam.out.routing.expert_GTK)
    jax.tree.map(close, plain, exam.out)


def a_mesh_changes_nothing(exam):
    on_mesh(exam, QUICK, exam.result, TOKENS, exam.given())


TRAINING = (
    load_is_exact_where_promised,
    state_is_float32_or_int32_finite_and_keeps_its_structure,
    later_steps_run_the_same_program,
    the_gate_is_traced_once,
    gradients_are_finite_and_reach_each_parameter_from_the_declared_source,
    small_numbers_of_experts_and_tokens_are_refused_or_keep_the_contract,
    bfloat16_tokens_are_routed_in_float32,
    a_mesh_changes_nothing,
)


def subject(row, train):
    return f"{row.name} in {'training' if train else 'evaluation'}"


@both_phases
@every_row
def test_a_gate_keeps_its_contract(row, train):
    exam, claims = Exam(row, train), Claims(subject(row, train))
    for claim in BOTH + (TRAINING if train else (the_gate_is_traced_once,)):
        claims.check(claim, exam)
    if row == ROWS[0]:
        claims.check(jit_changes_nothing, exam)
    claims.settle()


@pytest.mark.slow
@both_phases
@pytest.mark.parametrize("row", gates.DISTINCT)
def test_a_gate_without_jit_and_in_other_precision_computes_the_same(row, train):
    """The claims that need many compilations: without jit, or in another precision."""
    exam, claims = Exam(row, train), Claims(subject(row, train))
    claims.check(jit_changes_nothing, exam)
    if not train:
        claims.check(bfloat16_tokens_are_routed_in_float32, exam)
    claims.settle()


def mesh_cases():
    """Each mesh for a tenth of the rows in training, and for others in evaluation."""
    for i, row in enumerate(ROWS):
        for train, first in ((True, 0), (False, 5 + i // len(meshes.ALL))):
            shape = meshes.ALL[(i + first) % len(meshes.ALL)]
            phase = "train" if train else "eval"
            yield pytest.param(row, train, shape, id=f"{row.name}-{phase}-{meshes.name(shape)}")


@pytest.mark.slow
@pytest.mark.parametrize(("row", "train", "shape"), list(mesh_cases()))
def test_every_mesh_gives_the_same_routing(row, train, shape):
    exam, groups = Exam(row, train), 8
    x = np.concatenate([TOKENS, OTHERS])
    given = gates.context(train, step=row.step, keyed=train or row.noisy_eval, groups=groups)
    on_mesh(exam, shape, exam.run(x, given), x, given)


def on_mesh(exam, shape, wanted, x, given):
    """Output, statistics and next state on a mesh are those without one; only sums are sent."""
    with meshes.entered(shape):
        mesh = jax.sharding.get_mesh()
        split = jax.sharding.NamedSharding(mesh, batch_spec(mesh.abstract_mesh))
        args = exam.params, exam.state, jax.device_put(x, split), given
        program = jax.jit(exam.step).lower(*args).compile()
        got = jax.device_get(program(*args))
    np.testing.assert_array_equal(got[0].routing.expert_GTK, wanted[0].routing.expert_GTK)
    jax.tree.map(close, without_log_probabilities(got), without_log_probabilities(wanted))
    sent = collectives(program.as_text(), mesh)
    assert {c.kind for c in sent} <= {"all-reduce"}, sent
    assert max([size for c in sent for size in c.sizes], default=0) < T * E, "more than sums"


def without_log_probabilities(result):
    """The result without logits that are the logarithms of its probabilities.

    A gate that computes probabilities as 1 - s rounds them to an ulp of 1, which the logarithm of a
    small one magnifies without bound. The probabilities themselves are in the result.
    """
    out, *others = result
    stats = out.stats
    if np.allclose(np.exp(stats.logits_GTE), stats.probs_GTE, rtol=1e-5, atol=2e-6):
        stats = dataclasses.replace(stats, logits_GTE=stats.probs_GTE)
    return dataclasses.replace(out, stats=stats), *others


@pytest.mark.skipif(bool(gates.OWN), reason="one gate from elsewhere is examined")
def test_every_name_has_a_row():
    assert {row.gate for row in ROWS} == set(gating.names())

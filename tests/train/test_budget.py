"""The cost of a token, counted on the traced model, against products written out by hand."""

import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from moejax.errors import UserError
from moejax.sweep.results import kept_pairs
from moejax.train.cost import budget as budgets
from moejax.train.cost.budget import (
    Budget,
    TokenFlops,
    check_evaluation,
    checked_budget,
    count_budget,
)
from moejax.train.metrics import rows
from tests import steps

D, V, L, E, F, LAYERS = 16, steps.VOCAB, steps.LENGTH, 8, steps.F, 2
PASSES = 3  # forward, gradient of the input, gradient of the weights


@pytest.fixture
def gib(monkeypatch: pytest.MonkeyPatch) -> float:
    """The memory of this machine, for tests on machines of any size."""
    monkeypatch.setattr(budgets, "host_memory", lambda: 16 * 2**30)
    monkeypatch.setattr(budgets, "memory_of", lambda device, sharing: 16 * 2**30 // sharing)
    return 16.0


TOO_LARGE: dict[str, tuple[dict[str, Any], list[str]]] = {
    "kept activations": (
        {"train__seq_len": 20_000},
        [
            "train.batch_size=8 x train.seq_len=20000 needs",
            "train.grad_accum=1",
            "model.remat=full",
        ],
    ),
    "a product that is not kept": (
        {"train__seq_len": 200_000, "model__remat": "full"},
        ["train.batch_size=8 x train.seq_len=200000 needs", "lower one of them"],
    ),
    "a model": (
        {"model__d_model": 200_000},
        ["a model of", "parameters needs", "mesh.fsdp, mesh.expert"],
    ),
    "a model too large to be traced": (
        {"moe__num_experts": 2**31 - 8},
        ["a model of", "GiB state and gradients)", "make it smaller"],
    ),
    "a batch of data": (
        {"train__batch_size": 2**31 - 8},
        ["train.batch_size=2147483640 needs", "for one batch of data, and this machine has 16.0"],
    ),
    "a limit of the user's": (
        {"mesh__device_gib": 0.0001},
        ["a device mesh.device_gib=0.0001 allows 104.9 KiB"],
    ),
}


@pytest.mark.quick(1)
@pytest.mark.parametrize("case", TOO_LARGE)
def test_a_run_that_does_not_fit_is_refused_before_it_compiles(case: str, gib: float):
    changes, parts = TOO_LARGE[case]
    with pytest.raises(UserError) as caught:
        checked_budget(steps.make({"expert": 2}, **changes))
    text = str(caught.value)
    assert "\n" not in text
    for part in parts:
        assert part in text


@pytest.mark.slow
def test_a_run_that_fits_is_accepted_and_the_user_may_set_the_limit(gib: float):
    fits = checked_budget(steps.make({"expert": 2}))
    assert fits == count_budget(steps.make({"expert": 2}))
    large = steps.make({"expert": 2}, train__seq_len=20_000, mesh__device_gib=1e6)
    assert checked_budget(large).activation_bytes > 16 * 2**30


@pytest.mark.slow
def test_an_evaluation_that_does_not_fit_is_refused_before_it_compiles(gib: float):
    """It is of whole batches, whatever training does to theirs."""
    run = steps.make({"expert": 2}, train__seq_len=15_000, train__grad_accum=4, model__remat="full")
    for check in (check_evaluation, checked_budget):
        with pytest.raises(UserError, match="seq_len=15000 in evaluation needs .*; lower one") as e:
            check(run)
        assert "grad_accum" not in str(e.value) and "gradients" not in str(e.value)
    with pytest.raises(UserError, match="a model of .* parameters in evaluation needs"):
        check_evaluation(steps.make({"expert": 2}, model__d_model=200_000))
    check_evaluation(steps.make({"expert": 2}))


@pytest.mark.slow
def test_scores_of_attention_are_the_largest_product_on_each_device():
    """B x H x L x L float32, shared out over the devices; kept or not."""
    for remat in ("none", "full"):
        run = steps.make({"expert": 2}, train__seq_len=512, model__remat=remat)
        assert count_budget(run).product_bytes == steps.BATCH * 4 * 512 * 512 * 4 // 2


@functools.cache
def budget(gate: str = "top_k", **changes: Any) -> Budget:
    return count_budget(steps.make({"expert": 1}, gate, **changes))


def outside_the_experts(router: bool = True) -> float:
    """Forward FLOPs per token: projections, scores and values of attention, router, head."""
    attention = 4 * 2 * D * D + 2 * 2 * L * D
    return LAYERS * (attention + (2 * D * E if router else 0)) + 2 * D * V


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    "activation, matrices", [("swiglu", 3), ("relu", 2)], ids=["swiglu", "relu"]
)
def test_a_pair_costs_one_expert_on_one_token(activation: str, matrices: int):
    counted = budget(moe__activation=activation)
    assert counted.eval_flops.per_pair == matrices * 2 * D * F
    assert counted.train_flops.per_pair == PASSES * matrices * 2 * D * F


@pytest.mark.slow
def test_everything_else_is_counted_once_per_token_whatever_the_routing():
    """But for products of routing alone: the balance loss's, of size E, and the gradient of the
    routing weights, K products of size D."""
    by_hand = outside_the_experts()
    for k in (1, 2, 5):
        counted = budget("top_k", moe__gate__k=k, moe__gate__renormalize=k > 1)
        loss, weights = LAYERS * 2 * E, LAYERS * 2 * k * D
        assert by_hand <= counted.eval_flops.fixed <= by_hand + loss
        assert PASSES * by_hand <= counted.train_flops.fixed
        assert counted.train_flops.fixed <= PASSES * (by_hand + loss) + weights


def test_a_model_without_experts_has_no_pairs_and_its_ffn_is_fixed():
    counted = budget(moe__every=0)
    ffn = LAYERS * 3 * 2 * D * 32
    assert counted.eval_flops == TokenFlops(outside_the_experts(router=False) + ffn, 0.0)
    assert counted.train_flops.fixed == PASSES * counted.eval_flops.fixed


@pytest.mark.slow
def test_a_shared_expert_is_fixed_and_a_dense_layer_takes_its_experts_with_it():
    plain, shared = budget(), budget(moe__shared_experts=1)
    one_expert = LAYERS * 3 * 2 * D * F
    assert shared.eval_flops.fixed == plain.eval_flops.fixed + one_expert
    assert shared.eval_flops.per_pair == plain.eval_flops.per_pair
    every_other = budget(moe__every=2)
    assert every_other.train_flops.per_pair == plain.train_flops.per_pair


@pytest.mark.slow
def test_the_cost_of_a_pair_does_not_depend_on_the_gates_columns():
    """Dense has a column for every expert: that many pairs are in the traced program."""
    plain, dense = budget(), budget("dense")
    assert dense.train_flops.per_pair == plain.train_flops.per_pair
    assert dense.eval_flops.per_pair == plain.eval_flops.per_pair
    for counted, columns in ((plain, 2), (dense, E)):
        routed = counted.flops_per_step / (steps.BATCH * L) - counted.train_flops.fixed
        assert routed == LAYERS * columns * counted.train_flops.per_pair


@pytest.mark.slow
@pytest.mark.parametrize("slots", [1, 3])
def test_the_cost_of_slots_does_not_depend_on_the_number_of_recorded_pairs(slots: int):
    """A pair is a token and an expert; the experts' rows are E x slots of each sequence."""
    counted = budget("soft", moe__gate__slots=slots, moe__allow_future_leak=True)
    mixing = LAYERS * (2 * D + 2 * 2 * D) * E * slots  # logits, and both mixtures
    experts = LAYERS * 3 * 2 * D * F * E * slots / L
    for flops, passes in ((counted.eval_flops, 1), (counted.train_flops, PASSES)):
        loss = passes * LAYERS * 2 * E  # the balance loss's product
        by_hand = passes * (outside_the_experts(router=False) + mixing)
        assert by_hand <= flops.fixed <= by_hand + loss
        assert LAYERS * E * flops.per_pair == passes * experts


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["cells", "all_experts"])
def test_the_count_does_not_depend_on_transport_capacity_or_recomputation(transport: str):
    plain = budget(moe__transport="dropless")
    other = budget(
        moe__transport=transport,
        moe__eval_transport=transport,
        moe__eval_capacity_factor=8.0,  # enough for every token on one expert: causal
        moe__capacity_factor=2.0,
        model__remat="full",
        train__grad_accum=2,
    )
    assert (other.train_flops, other.eval_flops) == (plain.train_flops, plain.eval_flops)


@pytest.mark.slow
@pytest.mark.parametrize(("gate", "span"), [("smear", L), ("lory", 4)])
def test_merged_experts_cost_one_expert_per_token_and_the_merging_of_all_per_span(gate, span):
    """Nothing is per pair. Backwards merging costs twice, and is done once more."""
    fields: dict[str, Any] = {"moe__gate__segment": span} if gate == "lory" else {}
    counted = budget(gate, moe__allow_future_leak=True, **fields)
    expert, merging = LAYERS * 3 * 2 * D * F, LAYERS * E * 3 * 2 * D * F / span
    # The router reads one mean per span.
    router, loss = LAYERS * 2 * D * E / span, LAYERS * 2 * E
    by_hand = outside_the_experts(router=False) + expert + router
    assert counted.eval_flops.per_pair == counted.train_flops.per_pair == 0
    assert by_hand + merging <= counted.eval_flops.fixed <= by_hand + merging + loss
    total = PASSES * by_hand + (PASSES + 1) * merging
    assert total <= counted.train_flops.fixed <= total + PASSES * loss


def routed_blocks() -> Any:
    """One of two layers has experts, and room for 5 of 16 tokens in training."""
    return steps.make(
        {"expert": 1},
        moe__every=2,
        model__mod_every=2,
        model__mod_capacity=0.3,
        train__grad_accum=2,
    )


ROOM = 5  # ceil(0.3 * 16)


@pytest.mark.slow
def test_a_pair_costs_the_same_in_a_block_that_only_some_tokens_pass_through():
    counted = count_budget(routed_blocks())
    assert counted.eval_flops.per_pair == 3 * 2 * D * F
    assert counted.train_flops.per_pair == PASSES * 3 * 2 * D * F
    pairs = 2 * ROOM / L  # a token has, in training, in the one layer with experts
    whole = counted.train_flops.fixed + pairs * counted.train_flops.per_pair
    assert counted.flops_per_step == pytest.approx(steps.BATCH * L * whole, rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_measured_flops_of_routed_blocks_are_those_of_the_pairs_that_were_computed(train: bool):
    """Pairs are counted in the experts' layer, which some of the tokens reach; FLOPs are per token
    of the rows."""
    run = routed_blocks()
    batch = {name: jnp.asarray(x) for name, x in steps.batch(0).items()}
    state = jax.jit(lambda: run.task.init(jax.random.key(0)))()
    forward = jax.jit(functools.partial(run.task.forward, train=train))
    totals = jax.device_get(forward(state, (), batch, jnp.int32(0), jax.random.key(1)))
    data: Any = types.SimpleNamespace(eval_extras=lambda loss: {}, baselines=dict)
    row = rows.eval_row(0, [totals], data, "")
    tokens = int(steps.batch(0)["valid"].sum())
    computed = int(totals.stats.load_E.sum() - totals.stats.dropped_E.sum())
    assert 0 < int(totals.stats.tokens.sum()) < tokens, "some tokens must stay behind"
    pairs = kept_pairs(row)
    assert pairs == pytest.approx(computed / tokens, rel=1e-6)

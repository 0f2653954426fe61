"""Equal cost: the claims of a page, the widths that are solved for, and FLOPs by hand."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moejax import gating
from moejax.config import load, to_dict
from moejax.errors import UserError
from moejax.options import DispatchOptions
from moejax.sweep import count as counting
from moejax.sweep import match
from moejax.sweep.count import Counted, count
from moejax.sweep.definition import expand
from moejax.sweep.match import Comparison, Solved

LAYERS, D, L, E, V = 2, 16, 8, 4, 257
PAGE = """
from moejax.config import default
{claims}
def get_config():
    config = default()
    config.update_from_flattened_dict({fields!r})
    return config

def sweep(arg=None):
    yield {{"name": "dense_ffn", "moe.every": 0, "seeds": 2}}
    yield {{"name": "top_2", "moe.gate.name": "top_k", {top_2}}}
    yield {{"name": "switch", "moe.gate.name": "switch", {switch}}}
"""
FIELDS = {
    "model.num_layers": LAYERS,
    "model.d_model": D,
    "model.d_ff": 64,
    "model.num_heads": 2,
    "model.num_kv_heads": 2,
    "model.vocab_size": V,
    "moe.num_experts": E,
    "train.seq_len": L,
    "train.batch_size": 4,
}
FLOPS = 'MATCH, BASELINE = "active_flops", "dense_ffn"'
SOLVE = '"moe.d_ff": "match"'

Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def page(claims: str = "", top_2: str = "", switch: str = "") -> str:
        path = tmp_path / "page.py"
        text = PAGE.format(claims=claims, top_2=top_2, switch=switch, fields=FIELDS)
        path.write_text(text)
        return str(path)

    return page


def by_hand(config: dict[str, Any], experts: float) -> float:
    """FLOPs of a token, forward and backward, without the gate's own few products."""
    attention, head = LAYERS * (4 * 2 * D * D + 2 * 2 * L * D), 2 * D * V
    if not config["moe"]["every"]:
        return 3 * (attention + head + LAYERS * 3 * 2 * D * config["model"]["d_ff"])
    router, expert = 2 * D * E, 3 * 2 * D * config["moe"]["d_ff"]
    return 3 * (attention + head + LAYERS * (router + experts * expert))


@pytest.mark.slow
def test_a_matched_width_costs_what_the_baseline_costs_by_hand(write: Write):
    """The baseline's 64 hidden units are two experts' 32, but for the router."""
    sweep = expand(write(FLOPS, SOLVE))
    (solved,) = sweep.solved
    assert (solved.variant, solved.field, solved.width) == ("top_2", "moe.d_ff", 32)
    configs = {trial.variant: trial.config for trial in sweep.trials if trial.seed == 0}
    assert configs["top_2"]["moe"]["d_ff"] == 32
    dense, top_2 = by_hand(configs["dense_ffn"], 0), by_hand(configs["top_2"], 2)
    # Products of routing alone, of size E (balance loss) and K D (gradient of its weights).
    small = LAYERS * (3 * 2 * E + 2 * 2 * D)
    assert -1e-9 <= solved.ratio - top_2 / dense <= small / dense
    assert abs(solved.ratio - 1) < match.TOLERANCE
    seeds = count([trial.config for trial in sweep.trials if trial.variant == "dense_ffn"])
    assert [counted.active_flops for counted in seeds] == [dense, dense]
    # Embedding, and per layer attention, two norms, router and experts; the last norm.
    (counted,) = count([configs["top_2"]])
    assert counted.active_flops == pytest.approx(solved.ratio * dense, rel=1e-12)
    experts = LAYERS * E * 3 * D * 32
    assert counted.total_params == experts + V * D + LAYERS * (4 * D * D + 2 * D + D * E) + D


def test_a_mixing_gate_counts_all_its_columns():
    """Its slots are not for pairs: tests/train/test_budget.py has what one of these costs."""
    model = SimpleNamespace(
        num_moe_layers=LAYERS,
        moe=DispatchOptions(num_experts=E).config,
        gate=gating.make("soft", slots=3),
    )
    assert counting._nominal_pairs(model) == LAYERS * E


def test_a_trial_reads_the_solved_width_as_a_number(write: Write, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(match, "count", linear)
    source = write(FLOPS, SOLVE)
    first, again = expand(source), expand(source)
    assert [t.id for t in first.trials] == [t.id for t in again.trials]
    (trial,) = (t for t in first.trials if t.variant == "top_2")
    assert "--config.moe.d_ff=32" in trial.overrides
    assert to_dict(load(source, trial.overrides).config) == trial.config


def linear(configs: list[dict[str, Any]]) -> list[Counted]:
    """Parameters and FLOPs of made-up models: straight lines in the widths."""
    found = []
    for config in configs:
        moe, wide = config["moe"], config["model"]["d_ff"]
        experts = {"top_k": 2, "switch": 1}.get(moe["gate"]["name"], 2)
        width = experts * moe["d_ff"] if moe["every"] else wide
        params = 4 * moe["d_ff"] if moe["every"] else wide
        found.append(Counted(1000 + 10 * params, 500.0 + 3 * width, tokens_per_row=1))
    return found


@pytest.mark.parametrize(
    "claims, width, ratio",
    [
        (FLOPS, 32, 1.0),
        # 1000 + 40 w = 1000 + 10 * 64
        ('MATCH, BASELINE = "total_params", "dense_ffn"', 16, 1.0),
    ],
)
def test_the_claimed_cost_is_the_one_that_is_matched(
    claims: str, width: int, ratio: float, write: Write, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(match, "count", linear)
    sweep = expand(write(claims, SOLVE))
    assert sweep.solved == (Solved("top_2", "moe.d_ff", width, ratio),)


def test_a_width_is_a_multiple_of_8_and_reports_how_far_it_misses(
    write: Write, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(match, "count", linear)
    page = write('MATCH, BASELINE = "active_flops", "switch"', SOLVE, '"moe.d_ff": 72')
    (solved,) = expand(page).solved
    # 72 / 2 = 36 lies between 32 and 40.
    assert solved.width in (32, 40)
    assert solved.ratio == (500 + 6 * solved.width) / (500 + 3 * 72)


def test_the_smallest_width_is_a_solution(write: Write, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(match, "count", linear)
    page = write('MATCH, BASELINE = "total_params", "switch"', SOLVE, '"moe.d_ff": 8')
    assert expand(page).solved == (Solved("top_2", "moe.d_ff", 8, 1.0),)


def test_nothing_is_counted_without_a_width_to_match(write: Write, monkeypatch: pytest.MonkeyPatch):
    def never(configs: Any) -> Any:
        raise AssertionError("counted")

    monkeypatch.setattr(counting, "_in_process", never)
    sweep = expand(write(FLOPS))
    assert sweep.comparison == Comparison("active_flops", "dense_ffn") and not sweep.solved
    assert expand(write()).comparison == Comparison()


def test_a_function_may_say_what_constants_do(write: Write):
    function = 'def comparison(arg): return {"baseline": arg or "top_2", "pilot": 0.01}'
    page = write(f'MATCH, BASELINE = "step_time", "switch"\n{function}')
    assert expand(page).comparison == Comparison("step_time", "top_2", 0.01)


CLAIMS = {
    'MATCH = "flops"': "MATCH='flops' is unknown; use one of active_flops, total_params, step_time",
    "MATCH = ['active_flops']": "is unknown; use one of active_flops",
    'MATCH = "active_flops"': "MATCH='active_flops' needs BASELINE",
    'BASELINE = "top2"': "BASELINE='top2' is not a variant; did you mean 'top_2'",
    "BASELINE = 3": "BASELINE=3 is not a variant",
    "PILOT = -0.1": "PILOT=-0.1 must be a sweep's folder, or a standard deviation above 0",
    "PILOT = True": "PILOT=True must be",
    "PILOT = float('nan')": "PILOT=nan must be",
    'PILOT = "no/such"': "PILOT='no/such' has no results.csv; name a sweep's folder",
    "def comparison(): return 3": "comparison() gives 3; return a dict with some of match, base",
    "comparison = {'macth': 1}": "comparison() gives {'macth': 1}",
    "def comparison(): return 1 / 0": "ZeroDivisionError",
}


@pytest.mark.parametrize("claims", CLAIMS)
def test_an_invalid_comparison_is_refused_by_name(claims: str, write: Write):
    with pytest.raises(UserError) as refused:
        expand(write(claims))
    assert CLAIMS[claims] in str(refused.value) and "\n" not in str(refused.value)


UNSOLVABLE = {
    "": ("needs MATCH and BASELINE in the experiment", SOLVE, ""),
    'BASELINE = "switch"': ("needs MATCH and BASELINE in the experiment", SOLVE, ""),
    'MATCH, BASELINE = "step_time", "switch"': ("cannot be solved before the run", SOLVE, ""),
    'MATCH, BASELINE = "active_flops", "top_2"': ("but it is the baseline", SOLVE, ""),
    FLOPS: ("moe.d_ff and model.d_ff are both 'match'", f'{SOLVE}, "model.d_ff": "match"', ""),
    f"{FLOPS} # no effect": ("does not depend on model.d_ff", '"model.d_ff": "match"', ""),
    'MATCH, BASELINE = "total_params", "switch"': ("has no solution", SOLVE, '"moe.d_ff": 1'),
    f"{FLOPS} # type": ("moe.num_experts='match'", '"moe.num_experts": "match"', ""),
}


@pytest.mark.parametrize("claims", UNSOLVABLE)
def test_a_width_that_cannot_be_solved_for_is_refused(
    claims: str, write: Write, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(match, "count", linear)
    said, top_2, switch = UNSOLVABLE[claims]
    with pytest.raises(UserError, match="variant .*top_2") as refused:
        expand(write(claims, top_2, switch))
    assert said in str(refused.value)


@pytest.mark.slow
def test_a_config_that_cannot_run_cannot_be_counted(write: Write, tmp_path: Path):
    (config,) = {t.variant: t.config for t in expand(write()).trials if t.seed == 1}.values()
    missing = {**config, "data": {**config["data"], "path": f"{tmp_path}/missing"}}
    with pytest.raises(UserError, match=r"data\.path"):
        count([missing])

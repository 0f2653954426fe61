"""The task multitask: its sums, metrics and learning, and refused configs."""

import copy
import dataclasses
import functools
import json
import shutil
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from moejax.config import load
from moejax.contrib.multitask.baselines import design, loss_of, table_baselines
from moejax.contrib.multitask.generated import groups
from moejax.contrib.multitask.model import Head
from moejax.contrib.multitask.source import TableSource
from moejax.contrib.multitask.tables import as_rows, make_table
from moejax.contrib.multitask.task import MeanSquare, MultiTaskLearning, binned_area
from moejax.record.probe import TOKENS, Probe
from moejax.train import setup
from moejax.train.metrics.rows import eval_row
from tests import meshes
from tests.train.runs import ROOT, call, call_as_a_user, files, refused, rows

PAGE = f"{ROOT}/configs/multitask.py"
SMALL = {
    "task.rows": 600,
    "task.d_out": 4,
    "task.d_tower": 4,
    "moe.num_experts": 4,
    "moe.d_ff": 4,
    "train.batch_size": 32,
    "train.steps": 60,
    "train.log_every": 10,
    "train.eval_every": 30,
    "train.checkpoint_every": 30,
    "train.eval_rows": 50,
    "optim.schedule": "constant",
    "optim.learning_rate": 0.03,
    "optim.warmup_steps": 5,
    "report.probe_rows": 8,
    "report.compile_cache": "off",
}


def overrides(**changes):
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    return [f"--config.{name}={value}" for name, value in {**SMALL, **changes}.items()]


def command(workdir, arg, **changes):
    return ["train", f"--config={PAGE}:{arg}", *overrides(**changes), f"--workdir={workdir}"]


def run_of(arg, **changes):
    return setup.prepare(load(f"{PAGE}:{arg}", overrides(**changes)).config)


# Metrics.


def table_with_gaps():
    """A regression and a binary task of 40 rows, a third of the targets missing."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((40, 3))
    target = np.stack([5 + 2 * x[:, 0] + rng.normal(size=40), x[:, 1] > 0], axis=1)
    target[rng.random(target.shape) < 1 / 3] = np.nan
    known = {"dense": ("a", "b", "c"), "category": (), "category_sizes": (), "name": "gaps"}
    every = as_rows(x, None, target)
    return make_table(every, every, ["size", "sign"], ["regression", "binary"], **known)


@pytest.fixture(scope="module")
def gaps():
    """A run's task on that table, its totals, and what it said of every row."""
    run, table = run_of("data=correlated"), table_with_gaps()
    task = MultiTaskLearning.from_config(run.config, table)
    source = TableSource(table, 16, 0, 1000)
    params, key = task.init(jax.random.key(0)), jax.random.key(1)
    state = task.init_gate_state()

    @functools.partial(jax.jit, static_argnames="train")
    def forward(batch, train):
        return task.forward(params, state, batch, jnp.int32(0), key, train)

    said = jax.jit(lambda batch: task.apply(params, state, batch, jnp.int32(0), key, False)[0])
    batches = source.eval_batches(16, 40)
    return table, source, [forward(b, train=False) for b in batches], [said(b) for b in batches]


def test_metrics_are_means_over_the_examples_that_have_the_target(gaps):
    table, source, totals, said = gaps
    row = eval_row(0, totals, source, "")
    held, said_NM = table.heldout, np.concatenate(said)[:40]
    size, sign = table.targets
    value_N, here_N = said_NM[:, 0] * size.scale + size.mean, held.present_NM[:, 0]
    wanted = np.mean((value_N - table.in_units(held.target_NM)[:, 0])[here_N] ** 2)
    np.testing.assert_allclose(row["mse/size"], wanted, rtol=1e-4)
    logit_N, one_N = said_NM[:, 1].astype(np.float64), held.target_NM[:, 1]
    here_N = held.present_NM[:, 1]
    nats_N = np.log1p(np.exp(logit_N)) - one_N * logit_N
    np.testing.assert_allclose(row["log_loss/sign"], nats_N[here_N].mean(), rtol=1e-4)
    right_N = (logit_N > 0) == (one_N > 0.5)
    np.testing.assert_allclose(row["accuracy/sign"], right_N[here_N].mean(), rtol=1e-6)
    assert (~held.present_NM).any(axis=0).all() and 0 < row["accuracy/sign"] < 1
    # The loss is a mean over all rows, in which a missing target costs nothing.
    square_N = ((value_N - table.in_units(held.target_NM)[:, 0]) / size.scale) ** 2
    summed = np.where(held.present_NM[:, 0], square_N, 0) + np.where(here_N, nats_N, 0)
    np.testing.assert_allclose(row["loss"], summed.mean(), rtol=1e-4)
    np.testing.assert_allclose(row["auc/sign"], area(logit_N[here_N], one_N[here_N]), atol=0.02)


def test_a_binary_task_predicts_one_where_its_logit_is_above_0():
    """A logit of 0.3 says one, one of 0 does not; the last example lacks the target."""
    model: Any = SimpleNamespace(heads=(Head("sign", "binary"),))
    task = MultiTaskLearning(model, (), 0.0)
    batch = {
        "target": jnp.asarray([[1.0], [0.0], [1.0], [0.0], [1.0]]),
        "present": jnp.asarray([[True], [True], [True], [True], [False]]),
    }
    found = task._metrics(jnp.asarray([[0.3], [-0.3], [0.0], [0.3], [9.0]]), batch)
    right = found["accuracy/sign"]
    np.testing.assert_array_equal(right.total, [1, 1, 0, 0, 0])
    np.testing.assert_array_equal(right.count, [1, 1, 1, 1, 0])


def test_padding_does_not_count_in_the_area_under_the_curve():
    """A one above a zero, and a padding row that would be a zero above both."""
    model: Any = SimpleNamespace(heads=(Head("sign", "binary"),))
    batch = {
        "target": jnp.asarray([[1.0], [0.0], [0.0]]),
        "present": jnp.ones((3, 1), bool),
        "valid": jnp.asarray([True, True, False]),
    }
    areas = MultiTaskLearning(model, (), 0.0)._areas(jnp.asarray([[1.0], [-1.0], [5.0]]), batch)
    assert areas["auc/sign"].value() == 1.0


def area(score_N, one_N) -> float:
    """The area under the ROC curve by comparing all pairs."""
    ones, zeros = score_N[one_N > 0.5], score_N[one_N <= 0.5]
    return float(np.mean((ones[:, None] > zeros) + 0.5 * (ones[:, None] == zeros)))


def test_a_squared_error_in_units_may_be_beyond_float32():
    parts = [MeanSquare(jnp.float32(total), jnp.int32(2), 1e30) for total in (0.5, 1.5)]
    summed = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b))(*parts)
    np.testing.assert_allclose(summed.value(), 0.5e60)
    assert np.isnan(MeanSquare(jnp.float32(0), jnp.int32(0), 1.0).value())


@pytest.mark.parametrize("spread", [0.5, 3.0, 100.0])
def test_the_binned_area_equals_that_of_all_pairs(spread):
    rng = np.random.default_rng(0)
    one = rng.integers(0, 2, 500)
    score = spread * (rng.standard_normal(500) + one)
    counted = rng.random(500) < 0.8
    parts = [slice(0, 200), slice(200, 500)]
    found = [binned_area(*(jnp.asarray(x[p]) for x in (score, one, counted))) for p in parts]
    summed = jax.tree.map(lambda a, b: a + b, *found)
    # Pairs within 0.02 are counted half; beyond 20 (most of spread 100) all scores are equal.
    wanted = area(np.clip(score, -20, 20)[counted], one[counted])
    np.testing.assert_allclose(summed.value(), wanted, atol=0.01)
    assert np.isnan(binned_area(jnp.zeros(3), jnp.ones(3), jnp.ones(3, bool)).value())


# Losses of gates.


def pushes(run, table, sharing="mmoe"):
    """The gradients of the first gate's parameters when only the gates' own losses count."""
    config = copy.deepcopy(run.config)
    config.task.sharing = sharing
    task = MultiTaskLearning.from_config(config, table)
    batch = jax.device_put(TableSource(table, 16, 0, 1000).train_batch(0))
    params = task.init(jax.random.key(0))
    # The same gates beside one task and many, whatever keys they are drawn from.
    rng = np.random.default_rng(0)
    router = {
        name: jnp.asarray(0.3 * np.resize(rng.standard_normal(w[0].size), w.shape), jnp.float32)
        for name, w in sorted(params["mixture"]["router"].items())
    }

    def own(router):
        changed = {**params, "mixture": {**params["mixture"], "router": router}}
        state, key = task.init_gate_state(), jax.random.key(1)
        totals = task.forward(changed, state, batch, jnp.int32(0), key, train=True)
        return task.objective(totals._replace(loss=0.0), totals.items), totals

    grads, totals = jax.jit(jax.grad(own, has_aux=True))(router)
    return jax.tree.map(lambda w: np.asarray(w[0]), grads), jax.device_get(totals)


@pytest.mark.slow
@pytest.mark.parametrize("arg", ["data=groups,gate=dselect_k", "data=groups,gate=top_k"])
def test_a_gates_losses_have_the_same_gradient_beside_one_task_and_sixteen(arg):
    run, table = run_of(arg), groups(0, 200, 16)
    first = [dataclasses.replace(rows, target_NM=rows.target_NM[:, :1],
                                 present_NM=rows.present_NM[:, :1])
             for rows in (table.train, table.heldout)]  # fmt: skip
    single = dataclasses.replace(table, train=first[0], heldout=first[1], targets=table.targets[:1])
    (alone, one), (beside, many) = pushes(run, single), pushes(run, table)
    omoe, all_share = pushes(run, table, "omoe")
    # Means over the same examples, in float32.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-8)
    jax.tree.map(close, beside, alone)
    jax.tree.map(close, omoe, alone)
    assert max(np.abs(w).max() for w in jax.tree.leaves(alone)) > 1e-5
    # All gates are alike here: what is logged is the mean, whatever their number.
    for name, value in one.auxiliary.items():
        close(many.auxiliary[name], value)
        close(all_share.auxiliary[name], value)


# Baselines.


def test_the_linear_baseline_is_at_the_optimum_of_its_loss():
    """Least squares equals numpy's; the gradient of logistic regression is 0."""
    table = table_with_gaps()
    found = table_baselines(table, len(table.heldout))
    x_NX = design(table.train, ())
    here_N = table.train.present_NM[:, 0]
    augmented = np.concatenate([x_NX[here_N], np.diag([0.0, 1.0, 1.0, 1.0])])
    y_N = np.concatenate([table.train.target_NM[here_N, 0], np.zeros(4)])
    w_X = np.linalg.lstsq(augmented, y_N, rcond=None)[0]
    from scipy import optimize

    here_N, one_N = table.train.present_NM[:, 1], table.train.target_NM[:, 1]

    def penalised(v_X):
        logit_N = x_NX[here_N] @ v_X
        return np.sum(np.log1p(np.exp(logit_N)) - one_N[here_N] * logit_N) + v_X[1:] @ v_X[1:] / 2

    v_X = optimize.minimize(penalised, np.zeros(4)).x
    said = [x_NX @ w_X, 1 / (1 + np.exp(-(x_NX @ v_X)))]
    wanted = loss_of(np.stack(said, axis=1), table.heldout, table.targets)
    np.testing.assert_allclose(found["linear"], wanted, rtol=1e-3)  # 50 rounds of a bound
    assert found["linear"] < found["mean"] and "ideal" not in found


def test_the_ideal_loss_of_a_generated_table_is_its_noise():
    table = groups(0, 2000, 4)
    found = table_baselines(table, len(table.heldout))
    noise = sum(0.01**2 / target.scale**2 for target in table.targets)
    np.testing.assert_allclose(found["ideal"], noise, rtol=0.2)  # 800 draws
    np.testing.assert_allclose(found["mean"], 4.0, rtol=0.2)  # a variance per task


@pytest.mark.parametrize("rows", [7, 10_000])
def test_baselines_of_a_table_are_computed_on_the_evaluated_rows(rows):
    table = groups(0, 600, 4)
    source = TableSource(table, 16, 0, rows)
    batches = source.eval_batches(16, rows)
    target_NM = np.concatenate([batch["target"][batch["valid"]] for batch in batches])
    assert len(target_NM) == min(rows, len(table.heldout))
    guess_M = np.array([target.guess for target in table.targets])
    expected = np.mean(np.square(guess_M - target_NM), axis=0).sum()
    np.testing.assert_allclose(source.baselines()["mean"], expected, rtol=1e-6)  # float32 targets


# The source.


@pytest.mark.parametrize("arg", ["data=recommender", "data=groups"])
def test_a_source_has_the_probes_arrays_for_its_examples(arg):
    source = run_of(arg, task__tasks=4).data
    batch = source.eval_batches(16, 16)[0]
    arrays = source.probe_arrays(batch, 16)
    for name, (kind, *_) in TOKENS.items():
        if kind != "str":
            assert arrays[name].dtype == kind
    assert arrays["token"].max() < len(arrays["token_text"]) - len(arrays["label_names"])
    assert arrays["target"].max() < len(arrays["token_text"])
    assert len(set(arrays["label"].ravel())) > 1
    shapes = {name: (x.shape, x.dtype) for name, x in source.shapes(16).items()}
    for other in (batch, source.train_batch(3)):
        assert {n: ((16, *x.shape[1:]), x.dtype) for n, x in other.items()} | shapes == shapes


# Runs.


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "groups"
    ended = call(command(workdir, "data=groups,gate=top_k", task__tasks=4))
    assert ended.status == 0, ended.err
    return workdir, ended


@pytest.mark.slow
def test_a_run_learns_more_than_a_linear_model(trained):
    workdir, ended = trained
    last = rows(workdir, "eval")[-1]
    known = json.loads((workdir / "config.json").read_text())["baselines"]
    assert last["loss"] < known["linear"] < known["mean"]
    assert {f"mse/y{m}" for m in range(1, 5)} <= last.keys()
    assert len(last["moe/load"]) == 4 and np.sum(last["moe/load"]) == 4 * 50 * 2
    for text in ("linear", "ideal", "per example", "examples/s"):
        assert text in ended.out


@pytest.mark.slow
def test_evaluating_a_run_repeats_its_last_row(trained):
    workdir, _ = trained
    before = files(workdir)
    ended = call(["eval", f"--workdir={workdir}"])
    assert ended.status == 0, ended.err
    assert f'"loss": {rows(workdir, "eval")[-1]["loss"]}' in ended.out
    assert files(workdir) == before


@pytest.mark.slow
def test_a_report_shows_gates_as_layers_and_each_task(trained, tmp_path):
    workdir = shutil.copytree(trained[0], tmp_path / "run")
    probe = Probe.read(workdir)
    assert probe is not None and probe.at(60)["expert"].shape == (4, 8, 1, 2)
    ended = call(["report", str(workdir)])
    assert ended.status == 0, ended.err
    page = (workdir / "report.html").read_text()
    for text in ("mse/y1", "task.sharing=mmoe", "per example", "y1: lowest quarter"):
        assert text in page


@functools.cache
def losses_on(shape, arg):
    """Losses, gradient norms and loads of three steps on a mesh."""
    sizes = {f"mesh__{axis}": size for axis, size in shape}
    run = run_of(arg, **sizes, task__tasks=4)
    with jax.set_mesh(run.mesh):
        state, found = run.init_state(), []
        for step in range(3):
            state, metrics = run.train_step(state, run.put(run.data.train_batch(step)))
            metrics = jax.block_until_ready(metrics)
            totals = metrics["totals"]
            found.append(
                [metrics["total_loss"], metrics["grad_norm"], *totals.stats.load_E.ravel()]
            )
    return np.asarray(found)


STATIC = "data=groups,gate=dselect_k,gate_input=constant"
CASES = [
    (meshes.LARGE, "data=groups,gate=top_k"),
    ({"data": 8}, "data=groups,gate=shazeer"),
    ({"expert": 2}, STATIC),
    ({"fsdp": 2, "expert": 2, "tensor": 2}, "data=recommender"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "arg"), CASES)
def test_a_run_is_the_same_on_every_mesh(shape, arg):
    got, wanted = losses_on(tuple(shape.items()), arg), losses_on((("data", 1),), arg)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
    assert len(set(wanted[:, 0])) == 3


@pytest.mark.slow
def test_a_stopped_run_resumes_as_if_uninterrupted(trained, tmp_path):
    workdir = tmp_path / "run"
    for steps in (30, 60):
        arg = "data=groups,gate=top_k"
        ended = call(command(workdir, arg, task__tasks=4, train__steps=steps))
        assert ended.status == 0, ended.err
    assert rows(workdir) == rows(trained[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arg", "steps", "share"),
    [
        ("data=correlated", 2000, 0.98),
        ("data=recommender", 2000, 0.98),
        ("data=groups,gate=dselect_k,gate_input=constant", 500, 0.05),
    ],
)
def test_every_kind_of_table_is_learned_better_than_by_a_linear_model(tmp_path, arg, steps, share):
    """To a ``share`` of its loss. Groups can be predicted almost exactly, but not linearly."""
    ended = call_as_a_user([
        "train", f"--config={PAGE}:{arg}", f"--workdir={tmp_path}/run",
        f"--config.train.steps={steps}",
    ])  # fmt: skip
    assert ended.status == 0, ended.err
    linear = float(ended.out.split("linear        ")[1].split()[0])
    assert rows(tmp_path / "run", "eval")[-1]["loss"] < share * linear


@pytest.fixture
def sales(tmp_path):
    rng = np.random.default_rng(0)
    data = pd.DataFrame({"shop": rng.choice(["A", "B", "C"], 400), "area": rng.random(400)})
    data["price"] = data["area"] * 10 + (data["shop"] == "A") * 5 + rng.normal(0, 0.1, 400)
    path = tmp_path / "sales.csv"
    data.to_csv(path, index=False)
    return path


@pytest.mark.slow
def test_a_file_is_learned_from_the_command_line(sales, tmp_path):
    targets = "price,dear=price>=8"
    changes = {"data__path": sales, "task__targets": targets, "train__steps": 150}
    ended = call(command(tmp_path / "run", "data=file", **changes))
    assert ended.status == 0, ended.err
    last = rows(tmp_path / "run", "eval")[-1]
    # The price varies by 3.7 around its mean, and can be told to 0.1.
    assert last["mse/price"] < 2.0 and last["auc/dear"] > 0.95 and last["accuracy/dear"] > 0.85
    # Shop D is where shop A was: the run would take it for A.
    other = tmp_path / "other.csv"
    other.write_text(sales.read_text().replace("A,", "D,"))
    ended = call(["eval", f"--workdir={tmp_path}/run", f"--config.data.path={other}"])
    assert ended.status == 2 and "the same id or number would mean something else" in ended.err


BAD = {
    "data": ("data=films", {}, ("data", "films", "recommender")),
    "data field": ("", {"task.data": "films"}, ("task.data='films' is unknown", "recommender")),
    "sharing": ("sharing=all", {}, ("task.sharing='all' is unknown", "mmoe")),
    "gate input": ("gate_input=x", {}, ("task.gate_input='x' is unknown", "constant")),
    "gate": ("gate=expert_choice", {}, ("gate 'expert_choice'", "by others", "dselect_k")),
    "static": (
        "gate=dselect_k",
        {"task.gate_input": "constant"},
        ("moe.gate.per_example=True", "use per_example=False"),
    ),
    "tokens": ("gate=hash", {}, ("gate 'hash'", "reads tokens")),
    "k": ("gate=top_k", {"moe.gate.k": 9}, ("moe.gate.k=9", "num_experts=4")),
    "every": ("", {"moe.every": 0}, ("task.sharing=mmoe with moe.every=0",)),
    "layers": ("", {"moe.every": 2}, ("moe.every=2", "one mixture")),
    "activation": ("", {"moe.activation": "swiglu"}, ("moe.activation=swiglu", "relu or gelu")),
    "parts": ("", {"train.grad_accum": 2}, ("train.grad_accum=2", "grad_accum=1")),
    "rho": ("rho=2.0", {}, ("task.rho=2.0 must be >= -1 and <= 1",)),
    "tasks": ("data=groups", {"task.tasks": 5}, ("task.tasks: 5 tasks",)),
    "no path": ("data=file", {}, ("data.path: task.data=file needs",)),
    "path": ("", {"data.path": ROOT}, ("is read by task.data=file",)),
    "gone": ("data=file", {"data.path": "gone.csv"}, ("data.path='gone.csv' does not exist",)),
    "folder": ("data=file", {"data.path": ROOT}, ("is a folder without ratings.csv",)),
    "mesh": ("", {"mesh.expert": 8}, ("moe.num_experts=4 is not a multiple of mesh.expert=8",)),
    "field": ("", {"task.roh": 0.5}, ("task.roh", "task.rho")),
    "seq_len": ("", {"train.seq_len": 5}, ("train.seq_len",)),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_reported_in_one_line_and_leaves_nothing(case, tmp_path):
    arg, changes, parts = BAD[case]
    given = [f"--config.{name}={value}" for name, value in changes.items()]
    workdir = tmp_path / "run"
    refused([*command(workdir, arg), *given], *parts)
    assert not workdir.exists()


def test_mistakes_in_a_file_are_reported_in_one_line(sales, tmp_path):
    for targets, part in (
        ("prise", "no column 'prise'; did you mean 'price'"),
        ("shop", "task.targets: 'shop' is"),
        ("", "task.targets: name columns to predict"),
        ("price>=high", "'high' in 'price>=high' is not a number"),
    ):
        changes = {"data__path": sales, "task__targets": targets}
        refused(command(tmp_path / "run", "data=file", **changes), part)


@pytest.mark.quick(1)
@pytest.mark.parametrize("gate", ["dense", "top_k", "dselect_k", "shazeer"])
def test_a_static_gate_has_no_duplicated_parameters(gate):
    """Two with the same gradients would act as one that the optimizer moves twice as far."""
    run, grads = run_of(f"data=groups,gate={gate},gate_input=constant", task__tasks=4), {}
    state = run.task.init_gate_state()
    batch = jax.device_put(run.data.train_batch(0))

    def loss(params):
        totals = run.task.forward(params, state, batch, jnp.int32(0), jax.random.key(1), True)
        return run.task.objective(totals, totals.items)

    grads = jax.jit(jax.grad(loss))(run.task.init(jax.random.key(0)))["mixture"]["router"]
    by_shape = [np.sort(np.abs(np.asarray(g)).ravel()) for g in jax.tree.leaves(grads)]
    assert all(g.max() > 0 for g in by_shape)
    for i, first in enumerate(by_shape):
        for second in by_shape[:i]:
            assert first.shape != second.shape or not np.allclose(first, second, rtol=1e-3)


def test_a_shared_bottom_routes_nothing(tmp_path):
    run = run_of("sharing=shared_bottom")
    assert run.task.model.num_moe_layers == 0 and run.config.moe.every == 0
    params = run.abstract_state.params
    assert "mixture" not in params and "shared" in params

"""Operations are attributed to the parts they came from, and shares add up to the step."""

import gzip
import json

import jax
import jax.numpy as jnp
import pytest

from moejax.train.profile.attribution import (
    ALL_REDUCE,
    IDLE,
    OTHER,
    PARTS,
    Interval,
    Operation,
    Traced,
    part_of,
    read_program,
    time_by_part,
)
from moejax.train.profile.trace import STEP
from tests.train.runs import PAGE, call, refused

ROUTER, EXPERTS = Operation("router"), Operation("experts")
SENT = Operation("exchange", communicates=True)


@pytest.mark.parametrize(
    "op_name, part",
    [
        ("jit(f)/attention/dot_general", "attention"),
        ("jit(f)/transpose(jvp(experts))/while/body/mul", "experts"),
        ("jit(f)/jvp(ffn)/experts/dot_general", "experts"),
        ("jit(f)/(jvp(loss)/reduce_sum:reduce_sum)", "loss"),
        ("jit(unpacker)/unpacked/dot_general", ""),
        ("pack/gather", "pack"),
        ("", ""),
    ],
)
def test_the_innermost_scope_counts(op_name, part):
    assert part_of(op_name) == part


def test_a_compiled_program_names_the_part_its_operations_came_from_both_ways():
    def loss(w, x):
        with jax.named_scope("attention"):
            x = jnp.tanh(x @ w)
        with jax.named_scope("experts"):
            x = x @ w.T
        return jnp.sum(x)

    x = jnp.ones((64, 64))
    text = jax.jit(jax.grad(loss)).lower(x, x).compile().as_text()
    assert text is not None
    program = read_program(text)
    products = [op.part for name, op in program.items() if "dot" in name or "fusion" in name]
    assert {"attention", "experts"} <= set(products)


HLO = """
%fused_computation (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %a = f32[8]{0} add(%p, %p), metadata={op_name="jit(f)/router/add"}
  ROOT %m = f32[8]{0} multiply(%a, %a), metadata={op_name="jit(f)/experts/mul"}
}

%fused_computation.1 (p.1: f32[8]) -> f32[8] {
  %p.1 = f32[8]{0} parameter(0)
  ROOT %a.1 = f32[8]{0} add(%p.1, %p.1), metadata={op_name="jit(f)/router/add"}
}

ENTRY %main.9 (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %loop = (s32[], f32[8]{0}) while(%t), condition=%c, body=%b, metadata={op_name="jit(f)/while"}
  %two = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused_computation, metadata={op_name="jit(f)/experts/mul"}
  %one = f32[8]{0} fusion(%two), kind=kLoop, calls=%fused_computation.1
  %sum = f32[8]{0} all-reduce(%one), to_apply=%add, metadata={op_name="jit(f)/router/psum"}
  %swap = f32[8]{0} all-to-all(%sum), metadata={op_name="jit(f)/exchange/all_to_all"}
  ROOT %copy = f32[8]{0} copy(%swap)
}
"""  # noqa: E501


def test_fusions_collectives_and_loops_are_distinguished():
    program = read_program(HLO)
    assert program["two"] == Operation("experts", mixed=True)
    assert program["one"] == Operation("router"), "named after what it fuses"
    assert program["sum"] == Operation(ALL_REDUCE, communicates=True)
    assert program["swap"] == Operation("exchange", communicates=True)
    assert program["copy"] == Operation(OTHER) and program["loop"].is_control


def test_an_instant_is_divided_among_computing_operations_and_waiting_counts_alone():
    traced = Traced(
        [
            Interval(0, 10, ROUTER),
            Interval(5, 20, EXPERTS),
            Interval(0, 30, SENT),  # hidden behind both until 20
            Interval(90, 150, EXPERTS),  # 90 to 100 lies in the window
        ],
        [(0, 40), (80, 100)],
    )
    assert time_by_part(traced) == {
        ("router", False): 7.5,
        ("experts", False): 2.5 + 10 + 10,
        ("exchange", False): 10,
        (IDLE, False): 10 + 10,
    }


@pytest.mark.slow
def test_profile_writes_a_trace_and_a_table_that_adds_up(tmp_path, capsys):
    out = tmp_path / "profile"
    settings = ("train.batch_size=4", "train.seq_len=16", "mesh.expert=2")
    flags = [f"--config.{setting}" for setting in settings]
    ended = call(["profile", f"--config={PAGE}", *flags, "--steps=2", f"--out={out}"])
    assert ended.status == 0 and not ended.err, ended
    about = json.loads((out / "profile.json").read_text())
    rows = {row["part"]: row for row in about["rows"]}
    assert about["steps"] == 2 and about["devices"] == 2
    # Every part of a sparse model on two devices; there is no dense layer.
    assert set(rows) >= {*PARTS, ALL_REDUCE, OTHER, IDLE} - {"ffn"}
    assert all(0 <= row["mixed"] <= row["share"] for row in rows.values())
    assert sum(row["share"] for row in rows.values()) == pytest.approx(1, abs=1e-9)
    (written,) = out.glob("**/*.trace.json.gz")
    events = json.loads(gzip.decompress(written.read_bytes()))["traceEvents"]
    steps = [event for event in events if event.get("name") == STEP]
    assert len(steps) == 2
    # The trace in microseconds, the table in milliseconds per step.
    whole = sum(row["ms"] for row in rows.values())
    assert whole == pytest.approx(sum(event["dur"] for event in steps) / 2e3, rel=1e-3)
    assert list(out.glob("**/*.xplane.pb")) and str(written) in ended.out
    refused(["profile", f"--config={PAGE}", f"--out={out}"], "--out=", "not empty")


def test_mistakes_are_reported_in_one_line_and_create_nothing(tmp_path):
    out, file = tmp_path / "new", tmp_path / "file"
    file.write_text("")
    base = ["profile", f"--config={PAGE}"]
    refused([*base, f"--out={out}", "--steps=0"], "--steps=0")
    refused([*base, f"--out={file}"], f"--out={file}")
    refused([*base, f"--out={file}/below"], f"--out={file}/below")
    refused([*base, f"--out={out}", "--config.train.batch_size=3"], "train.batch_size=3")
    refused(base, "--out")
    assert not out.exists()

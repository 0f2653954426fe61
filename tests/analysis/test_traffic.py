"""Rows that transports compute and send, against hand counts and against compiled programs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moejax.analysis import traffic
from moejax.analysis.run import Row, RunData
from moejax.config import default, to_dict
from scripts.layer_bench import traffic as measured
from scripts.layer_bench.problems import SHAPES
from tests.analysis import workdirs

ROW: Row = {"moe/load": [[20, 12, 16, 16]] * 2, "moe/dropped": [[4, 0, 0, 0]] * 2}
"""Two layers of 32 tokens, k = 2: 64 pairs, 60 of them kept, in each."""


def run_of(devices: int = 4, **changes: Any) -> RunData:
    config = workdirs.config(**{"mesh.expert": 4, "model.d_model": 10, **changes})
    saved = workdirs.saved(config, devices={"kind": "cpu", "count": devices})
    return RunData("run", Path(), config, saved, train=[], held_out=[], timings=[])


def found(row: Row = ROW, **changes: Any) -> traffic.Traffic:
    about = traffic.of_row(run_of(**changes), row)
    assert about is not None
    return about


@pytest.mark.parametrize(
    ("transport", "computed", "sent"),
    [
        # 4 sequences x 4 experts x ceil(8 x 2 / 4 x 1.25) = 80 slots.
        ("cells", 80 / 60, 80 / 64),
        ("dropless", 1.0, 1.0),
        ("gather", 1.0, 32 * 4 / 64),
        ("all_experts", 32 * 4 / 60, 32 * 4 / 64),
    ],
)
def test_rows_and_bytes_are_those_counted_by_hand(transport: str, computed: float, sent: float):
    about = found(moe__transport=transport)
    assert about.computed_over_kept == pytest.approx(computed, rel=1e-12)
    assert about.sent_over_minimum == pytest.approx(sent, rel=1e-12)
    assert about.sent == pytest.approx(sent * 64 * 10 * 4 * 3 / 4, rel=1e-12)


def test_half_precision_sends_half_the_bytes_and_groups_round_capacity_once():
    assert found(model__dtype="bfloat16").sent == found().sent / 2  # pyright: ignore[reportOptionalOperand]
    factor = 1.1  # ceil(4.4) = 5 slots for one sequence, ceil(17.6) = 18 for four
    by_one = found(moe__capacity_factor=factor)
    by_four = found(moe__capacity_factor=factor, moe__group="4")
    assert by_one.computed_over_kept * 60 == pytest.approx(4 * 4 * 5)
    assert by_four.computed_over_kept * 60 == pytest.approx(4 * 18)


def test_groups_of_pairs_count_two_sequences_for_each_pair():
    config = default("multimodal")
    changes = {
        "train.batch_size": 8, "moe.group": "4", "moe.num_experts": 8, "moe.capacity_factor": 1.25,
    }  # fmt: skip
    config.update_from_flattened_dict(changes)
    units = {"item": "pair", "loss": "nats/pair", "tokens_per_row": 52, "items_per_row": 1}
    saved = workdirs.saved(to_dict(config), units=units)
    run = RunData("run", Path(), saved["config"], saved, train=[], held_out=[], timings=[])
    about = traffic.of_row(run, {"moe/load": [[52] * 8], "moe/dropped": [[0] * 8]})
    # 16 sequences in groups of 4, each with ceil(4 x 26 x 2 / 8 x 1.25) = 33 slots for 8 experts.
    assert about is not None and about.computed_over_kept == pytest.approx(4 * 8 * 33 / 416)


def test_traffic_that_is_not_counted_or_not_sent_is_not_claimed():
    assert found(moe__transport="dropless_once").sent is None
    alone = found(mesh__expert=1)
    assert alone.sent is None and alone.computed_over_kept == 80 / 60


def test_an_open_axis_of_the_mesh_takes_the_devices_left():
    assert found(ROW, devices=8, **{"mesh.expert": -1, "mesh.data": 2}) == found()


@pytest.mark.slow
def test_cells_send_what_the_compiled_program_of_eight_devices_sends():
    shape = SHAPES["tiny"]
    rows = {row["impl"]: row for row in measured.measure(["tiny"]) if row["shape"] == "tiny"}
    sequences = shape.T // shape.sequence
    for factor in (1.0, 1.25):
        run = run_of(
            **{
                "mesh.expert": measured.DEVICES, "model.d_model": shape.D,
                "moe.num_experts": shape.E, "moe.capacity_factor": factor, "moe.gate.k": shape.k,
                "train.batch_size": sequences, "train.seq_len": shape.sequence,
            }
        )  # fmt: skip
        load = np.full((1, shape.E), shape.T * shape.k // shape.E).tolist()
        about = traffic.of_row(run, {"moe/load": load, "moe/dropped": np.zeros_like(load).tolist()})
        assert about is not None
        counted = rows[f"cells-{factor}"]
        assert about.sent == counted["bytes_one_way"]
        assert about.sent_over_minimum == pytest.approx(counted["bytes_over_minimum"])

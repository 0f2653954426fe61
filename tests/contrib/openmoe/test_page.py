"""The page and the numbers beside it, of findings made by hand."""

import json
import re

import numpy as np
import pytest

from moejax.analysis.html import render
from moejax.analysis.page import Choice, Figure, Table, Text, Warning
from moejax.contrib.openmoe.drops import Arm, drops
from moejax.contrib.openmoe.early import early
from moejax.contrib.openmoe.findings import Measured, numbers, verdicts
from moejax.contrib.openmoe.page import page
from moejax.contrib.openmoe.tokens import specialisation
from tests.contrib.openmoe.routings import E, first_come, routed, tokens


@pytest.fixture(scope="module")
def found():
    return measured()


def measured() -> Measured:
    """A router of token ids; with 40 rows positions occur too rarely to be counted."""
    token_NL = tokens(rows=40)
    expert = (token_NL % E)[None, ..., None]
    own = routed(token_NL, expert)
    arms = [Arm(0.0), Arm(1.25), Arm(1.25, "gate")]
    kept = [np.ones(expert.shape, bool), first_come(expert, 10), first_come(expert, 10)]
    counted = [
        drops("held out", arm, routed(token_NL, expert, kept=of_arm))
        for arm, of_arm in zip(arms, kept, strict=True)
    ]
    earlier = early([(step, own) for step in (0, 2, 10)], "checkpoints")
    texts = ["<b>", "a", "b", "\\n", "d", "e"]
    return Measured("run", 10, 10, E, "", specialisation(own), earlier, counted, own, texts)


def blocks(page_or_option):
    for block in page_or_option:
        if isinstance(block, Choice):
            for option in block.options.values():
                yield from blocks(option)
        else:
            yield block


def test_the_page_begins_with_the_verdicts_and_draws_every_finding(found):
    shown = page(found, verdicts(found))
    assert [block.text[:2] for block in shown.blocks[1:4] if isinstance(block, Text)] == [
        "1.",
        "2.",
        "3.",
    ]
    names = {block.name for block in blocks(shown.blocks) if isinstance(block, Figure)}
    assert names == {"openmoe-shares-0", "openmoe-spread-0", "openmoe-early", "openmoe-drops-0"}
    assert "<b>" not in re.sub(r"<script.*?</script>", "", render("t", "", [shown]), flags=re.S)


def test_a_leak_is_marked(found):
    assert not any(isinstance(block, Warning) for block in page(found, verdicts(found)).blocks)
    leaking = found._replace(leak="eval:future")
    mark = next(b for b in page(leaking, verdicts(found)).blocks if isinstance(b, Warning))
    assert "eval:future" in mark.text
    assert numbers(leaking, verdicts(found))["leak"] == "eval:future"


def test_the_figure_of_shares_holds_one_hot_rows_for_a_router_of_ids(found):
    shares = next(b for b in blocks(page(found, verdicts(found)).blocks) if isinstance(b, Figure))
    heatmap = shares.spec["data"][0]
    for label, share_E in zip(heatmap["y"], heatmap["z"], strict=True):
        token = int(label.rpartition("(")[2][:-1])
        assert share_E == np.eye(E)[token % E].tolist()


def test_tables_have_a_row_per_kind_and_per_arm(found):
    shown = blocks(page(found, verdicts(found)).blocks)
    spread, lost = (block for block in shown if isinstance(block, Table))
    assert len(spread.rows) == 3 and len(lost.rows) == 3
    by_kind = {row[1]: row for row in spread.rows}
    assert by_kind["position"][3:8] == ["-"] * 5 and by_kind["token id"][-1] == "1.000"
    assert all(len(row) == len(lost.header) for row in lost.rows)


def test_the_numbers_are_json_with_null_for_what_is_undefined(found):
    written = json.dumps(numbers(found, verdicts(found)), allow_nan=False)
    again = json.loads(written)
    assert again["verdicts"][0]["finding"] == "context-independent specialisation"
    assert again["specialisation"]["layers"][0]["first"]["position"]["mean"] is None
    assert again["drops"][1]["arm"] == "first come, 1.25 x mean load"
    assert again["drops"][1]["choices"] == found.drops[1].choices
    assert [then["step"] for then in again["early"]["steps"]] == [0, 2, 10]

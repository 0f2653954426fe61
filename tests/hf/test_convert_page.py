"""docs/convert.md: its table, its commands and its example of a family."""

import importlib.util
import re
import shlex
from pathlib import Path

from moejax.cli import build_parser
from moejax.hf.families import READABLE
from moejax.hf.families.family import Family
from moejax.hf.fields import config_of, explicit, written
from moejax.hf.keys import Theirs

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "convert.md").read_text(encoding="utf-8")
FILE = ROOT / "scripts" / "make_convert_docs.py"
SPEC = importlib.util.spec_from_file_location("make_convert_docs", FILE)
assert SPEC and SPEC.loader
script = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(script)


def test_the_table_lists_every_family_that_is_read():
    assert script.render(PAGE) == PAGE, "run python scripts/make_convert_docs.py"
    assert re.findall(r"^\| `(\w+)` \|", PAGE, re.M) == ["model_type", *READABLE]
    assert set(script.ABOUT) == set(READABLE)
    assert set(script.WRITTEN) == {n for n, family in READABLE.items() if not family.writes}


def test_the_commands_parse():
    parser, _ = build_parser()
    blocks = re.findall(r"^```\n(moejax \w.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    words = [shlex.split(line) for block in blocks for line in block.splitlines()]
    assert [w[:2] for w in words] == [["moejax", "convert"]] * 2
    into, out = (parser.parse_args(w[1:]) for w in words)
    assert (into.from_hf, into.workdir) == ("OLMoE-1B-7B-0924", "runs/olmoe")
    assert (out.to_hf, out.out, out.dtype) == ("runs/olmoe", "olmoe-hf", "bfloat16")


def test_the_example_is_a_family_that_reads_what_it_writes():
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict[str, Family] = {}
    exec(code, names)
    family = names["MY_MOE"]
    keys = {
        "vocab_size": 300,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "moe_intermediate_size": 24,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "rms_norm_eps": 1e-6,
    }
    fields = family.read(Theirs(keys, "config.json"))
    assert config_of(fields).model.qk_norm == "projection"
    again, changes = written(family, explicit(fields))
    assert not changes and again["use_router_bias"] is False
    tensors = [row.theirs for row in family.rows]
    assert "model.layers.{layer}.attn.q_proj.weight" in tensors
    assert "model.layers.{layer}.norm2.weight" in tensors

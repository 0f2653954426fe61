"""Overrides and config arguments: typing, gates, and error messages."""

import json
from pathlib import Path

import pytest

from moejax import config as configs
from moejax.config import flatten, from_dict, load, parse_arg, table_of, to_dict
from moejax.config.overrides import SYNONYMS
from moejax.errors import UserError

ROOT = Path(__file__).parents[2]
PAGE = f"{ROOT}/configs/lm.py"


TYPED = [
    ("train.steps=7", "train.steps", 7),
    ("optim.learning_rate=1e-3", "optim.learning_rate", 1e-3),
    ("optim.learning_rate=3", "optim.learning_rate", 3.0),
    ("model.tie_embeddings=false", "model.tie_embeddings", False),
    ("model.tie_embeddings=no", "model.tie_embeddings", False),
    ("model.tie_embeddings=off", "model.tie_embeddings", False),
    ("moe.allow_future_leak=on", "moe.allow_future_leak", True),
    ("moe.allow_future_leak=1", "moe.allow_future_leak", True),
    ("moe.group=4", "moe.group", "4"),
    ("data.path=a=b", "data.path", "a=b"),
    ("data.path=", "data.path", ""),
    ("distributed.process_id=-1", "distributed.process_id", -1),
    ("moe.gate.k=3", "moe.gate.k", 3),
    ("train.steps=1e3", "train.steps", 1000),
    ("train.steps=1_000", "train.steps", 1000),
    ("train.steps=2.50E2", "train.steps", 250),
    ("train.steps=12.0", "train.steps", 12),
    ("train.steps=3e9", "train.steps", 3_000_000_000),  # refused as out of range, by `validate`
    ("train.seed=4294967295", "train.seed", 2**32 - 1),
]


@pytest.mark.parametrize("override, name, value", TYPED)
def test_override_is_typed_by_its_default(override: str, name: str, value: object):
    found = flatten(load(PAGE, [f"--config.{override}"]).config)[name]
    assert found == value and type(found) is type(value)


def test_an_override_does_not_change_the_config_of_the_file():
    loaded = load(PAGE, ["--config.train.steps=7"])
    assert (loaded.file_config.train.steps, loaded.config.train.steps) == (300, 7)
    assert loaded.overrides == ("--config.train.steps=7",)


def test_gate_override_works_in_any_order_and_overrides_beat_its_preset():
    fields = ["moe.gate.min_std=0.5", "moe.losses.load=0.3", "moe.gate.name=shazeer"]
    for overrides in (fields, fields[::-1]):
        config = load(PAGE, overrides).config
        assert config.moe.gate.min_std == 0.5
        assert (config.moe.losses.load, config.moe.losses.importance) == (0.3, 0.1)


def test_naming_the_gate_a_page_has_changes_nothing(tmp_path: Path):
    page = tmp_path / "page.py"
    page.write_text(
        "from moejax.config import default\n"
        "def get_config():\n    config = default()\n    config.moe.gate.k = 4\n    return config\n"
    )
    source = str(page)
    assert load(source, ["moe.gate.name=top_k"]).config.moe.gate.k == 4
    assert load(source, ["moe.gate.name=mixtral"]).config.moe.gate.k == 2


def test_a_user_gate_has_its_fields_in_the_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "gate_of_test_config.py").write_text(
        "import dataclasses\nfrom moejax.gating import TopK\n"
        "@dataclasses.dataclass(frozen=True)\n"
        "class MyGate(TopK):\n    sizes: tuple[int, ...] = (1, 2)\n    heat: float = 1.0\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    gate = "moe.gate.name=gate_of_test_config:MyGate"
    config = load(PAGE, [gate, "moe.gate.heat=2", "moe.gate.sizes=(3,4,5)"]).config
    assert (config.moe.gate.heat, config.moe.gate.sizes) == (2.0, (3, 4, 5))
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
    assert configs.make_gate(config).columns(8) == 2


@pytest.mark.parametrize(
    ("code", "parts"),
    [
        ("raise RuntimeError('no\\nluck')", ["RuntimeError: no luck"]),
        ("class MyGate(:", ["SyntaxError"]),
        ("import dataclasses\n@dataclasses.dataclass\nclass MyGate:\n    heat: float",
         ["field 'heat' needs a default", "it has none"]),
    ],
)  # fmt: skip
def test_a_mistake_in_a_user_gate_is_reported_in_one_line(
    code: str, parts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    name = f"gate_with_mistake_{len(code)}"
    (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError) as caught:
        load(PAGE, [f"moe.gate.name={name}:MyGate"])
    assert_one_line(caught.value, parts)


BAD_OVERRIDES = {
    "train.steps=1.5": ["train.steps='1.5'", "whole number", "300"],
    "train.steps=1.5e0": ["train.steps='1.5e0'", "whole number"],
    "train.steps=1e-3": ["train.steps='1e-3'", "whole number"],
    "train.steps=1__0": ["train.steps='1__0'", "whole number"],
    "train.steps=inf": ["train.steps='inf'", "whole number"],
    "train.steps=1e999999999": ["train.steps='1e999999999'", "whole number"],
    "train.steps=abc": ["train.steps='abc'", "int"],
    "train.steps=": ["train.steps=''"],
    "optim.learning_rate=fast": ["optim.learning_rate='fast'", "float"],
    "optim.learning_rate=nan": ["optim.learning_rate='nan'", "float"],
    "model.tie_embeddings=maybe": ["'maybe'", "true or false"],
    "moe.num_expert=4": ["moe.num_expert", "did you mean 'moe.num_experts'"],
    "steps=4": ["did you mean 'train.steps'"],
    "moe.qqqqq=4": ["moe.qqqqq", "fields of moe", "moe.num_experts"],
    "qqqqq=4": ["qqqqq", "sections", "moe"],
    "moe=4": ["moe is a section", "--config.moe.num_experts=8"],
    "moe.gate=switch": ["moe.gate is a section", "--config.moe.gate.name=top_k"],
    "moe.gate.name=swich": ["'swich'", "did you mean 'switch'"],
    "moe.gate.kk=1": ["gate 'top_k' has no field 'kk'", "did you mean 'k'"],
    "moe.gate.min_std=1": ["'top_k'", "a field of gate hierarchical, shazeer"],
    "train.steps": ["train.steps", "needs a value"],
    # What fields are called elsewhere.
    "optim.lr=1": ["did you mean 'optim.learning_rate'"],
    "lr=1": ["did you mean 'optim.learning_rate'"],
    "train.bs=1": ["did you mean 'train.batch_size'"],
    "train.batch=1": ["did you mean 'train.batch_size'"],
    "optim.wd=1": ["did you mean 'optim.weight_decay'"],
    "train.epochs=1": ["did you mean 'train.steps'"],
    "train.max_steps=1": ["did you mean 'train.steps'"],
    "optim.warmup=1": ["did you mean 'optim.warmup_steps'"],
    "model.layers=1": ["did you mean 'model.num_layers'"],
    "moe.top_k=1": ["did you mean 'moe.gate.k'"],
    "moe.gate.top_k=1": ["did you mean 'moe.gate.k'"],
    "moe.router=1": ["did you mean 'moe.gate.name'"],
}


@pytest.mark.parametrize("override", BAD_OVERRIDES)
def test_a_bad_override_is_reported_in_one_line(override: str):
    with pytest.raises(UserError) as caught:
        load(PAGE, [f"--config.{override}"])
    assert_one_line(caught.value, BAD_OVERRIDES[override])


def test_every_synonym_belongs_to_exactly_one_field():
    known = table_of(configs.default())
    words = [word for text in SYNONYMS.values() for word in text.split()]
    assert SYNONYMS.keys() <= known.keys()
    assert len(words) == len(set(words))
    assert not set(words) & {name.rpartition(".")[2] for name in known}


def test_arg_is_typed_by_its_defaults():
    options = parse_arg("a=3,b, c=x", a=1.0, b=False, c="", d=(1, 2))
    assert vars(options) == {"a": 3.0, "b": True, "c": "x", "d": (1, 2)}
    assert parse_arg(None, a=1).a == parse_arg("", a=1).a == 1
    with pytest.raises(UserError, match="'a' is given twice"):
        parse_arg("a=1,a=2", a=1)


def assert_one_line(error: UserError, parts: list[str]) -> None:
    text = str(error)
    assert "\n" not in text
    for part in parts:
        assert part in text, text

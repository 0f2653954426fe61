"""Sources of configs: pages, modules and workdirs, and the errors of broken ones."""

import json
import sys
import types
from pathlib import Path

import pytest

from moejax.config import default, flatten, from_dict, load, to_dict
from moejax.errors import UserError

PAGE = """\
from moejax.config import default, parse_arg, set_gate

def get_config(arg=None):
    options = parse_arg(arg, gate="mixtral", experts=8, wide=False)
    config = default()
    set_gate(config, options.gate)
    config.moe.num_experts = options.experts
    config.model.d_model = 384 if options.wide else 192
    return config
"""


@pytest.fixture
def page(tmp_path: Path) -> str:
    path = tmp_path / "page.py"
    path.write_text(PAGE)
    return str(path)


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "own.py"
    path.write_text(text)
    return str(path)


def body(tmp_path: Path, *lines: str) -> str:
    """A page that starts from the defaults and runs ``lines``; the first of them is line 5."""
    inner = "".join(f"    {line}\n" for line in lines)
    return write(
        tmp_path,
        "from moejax.config import default, set_gate\n\n"
        f"def get_config(arg=None):\n    config = default()\n{inner}    return config\n",
    )


def test_page_gets_its_argument(page: str):
    config = load(f"{page}:gate=switch,experts=16,wide").config
    assert (config.moe.gate.name, config.moe.gate.k) == ("switch", 1)
    assert (config.moe.num_experts, config.model.d_model) == (16, 384)


def test_page_is_found_as_a_module(page: str, monkeypatch: pytest.MonkeyPatch):
    folder = Path(page).parent / "pages_of_test_config"
    folder.mkdir()
    (folder / "one.py").write_text(PAGE)
    monkeypatch.syspath_prepend(str(folder.parent))
    assert load("pages_of_test_config.one:experts=2").config.moe.num_experts == 2


@pytest.mark.parametrize("shadowed", [False, True])
def test_a_page_imports_from_its_own_folders_whatever_the_current_folder(
    shadowed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Also if the current folder has a module of that name without the imported objects."""
    package = f"own_pages_{shadowed}"
    page = tmp_path / "root" / package / "balance/sweep.py"
    page.parent.mkdir(parents=True)
    beside = page.parent.parent
    (beside / "shared.py").write_text("from moejax.config import default\nEXPERTS = 3\n")
    (beside / "late.py").write_text("FF = 24\n")
    page.write_text(
        f"from {package}.shared import EXPERTS, default\n\n\n"
        "def get_config(arg=None):\n"
        f"    from {package} import late\n\n"
        "    config = default()\n"
        "    config.moe.num_experts, config.moe.d_ff = EXPERTS, late.FF\n"
        "    return config\n"
    )
    other = tmp_path / "other"
    (other / package if shadowed else other).mkdir(parents=True)
    monkeypatch.chdir(other)
    monkeypatch.syspath_prepend(str(other))
    before = list(sys.path), list(sys.meta_path)
    config = load(str(page)).config
    assert (config.moe.num_experts, config.moe.d_ff) == (3, 24)
    assert (sys.path, sys.meta_path) == before
    page.write_text("import no_folder_of_the_page\n")
    with pytest.raises(UserError, match="No module named 'no_folder_of_the_page'"):
        load(str(page))


def test_workdir_is_a_source_and_gives_the_same_config(page: str, tmp_path: Path):
    first = load(f"{page}:gate=switch", ["--config.train.steps=7"])
    (tmp_path / "config.json").write_text(json.dumps({"config": to_dict(first.config)}))
    for source in (str(tmp_path), str(tmp_path / "config.json")):
        again = load(source, ["--config.train.seed=3"])
        assert again.config.train.seed == 3
        assert again.file_config == first.config


def test_page_may_compute_fields_from_others(tmp_path: Path):
    source = body(tmp_path, "config.train.eval_every = config.train.get_ref('steps') // 2")
    assert load(source, ["train.steps=10"]).config.train.eval_every == 5


def test_loading_writes_no_bytecode_beside_the_page(page: str):
    load(page)
    assert [path.name for path in Path(page).parent.iterdir()] == ["page.py"]


ENCODED = {
    "mark": b"\xef\xbb\xbf" + PAGE.encode(),
    "CRLF": PAGE.replace("\n", "\r\n").encode(),
    "mark and CRLF": b"\xef\xbb\xbf" + PAGE.replace("\n", "\r\n").encode(),
    "coding": "# -*- coding: latin-1 -*-\n# für".encode("latin-1") + b"\n" + PAGE.encode(),
}


@pytest.mark.parametrize("encoding", ENCODED)
def test_a_page_is_read_as_python_reads_it(encoding: str, tmp_path: Path):
    (tmp_path / "own.py").write_bytes(ENCODED[encoding])
    assert load(f"{tmp_path}/own.py:experts=16").config.moe.num_experts == 16


def test_a_page_may_define_classes_that_look_up_their_module(tmp_path: Path):
    """Two pages of one name do not see each other, nor a module of the standard library."""
    for folder, width in (("a", 64), ("b", 32)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "types.py").write_text(
            "from __future__ import annotations\n"
            "import dataclasses, typing\n"
            "from moejax.config import default\n"
            f"Width = typing.NewType('Width', int)\n"
            "@dataclasses.dataclass\n"
            f"class Sizes:\n    model: Width = {width}\n"
            "def get_config():\n    config = default()\n"
            "    assert typing.get_type_hints(Sizes) == {'model': Width}\n"
            "    config.model.d_model = Sizes().model\n    return config\n"
        )
    loaded = [load(f"{tmp_path}/{folder}/types.py").config.model.d_model for folder in "aba"]
    assert loaded == [64, 32, 64]
    assert sys.modules["types"] is types


NUMBERS: dict[str, tuple[str, object]] = {
    "np.geomspace(1e-4, 1e-2, 3)[1]": ("optim.learning_rate", 1e-3),
    "np.float32(0.5)": ("optim.b1", 0.5),
    "np.array(0.25)": ("optim.b1", 0.25),
    "np.int64(2)": ("optim.clip_norm", 2.0),
    "np.arange(9)[7]": ("train.steps", 7),
    "1e3": ("train.steps", 1000),
    "np.float64(50.0)": ("train.eval_every", 50),
    "np.bool_(False)": ("model.tie_embeddings", False),
    "np.str_('choice')": ("moe.priority", "choice"),
    "np.uint8(3)": ("moe.gate.k", 3),
    "jnp.float32(0.5)": ("optim.b2", 0.5),
}


@pytest.mark.parametrize("number", NUMBERS)
def test_numpy_numbers_are_accepted(number: str, tmp_path: Path):
    name, expected = NUMBERS[number]
    imports = "import numpy as np; import jax.numpy as jnp"
    found = flatten(load(body(tmp_path, imports, f"config.{name} = {number}")).config)[name]
    assert found == pytest.approx(expected) and type(found) is type(expected)


@pytest.mark.parametrize("name", ["run:7/page.py", "a.py:b/page.py", "plain/page:7.py"])
@pytest.mark.parametrize("arg", ["", ":experts=16", ":gate=switch,experts=16"])
def test_folders_and_files_may_have_colons_in_their_names(name: str, arg: str, tmp_path: Path):
    path = tmp_path / name
    path.parent.mkdir()
    (tmp_path / "run").mkdir()
    path.write_text(PAGE)
    assert load(f"{path}{arg}").config.moe.num_experts == (16 if arg else 8)


PAGE_ERRORS = {
    "no such file with an argument": ("{dir}/pag.py:gate=switch", ["pag.py", "did you mean"]),
    "no such file": ("{dir}/pag.py", ["pag.py", "did you mean", "page.py"]),
    "neither file nor module": ("nonsense", ["nonsense", "path.py[:arg]"]),
    "no such module": ("no_such_package.page", ["no_such_package"]),
    "no such submodule": ("moejax.no_such_page", ["moejax.no_such_page", "does not exist"]),
    "no config.json": ("{dir}", ["config.json", "workdir"]),
    "unknown key": ("{page}:gat=switch", ["'gat'", "did you mean 'gate'"]),
    "key without value": ("{page}:experts", ["'experts' needs a value"]),
    "key of wrong type": ("{page}:experts=many", ["experts='many'", "whole number"]),
    "unknown gate": ("{page}:gate=mixtrall", ["'mixtrall'", "did you mean 'mixtral'"]),
}


@pytest.mark.parametrize("case", PAGE_ERRORS)
def test_a_mistake_in_a_source_is_reported_in_one_line(case: str, page: str, tmp_path: Path):
    source, parts = PAGE_ERRORS[case]
    with pytest.raises(UserError) as caught:
        load(source.format(dir=tmp_path, page=page))
    assert_one_line(caught.value, parts)


BAD_PAGES = {
    "syntax error": ("def get_config(:\n    pass\n", ["own.py:1:", "invalid syntax"]),
    "no get_config": ("x = 1\n", ["own.py", "get_config"]),
    "exception": ("def get_config(arg):\n    return 1 / 0\n", ["own.py:2: ZeroDivisionError"]),
    "exception at import": ("import no_such_module_at_all\n", ["own.py:1: ModuleNotFoundError"]),
    "not a config": ("def get_config(arg):\n    return {}\n", ["dict", "default()"]),
    "exit": ("import sys\ndef get_config(arg):\n    sys.exit(3)\n", ["own.py", "sys.exit(3)"]),
    "argument not taken": ("def get_config():\n    return 1\n", ["takes no argument", "'a=1'"]),
}


def test_a_page_that_is_not_text_is_reported_in_one_line(tmp_path: Path):
    (tmp_path / "own.py").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError) as caught:
        load(f"{tmp_path}/own.py")
    assert_one_line(caught.value, ["own.py", "not UTF-8 text"])


@pytest.mark.parametrize("case", BAD_PAGES)
def test_mistake_inside_a_page_names_file_and_line(case: str, tmp_path: Path):
    text, parts = BAD_PAGES[case]
    with pytest.raises(UserError) as caught:
        load(f"{write(tmp_path, text)}:a=1")
    assert_one_line(caught.value, parts)


BAD_LINES = {
    "unknown field": ("config.moe.num_expert = 4", ["own.py:5:", "did you mean 'moe.num_experts'"]),
    "unknown section": ("config.mo.d_ff = 4", ["own.py:5:", "AttributeError", "mo"]),
    "wrong type": ("config.train.steps = 'many'", ["own.py:5:", "TypeError", "steps"]),
    "fraction for an int": ("config.train.steps = 1.5", ["own.py:5:", "TypeError", "steps"]),
    "bool for an int": ("config.train.steps = True", ["train.steps=True", "whole number"]),
    "gate by assignment": ("config.moe.gate.name = 'switch'", ["set_gate(config, 'switch')"]),
    "extra field": (
        "with config.unlocked(): config.train.stepps = 4",
        ["train.stepps", "did you mean 'train.steps'"],
    ),
    "missing field": (
        "with config.unlocked(): del config.train.steps",
        ["train.steps is missing", "default()"],
    ),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_wrong_field_in_a_page_is_reported_in_one_line(case: str, tmp_path: Path):
    line, parts = BAD_LINES[case]
    with pytest.raises(UserError) as caught:
        load(body(tmp_path, line))
    assert_one_line(caught.value, parts)


def test_saved_config_of_another_version_is_refused_by_field():
    tree = to_dict(default())
    del tree["optim"]["b2"]
    with pytest.raises(UserError, match="optim.b2 is missing; .* another version"):
        from_dict(tree)


def assert_one_line(error: UserError, parts: list[str]) -> None:
    text = str(error)
    assert "\n" not in text
    for part in parts:
        assert part in text, text

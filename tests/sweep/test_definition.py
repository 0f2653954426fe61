"""From an experiment file to trials, and the mistakes found before anything starts."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moejax import cli
from moejax.config import load, to_dict
from moejax.errors import UserError
from moejax.sweep import folder as folders
from moejax.sweep.definition import Sweep, config_id, expand

ROOT = Path(__file__).parents[2]
SMOKE = f"{ROOT}/experiments/gating_smoke.py"
VARIANTS = ["dense_ffn", "top_2", "switch", "base", "sbase", "dselect_k"]

PAGE = """
from moejax.config import default, parse_arg

def get_config(arg=None):
    options = parse_arg(arg, steps=20, more=False)
    config = default()
    config.train.steps = options.steps
    return config

def sweep({parameters}):
    {body}
"""
SWITCH = '{"name": "switch", "moe.gate.name": "switch"}'

Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes an experiment whose sweep() has this body; its path."""

    def page(body: str, parameters: str = "", name: str = "page.py") -> str:
        path = tmp_path / name
        path.write_text(PAGE.format(body=body, parameters=parameters))
        return str(path)

    return page


def test_variants_times_seeds_in_the_order_of_the_file(write: Write):
    body = (
        'yield {"name": "b", "moe.gate.k": 1, "moe.gate.renormalize": False, "seeds": 2}\n'
        '    yield {"name": "a", "moe.every": 0, "seeds": [7, 3]}\n'
        '    yield {"name": "c", "moe.losses.load_balance": 0.125}'
    )
    sweep = expand(write(body))
    assert sweep.variants == ["b", "a", "c"]
    names = ["b-seed0", "b-seed1", "a-seed7", "a-seed3", "c-seed0"]
    assert [trial.name for trial in sweep.trials] == names
    assert [trial.config["train"]["seed"] for trial in sweep.trials] == [0, 1, 7, 3, 0]
    gate = sweep.trials[1].config["moe"]["gate"]
    assert (gate["name"], gate["k"], gate["renormalize"]) == ("top_k", 1, False)
    assert sweep.trials[4].config["moe"]["losses"]["load_balance"] == 0.125
    assert len({trial.id for trial in sweep.trials}) == 5


def test_a_trials_overrides_give_its_config_on_the_command_line_of_train(write: Write):
    body = f"yield {{**{SWITCH}, 'moe.gate.jitter': 0.25, 'model.tie_embeddings': False}}"
    source = write(body)
    (trial,) = expand(source).trials
    assert to_dict(load(source, trial.overrides).config) == trial.config
    assert "--config.moe.gate.jitter=0.25" in trial.overrides


def test_the_argument_reaches_both_functions_and_sweep_may_ignore_it(write: Write):
    body = (
        'options = parse_arg(arg, steps=20, more=False)\n    yield {"name": "a"}\n'
        '    if options.more: yield {"name": "b", "moe.every": 0}'
    )
    source = write(body, "arg=None")
    assert expand(source).variants == ["a"]
    sweep = expand(f"{source}:more,steps=30")
    assert sweep.variants == ["a", "b"] and sweep.trials[0].steps == 30
    (trial,) = expand(write(f"return [{SWITCH}]") + ":steps=9").trials
    assert trial.steps == 9


def test_an_id_depends_only_on_what_a_run_computes(write: Write):
    ids = [
        expand(write(f"yield {{**{SWITCH}, {more}}}", name=name)).trials[0].id
        for name, more in {
            "one.py": "'seeds': 1",
            "two.py": "'seeds': [0], 'report.progress': False, 'distributed.mode': 'off'",
            "other.py": "'moe.capacity_factor': 1.5",
            "seed.py": "'seeds': [1]",
        }.items()
    ]
    assert ids[0] == ids[1] and len(set(ids)) == 3


def test_an_id_survives_json(write: Write):
    (trial,) = expand(write(f"yield {SWITCH}")).trials
    assert config_id(json.loads(json.dumps(trial.config))) == trial.id


def test_the_smoke_experiment_has_its_six_variants_and_two_seeds():
    sweep = expand(SMOKE)
    assert sweep.variants == VARIANTS and len(sweep.trials) == 12
    leaks = {trial.variant for trial in sweep.trials if "future" in _mark(trial.config)}
    assert leaks == {"base", "sbase"}


def _mark(config: dict[str, Any]) -> str:
    from moejax.config import from_dict, validate

    return validate(from_dict(config)).mark


def test_the_smoke_experiments_dense_model_costs_what_its_top_2_costs():
    sweep = expand(f"{SMOKE}:only=dense_ffn+top_2+switch,seeds=3,steps=7")
    assert [trial.seed for trial in sweep.trials] == [0, 1, 2] * 3
    for trial in sweep.trials:
        model, moe = trial.config["model"], trial.config["moe"]
        assert model["d_ff"] == 2 * moe["d_ff"] and trial.steps == 7


def test_a_folder_stands_for_its_sweep_py(write: Write, tmp_path: Path):
    folder = tmp_path / "question"
    folder.mkdir()
    Path(write(f"yield {SWITCH}")).rename(folder / "sweep.py")
    trials = expand(str(folder)).trials
    assert [trial.id for trial in trials] == [t.id for t in expand(f"{folder}/sweep.py").trials]
    sweep = expand(f"{folder}:steps=7")
    assert sweep.source == f"{folder}/sweep.py:steps=7" and sweep.trials[0].steps == 7


def test_the_example_in_the_documentation_expands(tmp_path: Path):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/sweeps.md").read_text(), re.DOTALL)
    (tmp_path / "page.py").write_text(code)
    sweep = expand(f"{tmp_path}/page.py:steps=9")
    assert sweep.variants == ["dense_ffn", "switch", "top_4"] and len(sweep.trials) == 9
    assert all(trial.steps == 9 for trial in sweep.trials)


MISTAKES = {
    "": ["page.py:11: expected an indented block"],
    "pass": ["sweep() gives no variants"],
    "return 3": ["sweep() gives no variants"],
    "yield 'switch'": ["variant 1: 'switch' is not a dict with a 'name'"],
    "yield {'moe.every': 0}": ["variant 1", "is not a dict with a 'name'"],
    "yield {'name': 'a/b'}": ["variant 1", "name='a/b' becomes a folder"],
    "yield {'name': '..'}": ["name='..' becomes a folder"],
    f"yield {SWITCH}; 1 / 0": ["page.py:11: ZeroDivisionError"],
    "yield {'name': 'a', 'seeds': 0}": ["variant 1: seeds=0 must be a number of seeds"],
    "yield {'name': 'a', 'seeds': True}": ["seeds=True"],
    "yield {'name': 'a', 'seeds': ['1']}": ["seeds=['1']"],
    "yield {'name': 'a', 'seeds': [-1]}": ["variant 1 (a): train.seed=-1 must be >= 0"],
    "yield {'name': 'a', 'seeds': 2, 'train.seed': 1}": ["give train.seed or seeds, not both"],
    f"yield {SWITCH}; yield {{'name': 'b', 'moe.gate.nam': 1}}": ["variant 2 (b)", "'nam'"],
    "yield {'name': 'a', 'train.steps': 1.5}": ["variant 1 (a): train.steps='1.5'"],
    "yield {'name': 'a', 'moe.gate.name': 'swich'}": ["(a): gate 'swich' is unknown", "'switch'"],
    "yield {'name': 'a', 'moe.gate.k': 99}": ["(a): moe.gate.k=99", "num_experts=8"],
    f"yield {SWITCH}; yield {{'name': 'switch', 'moe.every': 0}}": [
        "2 trials are called 'switch-seed0'"
    ],
    "yield {'name': 'a', 'seeds': [1, 1]}": ["2 trials are called 'a-seed1'"],
    f"yield {SWITCH}; yield {{**{SWITCH}, 'name': 'again'}}": [
        "'switch-seed0' and 'again-seed0' are the same run"
    ],
}


@pytest.mark.parametrize("body", MISTAKES)
def test_a_mistake_is_reported_in_one_line_exits_2_and_starts_nothing(
    body: str, write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    command = ["sweep", f"--experiment={write(body)}", f"--workdir={tmp_path}/out"]
    refused(command, MISTAKES[body], tmp_path / "out", capsys)


@pytest.mark.parametrize(
    "source, said",
    [
        ("no_such.py", ["'no_such.py'", "No such file"]),
        ("nonsense", ["experiment 'nonsense' is neither a file"]),
        (f"{ROOT}/configs/lm.py", ["lm.py' defines no function sweep()", "moejax train"]),
        (f"{SMOKE}:sedes=1", ["unknown key 'sedes'", "did you mean 'seeds'"]),
        (f"{SMOKE}:only=swich", ["only='swich' is unknown", "did you mean 'switch'"]),
        (f"{SMOKE}:only=switch,steps=0", ["train.steps=0"]),
        (f"{SMOKE}:only=switch,size=huge", ["size='huge' is unknown"]),
    ],
)
def test_a_source_that_is_no_experiment_is_refused(
    source: str, said: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    command = ["sweep", f"--experiment={source}", f"--workdir={tmp_path}/out"]
    refused(command, said, tmp_path / "out", capsys)


def refused(
    command: list[str], said: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith("moejax: error: ") and error.count("\n") == 1, error
    for part in said:
        assert part in error, error
    assert not folder.exists()


# The folder of a sweep.


def begun(folder: Path, sweep: Sweep) -> None:
    folder.mkdir()
    folders.write_index(folder, sweep)


def test_a_sweep_resumes_in_its_folder_and_may_gain_trials(write: Write, tmp_path: Path):
    sweep = expand(write(f"yield {{**{SWITCH}, 'seeds': 2}}"))
    folders.check(tmp_path / "out", sweep)  # not there yet
    begun(tmp_path / "out", sweep)
    folders.check(tmp_path / "out", sweep)
    wider = f"yield {{'name': 'dense_ffn', 'moe.every': 0}}; yield {{**{SWITCH}, 'seeds': 3}}"
    folders.check(tmp_path / "out", expand(write(wider, name="other.py")))


@pytest.mark.parametrize(
    "body, said",
    [
        (f"yield {{**{SWITCH}, 'moe.d_ff': 64}}", "moe.d_ff=256, the experiment now has .*=64"),
        ("yield {'name': 'switch', 'moe.gate.name': 'gshard'}", "moe.gate.name=switch, .*=gshard"),
        ("yield {'name': 'other', 'moe.gate.name': 'switch'}", "has a trial 'switch-seed0'"),
        (f"yield {{**{SWITCH}, 'seeds': [1]}}", "has a trial 'switch-seed0'"),
    ],
)
def test_another_sweep_is_refused_by_field(body: str, said: str, write: Write, tmp_path: Path):
    begun(tmp_path / "out", expand(write(f"yield {SWITCH}")))
    before = (tmp_path / "out/sweep.json").read_bytes()
    with pytest.raises(UserError, match=said):
        folders.check(tmp_path / "out", expand(write(body)))
    assert (tmp_path / "out/sweep.json").read_bytes() == before


def test_a_trials_folder_with_another_run_is_refused(write: Write, tmp_path: Path):
    sweep = expand(write(f"yield {SWITCH}"))
    begun(tmp_path / "out", sweep)
    workdir = folders.workdir_of(tmp_path / "out", sweep.trials[0])
    workdir.mkdir(parents=True)
    config = {**sweep.trials[0].config, "train": {**sweep.trials[0].config["train"], "steps": 21}}
    saved = {"config": config, "fingerprint": "", "baselines": {}}
    (workdir / "config.json").write_text(json.dumps(saved))
    with pytest.raises(UserError, match="the run in .* has train.steps=21, .*=20"):
        folders.check(tmp_path / "out", sweep)


@pytest.mark.parametrize("content", ["{", "[]", '{"trials": [1]}', '{"trials": [{"name": "a"}]}'])
def test_a_damaged_or_foreign_sweep_json_is_refused(content: str, write: Write, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/sweep.json").write_text(content)
    with pytest.raises(UserError, match="sweep.json was not written by"):
        folders.check(tmp_path / "out", expand(write(f"yield {SWITCH}")))


def test_a_file_and_a_folder_of_something_else_are_refused(write: Write, tmp_path: Path):
    sweep = expand(write(f"yield {SWITCH}"))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/thesis.tex").write_text("")
    with pytest.raises(UserError, match="notes is not empty and holds no sweep"):
        folders.check(tmp_path / "notes", sweep)
    with pytest.raises(UserError, match=r"thesis.tex is a file"):
        folders.check(tmp_path / "notes/thesis.tex", sweep)

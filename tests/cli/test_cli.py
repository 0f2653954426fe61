"""The command line: arguments, mistakes and error messages."""

import io
import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from moejax import cli
from moejax.config import default, from_dict, to_dict

ROOT = Path(__file__).parents[2]
LM = f"--config={ROOT}/configs/lm.py"
COMMANDS = ("train", "eval", "config", "gates", "data", "doctor", "sweep", "scaling", "report")

MISTAKES = {
    # commands and flags
    "trian {lm} {workdir}": ["unknown command 'trian'", "did you mean 'train'"],
    "--config.train.steps=1": ["COMMAND"],
    "train {workdir}": ["--config", "moejax train --help"],
    "train {lm}": ["--workdir", "moejax train --help"],
    "train {lm} --workdr=x": ["unknown flag --workdr", "did you mean --workdir?"],
    "train {lm} {workdir} --confg.moe.every=2": ["did you mean --config.moe.every=2?"],
    "train {lm} {workdir} --train.steps=2": ["did you mean --config.train.steps=2?"],
    "train {lm} {workdir} --verbosity=2": ["unknown flag --verbosity", "--workdir"],
    "train {lm} {workdir} train.steps=2": ["unexpected argument 'train.steps=2'"],
    "train {lm} {workdir} --config.train.steps": ["--config.train.steps needs a value"],
    "train {lm} --config.train.steps {workdir}": ["--config.train.steps needs a value"],
    "train {lm} --workdir": ["--workdir", "expected one argument"],
    "train {lm} --workdir={file}": ["is a file"],
    "train {lm} --workdir={file}/run": ["cannot be a folder (Not a directory)"],
    "train {lm} --workdir=": ["--workdir= is empty"],
    f"train {{lm}} --workdir=/tmp/{'a' * 300}": ["cannot be a folder (File name too long)"],
    "eval --workdir=": ["--workdir= is empty"],
    "eval {workdir}": ["config.json", "workdir of a run"],
    "eval {workdir} --step=x": ["--step", "'x'"],
    "eval {workdir} --step=-2": ["--step=-2"],
    "eval {workdir} --measure-leak=0": ["--measure-leak=0"],
    "eval {workdir} --measure-leaks": ["unknown flag --measure-leaks", "--measure-leak"],
    "config {lm} {workdir}": ["--workdir", "not allowed with"],
    "gates nonsense": ["gate 'nonsense' is unknown", "mixtral"],
    "gates --config.moe.every=2": ["moejax gates takes no config"],
    "data": ["ACTION", "moejax data --help"],
    "data prep": ["'prep'", "prepare"],
    "data prepare": ["--out"],
    "data prepare --ot=x": ["unknown flag --ot", "--out"],
    "data tokenizer --out={file}x --vocab-size=many": ["--vocab-size", "'many'"],
    "data tokenizer --out={file} --vocab-size=300": ["exists"],
    "data prepare --out={file}x --workers=0": ["workers=0"],
    "data prepare --out={file}x --tokenizer=no.json": ["data.tokenizer", "no.json"],
    "data prepare --out={file}x --path=no/where": ["data.path", "no/where"],
    "data prepare --out={file}x --path=hf://name": ["hf://name", "save_to_disk"],
    "data prepare --out={file}x --eval-fraction=1": ["data.eval_fraction"],
    "data prepare --out={file}x --on-error=ignore": ["--on-error", "'ignore'"],
    "data prepare --out={folder}/out --path={file},{folder}": ["lies in --path", "somewhere else"],
    "data inspect no/where": ["PATH: cannot read 'no/where'"],
    "data inspect --frist=2": ["unknown flag --frist", "--first"],
    "doctor --cpu-devices=0": ["--cpu-devices=0"],
    "sweep {workdir}": ["--experiment", "moejax sweep --help"],
    "sweep --experiment=x.py": ["--workdir", "moejax sweep --help"],
    "sweep --experiment={broken} --workdr=x": ["unknown flag --workdr", "--workdir"],
    "sweep --experiment={broken} {workdir}": ["broken.py' defines no function sweep()"],
    "sweep --experiment={broken} {workdir} --config.train.steps=1": [
        "moejax sweep takes no config"
    ],
    "report": ["RUN_OR_SWEEP", "moejax report --help"],
    "report {file}": ["holds neither a run nor a sweep"],
    "report nowhere": ["nowhere does not exist"],
    "report x --measure-leak=many": ["--measure-leak", "'many'"],
    "report x --tensorbord": ["unknown flag --tensorbord", "--tensorboard"],
    # sources
    "train --config=configs/no_such.py {workdir}": ["configs/no_such.py"],
    "train --config=nonsense {workdir}": ["'nonsense'", "path.py[:arg]"],
    "train --config=no_such_package.x {workdir}": ["no_such_package"],
    "train --config={broken} {workdir}": ["broken.py:2: ZeroDivisionError"],
    "train {lm}:gat=switch {workdir}": ["'gat'", "did you mean 'gate'"],
    "train {lm}:gate=swich {workdir}": ["'swich'", "did you mean 'switch'"],
    "train {lm}:size=huge {workdir}": ["size='huge'", "tiny"],
    "train {lm}:experts=x {workdir}": ["experts='x'", "whole number"],
    "train {lm}:gate=switch,gate=mixtral {workdir}": ["'gate' is given twice"],
    # fields and values
    "train {lm} {workdir} --config.moe.num_expert=16": ["did you mean 'moe.num_experts'"],
    "train {lm} {workdir} --config.train.steps=1.5": ["train.steps='1.5'", "whole number"],
    "train {lm} {workdir} --config.train.steps many": ["train.steps='many'"],
    "train {lm} {workdir} --config.train.steps=3e9": ["train.steps=3000000000", "2147483647"],
    "train {lm} {workdir} --lr=0.1": ["did you mean --config.optim.learning_rate=0.1?"],
    "train {lm} {workdir} --batch-size=8": ["did you mean --config.train.batch_size=8?"],
    "train {lm} {workdir} --config.optim.lr=1": ["did you mean 'optim.learning_rate'?"],
    "train {lm} {workdir} --config.optim.b1=big": ["optim.b1='big'", "number"],
    "train {lm} {workdir} --config.report.progress=maybe": ["'maybe'", "true or false"],
    "train {lm} {workdir} --config.moe=1": ["moe is a section"],
    "train {lm} {workdir} --config.moe.gate.gamma=1": ["no field 'gamma'"],
    "train {lm} {workdir} --config.moe.gate.name=swich": ["did you mean 'switch'"],
    "train {lm} {workdir} --config.moe.gate.name=:x": ["gate ':x' cannot be imported"],
    "train {lm} {workdir} --config.model.attention=cudnn": ["model.dtype=float32", "auto"],
    "train {lm} --workdir=a\udce9": ["not UTF-8", "name a folder"],
    "profile {lm} --out=a\udce9": ["not UTF-8", "name another folder"],
    # semantics
    "train {lm} {workdir} --config.mesh.expert=3": ["moe.num_experts=8", "mesh.expert=3"],
    "train {lm}:experts=6 {workdir}": ["moe.num_experts=6", "mesh.expert=4", "4 or 8"],
    "train {lm} {workdir} --config.train.batch_size=6": ["train.batch_size=6", "batch_size=8"],
    "train {lm} {workdir} --config.moe.gate.k=9": ["moe.gate.k=9", "num_experts=8"],
    "train {lm} {workdir} --config.moe.capacity_factor=0": ["moe.capacity_factor=0.0"],
    "train {lm} {workdir} --config.moe.group=batch": ["moe.transport=cells", "dropless"],
    "train {lm} {workdir} --config.moe.eval_transport=cells --config.moe.priority=gate": [
        "allow_future_leak"
    ],
    "train {lm} {workdir} --config.data.path=/no/such/text": ["data.path='/no/such/text'"],
    "config {lm} --config.train.steps=0": ["train.steps=0"],
    f"report {'x' * 300}": ["xxx... cannot be accessed: File name too long", "another path"],
    f"scaling {'x' * 300}": ["xxx... cannot be accessed: File name too long", "another path"],
    f"train {{lm}} {{workdir}} --config.train.init_from={'x' * 300}": ["File name too long"],
    "doctor --cpu-devices=1000000": ["--cpu-devices=1000000", "at most 1024"],
}


@pytest.fixture
def places(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "file").write_text("")
    (tmp_path / "broken.py").write_text("def get_config(arg):\n    return 1 / 0\n")
    return {
        "lm": LM,
        "workdir": f"--workdir={tmp_path}/run",
        "file": f"{tmp_path}/file",
        "folder": str(tmp_path),
        "broken": f"{tmp_path}/broken.py",
    }


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_reported_in_one_line_exits_2_and_creates_nothing(
    line: str, places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    before = sorted(tmp_path.iterdir())
    status = cli.main([word.format(**places) for word in line.split()])
    error = capsys.readouterr().err
    assert status == 2
    assert error.startswith("moejax: error: ") and error.count("\n") == 1, error
    for part in MISTAKES[line]:
        assert part in error, error
    assert sorted(tmp_path.iterdir()) == before


def test_no_command_prints_the_help_and_exits_2(capsys: pytest.CaptureFixture[str]):
    assert cli.main([]) == 2
    assert "usage: moejax" in capsys.readouterr().err


@pytest.mark.parametrize("command", [(), *((c,) for c in COMMANDS), ("data", "prepare")])
def test_help_exits_0_and_shows_an_example(
    command: tuple[str, ...], capsys: pytest.CaptureFixture[str]
):
    assert cli.main([*command, "--help"]) == 0
    text = capsys.readouterr().out
    assert " ".join(["usage: moejax", *command]) in text
    assert len(command) == 2 or f"\n  moejax {command[0] if command else 'train'}" in text
    assert max(map(len, text.splitlines())) <= 100


def test_version_is_printed(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("moejax ")


# train and eval hand over to the loop


class Loop(types.ModuleType):
    """Stands for the modules that train and evaluate: records what a command hands over."""

    def __init__(self) -> None:
        super().__init__("moejax.train.loop")
        self.calls: list[tuple[Any, ...]] = []

    def run(
        self,
        config: Any,
        workdir: str,
        source: str,
        overrides: tuple[str, ...],
        restart: bool,
    ) -> int:
        assert not restart
        self.calls.append((config, workdir, source, overrides))
        return 75

    def evaluate(self, config: Any, *rest: Any) -> dict[str, Any]:
        self.calls.append((config, *rest))
        return {"step": 5, "split": "eval", "loss": 1.5}


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> Loop:
    import moejax.train

    fake = Loop()
    for module in ("loop", "evaluate"):
        monkeypatch.setitem(sys.modules, f"moejax.train.{module}", fake)
        monkeypatch.setattr(moejax.train, module, fake, raising=False)
    return fake


def test_train_hands_config_and_origin_to_the_loop_and_returns_its_status(
    loop: Loop, tmp_path: Path
):
    overrides = ["--config.moe.gate.k=4", "--config.moe.gate.name", "top_k"]
    assert cli.main(["train", *overrides, LM, f"--workdir={tmp_path}/run"]) == 75
    config, workdir, source, given = loop.calls[0]
    assert (config.moe.gate.name, config.moe.gate.k) == ("top_k", 4)
    assert (workdir, source) == (f"{tmp_path}/run", LM.removeprefix("--config="))
    assert given == ("--config.moe.gate.k=4", "--config.moe.gate.name=top_k")
    assert not (tmp_path / "run").exists()


def test_the_config_file_may_be_a_separate_argument(loop: Loop, tmp_path: Path):
    assert cli.main(["train", "--config", LM.removeprefix("--config="), "--workdir", "x"]) == 75


def test_a_tilde_means_the_home_folder_in_every_path(
    loop: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Shells do not expand it after an equals sign, and nobody wants a folder called ~."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "page.py").write_text((ROOT / "configs/lm.py").read_text())
    assert cli.main(["train", "--config=~/page.py:gate=switch", "--workdir=~/run"]) == 75
    config, workdir, _, _ = loop.calls[0]
    assert (config.moe.gate.name, workdir) == ("switch", f"{tmp_path}/run")


def test_eval_reads_the_runs_config_and_prints_one_json_row(
    loop: Loop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    saved = default()
    saved.train.seed = 3
    (tmp_path / "config.json").write_text(json.dumps({"config": to_dict(saved)}))
    words = [f"--workdir={tmp_path}", "--step=5", "--config.moe.eval_transport=cells"]
    assert cli.main(["eval", *words]) == 0
    assert json.loads(capsys.readouterr().out) == {"step": 5, "split": "eval", "loss": 1.5}
    config, *rest = loop.calls[0]
    assert (config.train.seed, config.moe.eval_transport) == (3, "cells")
    assert rest == [str(tmp_path), 5, "", 0, 0, False]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("flags", "terminal", "short"),
    [([], False, False), ([], True, True), (["--summary"], False, True), (["--json"], True, False)],
)
def test_eval_prints_a_summary_on_a_terminal_and_everything_otherwise(
    flags: list[str],
    terminal: bool,
    short: bool,
    loop: Loop,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    saved = {
        "config": to_dict(default()), "fingerprint": "", "baselines": {"bigram": 2.0},
        "heldout_bytes_per_token": 1.0,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(saved))
    monkeypatch.setattr(sys, "stdout", out := Terminal() if terminal else io.StringIO())
    assert cli.main(["eval", f"--workdir={tmp_path}", *flags]) == 0
    said = out.getvalue()
    if short:
        assert said.splitlines()[0] == "held-out loss   1.5000 nats/byte  at step 5"
        assert "  bigram        2.0000 nats/byte  0.5000 above the model's" in said.splitlines()
        assert "--json" in said.splitlines()[-1] and len(said.splitlines()) < 10
    else:
        assert json.loads(said) == {"step": 5, "split": "eval", "loss": 1.5}


@pytest.mark.parametrize(("flag", "rows"), [("--measure-leak", 8), ("--measure-leak=3", 3)])
def test_eval_measures_the_leak_on_request(loop: Loop, tmp_path: Path, flag: str, rows: int):
    (tmp_path / "config.json").write_text(json.dumps({"config": to_dict(default())}))
    assert cli.main(["eval", flag, f"--workdir={tmp_path}"]) == 0
    assert loop.calls[0][1:] == (str(tmp_path), None, "", 0, rows, False)


def test_interrupt_outside_training_exits_130(
    loop: Loop, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def interrupted(*_: Any, **__: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "run", interrupted)
    assert cli.main(["train", LM, "--workdir=x"]) == 130
    assert capsys.readouterr().err == "moejax: interrupted\n"


# config and gates


def marks(text: str) -> dict[str, str]:
    """Field name -> mark, of a printed config tree."""
    lines = [line for line in text.splitlines()[1:] if line[:2] in ("* ", "~ ", "  ")]
    return {line.split()[0 if line[0] == " " else 1]: line[0] for line in lines}


def test_config_shows_every_field_and_marks_its_origin(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["config", f"{LM}:gate=switch", "--config.train.steps=500"]) == 0
    text = capsys.readouterr().out
    shown = marks(text)
    for section in to_dict(default()):
        assert f"\n{section}: " in text
    assert shown["steps"] == "*" and shown["expert"] == "~" and shown["seed"] == " "
    assert ["*", "steps", "500", "int", "optimizer", "updates"] in map(str.split, text.splitlines())


def test_config_diff_shows_only_what_is_not_default(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["config", LM, "--diff", "--config.moe.gate.k=4"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert rows == [
        ["~", "mesh.expert", "4", "(default:", "1)"],
        ["*", "moe.gate.k", "4", "(page:", "2)"],
    ]


def test_config_without_a_source_shows_the_defaults(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["config"]) == 0
    assert set(marks(capsys.readouterr().out).values()) == {" "}
    assert cli.main(["config", "--diff"]) == 0
    assert capsys.readouterr().out == "every field is at its default\n"


def test_config_shows_the_mark_of_a_leak(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["config", LM, "--diff", "--config.moe.priority=choice"]) == 0
    assert "train:future" in capsys.readouterr().out.splitlines()[-1]


def test_config_of_a_run_is_read_from_its_workdir(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    saved = default()
    saved.optim.b2 = 0.5
    (tmp_path / "config.json").write_text(json.dumps({"config": to_dict(saved)}))
    assert cli.main(["config", f"--workdir={tmp_path}", "--diff"]) == 0
    assert "optim.b2" in capsys.readouterr().out
    assert from_dict(to_dict(saved)) == saved


def test_gates_lists_every_gate(capsys: pytest.CaptureFixture[str]):
    from moejax import gating

    assert cli.main(["gates"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1 : 1 + len(gating.names())]] == gating.names()


def test_the_page_of_a_gate_has_its_paper_and_cost(capsys: pytest.CaptureFixture[str]):
    # A product with a [1024, 64] matrix, in multiplications and additions.
    for gate, cost, paper in (
        ("switch", "experts: 1; router: 131.1k", "2101.03961"),
        ("shazeer", "experts: 2; router: 262.1k", "1701.06538"),  # noise has a matrix of its own
        ("hash", "experts: 1; router: 0", "2106.04426"),
    ):
        assert cli.main(["gates", gate]) == 0
        page = capsys.readouterr().out
        assert cost in page and paper in page and "d_model=1024, 64 experts" in page


def test_gates_explains_one_gate(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["gates", "shazeer"]) == 0
    text = capsys.readouterr().out
    assert "arXiv 1701.06538" in text and "min_std" in text and "moe.losses.load = 0.1" in text


# data


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(8):
        (folder / f"{i}.txt").write_text(f"text number {i} " * 40)
    return folder


def test_data_prepare_writes_shards_and_prints_how_to_use_them(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "shards"
    words = [f"--path={texts}", f"--out={out}", "--eval-fraction=0.3"]
    assert cli.main(["data", "prepare", *words]) == 0
    assert out.is_dir()
    text = capsys.readouterr().out
    assert "fingerprint" in text and f"--config.data.path={out}" in text


def test_data_tokenizer_writes_a_file_and_prints_how_to_use_it(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "bpe.json"
    words = [f"--path={texts}", f"--out={out}", "--vocab-size=260", "--eval-fraction=0.3"]
    assert cli.main(["data", "tokenizer", *words]) == 0
    assert out.is_file()
    assert f"--config.data.tokenizer={out}" in capsys.readouterr().out


@pytest.mark.parametrize("action", [["prepare"], ["tokenizer", "--vocab-size=260"]])
def test_data_is_not_written_into_the_folder_it_is_made_from(
    action: list[str], texts: Path, capsys: pytest.CaptureFixture[str]
):
    before = sorted(texts.iterdir())
    assert cli.main(["data", *action, f"--path={texts}", f"--out={texts}/new"]) == 2
    assert f"lies in --path={texts}" in capsys.readouterr().err
    assert sorted(texts.iterdir()) == before


def test_module_form_takes_the_same_flags(tmp_path: Path):
    words = [LM, f"--workdir={tmp_path}/run", "--config.train.stepps=3"]
    done = subprocess.run(
        [sys.executable, "-m", "moejax.train", *words], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2
    assert done.stderr == (
        "moejax: error: train.stepps is not a config field; did you mean 'train.steps'?\n"
    )
    assert not (tmp_path / "run").exists()


def test_lines_for_a_closed_stream_reach_no_other_file():
    code = (
        "import os, sys\nfrom moejax import cli\n"
        "status = cli.main(['gates', 'nope'])\nlog = os.open('/dev/null', os.O_RDONLY)\n"
        "sys.exit(status if log > 2 else 99)"
    )
    line = f'exec {sys.executable} -c "$CODE" 2>&- 0<&-'
    done = subprocess.run(
        ["sh", "-c", line], stdout=subprocess.PIPE, text=True, env={**os.environ, "CODE": code}
    )
    assert (done.returncode, done.stdout) == (2, "")


def test_a_terminal_without_greek_letters_gets_escapes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdout", out := io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert cli.main(["gates", "switch"]) == 0
    out.seek(0)
    assert "\\u2208 S" in out.read()

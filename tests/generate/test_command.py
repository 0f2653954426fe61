"""``moejax generate`` on a tiny run."""

import json
from pathlib import Path

import pytest

from moejax.analysis.pages import generated as generated_page
from moejax.analysis.run import RunData
from moejax.record.generated import GeneratedTexts
from tests.train import runs

PROMPT = "the gate"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("generate")


@pytest.fixture(scope="module")
def workdir(folder) -> Path:
    """Two steps of training, with experts on two devices, whose text is gone afterwards."""
    text = runs.write_text(folder / "text")
    changes = {"moe__gate__name": "mixtral", "train__steps": 2, "report__compile_cache": "off"}
    ended = runs.call(runs.command(folder / "run", text, **changes))
    assert ended.status == 0, ended.err
    text.rename(folder / "elsewhere")
    return folder / "run"


def generate(workdir, *flags):
    return runs.call(["generate", f"--workdir={workdir}", *flags])


def objects(workdir, *flags):
    ended = generate(workdir, "--json", *flags)
    assert ended.status == 0, ended.err
    return [json.loads(line) for line in ended.out.splitlines()]


def test_a_prompt_is_continued_and_its_experts_are_shown_and_recorded(workdir, folder):
    before = runs.files(workdir)
    flags = ("--prompt", PROMPT, "--max-tokens=11", "--temperature=1", "--config.mesh.expert=1")
    (found,) = objects(workdir, *flags, "--show-routing")
    assert runs.files(workdir) == before
    assert found["prompt"] == PROMPT and found["finish"] in ("length", "eos")
    assert bytes(found["tokens"]).decode("utf-8", "replace") == found["text"]
    experts = found["experts"]
    assert len(experts) == len(found["tokens"]) and {len(e) for e in experts} == {2}
    assert all(len(set(own)) == 2 and max(own) < 4 for e in experts for own in e)

    ended = generate(workdir, *flags, "--show-routing", "--record-routing")
    assert ended.out.startswith(f"{PROMPT}{found['text']}\n") and "\x1b" not in ended.out
    assert "tokens/s" in ended.err
    shown = ended.out[len(f"{PROMPT}{found['text']}\n") :].splitlines()
    assert shown[0].split() == ["token", "layer", "0", "layer", "1"]
    assert [line.split()[-2:] for line in shown[1:]] == [
        ["+".join(map(str, own)) for own in e] for e in experts
    ]
    recorded = GeneratedTexts.read(workdir)
    assert recorded is not None
    (text,) = recorded.texts
    assert text.experts == experts and text.prompt == PROMPT
    page = generated_page.page(RunData.read(workdir))
    assert page.blocks and PROMPT in str(page.blocks)
    report = runs.call(["report", str(workdir), f"--output={folder}/report.html"])
    assert report.status == 0, report.err
    assert "generated" in (folder / "report.html").read_text().lower()


@pytest.mark.slow
def test_experts_on_several_devices_give_the_same_texts(workdir, folder):
    prompts = folder / "prompts.txt"
    prompts.write_text(f"{PROMPT}\na\nthe router of a token\nexpert load\nto\n")
    flags = (f"--prompts={prompts}", "--max-tokens=9", "--batch-size=4", "--temperature=0.9")
    wanted = objects(workdir, *flags, "--config.mesh.expert=1")
    assert sorted(found["number"] for found in wanted) == list(range(5))
    for mesh in ({"expert": 2}, {"expert": 2, "data": 2}, {"expert": 2, "tensor": 2, "fsdp": 2}):
        own = [f"--config.mesh.{axis}={size}" for axis, size in mesh.items()]
        assert objects(workdir, *flags, *own) == wanted
    by_prompt = {found["prompt"]: found["tokens"] for found in wanted}
    (alone,) = objects(workdir, "--prompt=a", *flags[1:], "--config.mesh.expert=1")
    assert alone["tokens"] == by_prompt["a"]


@pytest.mark.slow
def test_prompts_of_json_lines_and_stop_strings(workdir, folder):
    path = folder / "prompts.jsonl"
    path.write_text('{"prompt": "two\\nlines"}\n{"prompt": "b"}\n')
    flags = (f"--prompts={path}", "--max-tokens=40", "--temperature=3", "--config.mesh.expert=1")
    found = objects(workdir, *flags)
    assert [x["prompt"] for x in found] == ["two\nlines", "b"]
    stop = next(c for c in found[0]["text"] if c.isascii())
    again = objects(workdir, *flags, "--stop", stop)
    assert again[0]["finish"] == "stop" and stop not in again[0]["text"]
    assert found[0]["text"].startswith(again[0]["text"] + stop)


def test_mistakes_are_one_line(workdir, folder):
    empty, binary = folder / "empty.txt", folder / "latin.txt"
    empty.write_text("")
    binary.write_bytes(b"caf\xe9\n")
    blank, no_json = folder / "blank.txt", folder / "no.jsonl"
    blank.write_text("a\n\nb\n")
    no_json.write_text('{"text": "a"}\n')
    for flags, *parts in (
        (("--prompt=",), "--prompt=", "empty"),
        ((f"--prompts={empty}",), str(empty), "no line"),
        ((f"--prompts={blank}",), str(blank), "line 2"),
        ((f"--prompts={binary}",), str(binary), "UTF-8"),
        ((f"--prompts={no_json}",), str(no_json), "line 1"),
        ((f"--prompts={folder}/none",), f"{folder}/none", "cannot be read"),
        ((), "--prompt"),
        (("--prompt=a", "--prompts=b"), "not allowed with"),
        (("--prompt=a", "--max-tokens=0"), "--max-tokens=0"),
        (("--prompt=a", "--batch-size=0"), "--batch-size=0"),
        (("--prompt=a", "--seed=-1"), "--seed=-1"),
        (("--prompt=a", f"--seed={2**32}"), f"--seed={2**32}"),
        (("--prompt=a", "--top-p=1.5"), "--top-p=1.5", "at most 1"),
        (("--prompt=a", "--top-k=-1"), "--top-k=-1"),
        (("--prompt=a", "--min-p=-0.1"), "--min-p=-0.1"),
        (("--prompt=a", "--temperature=-1"), "--temperature=-1"),
        (("--prompt=a", "--repetition-penalty=0"), "--repetition-penalty=0"),
        (("--prompt=a", "--stop="), "--stop="),
        (("--prompt=a", "--step=-1"), "--step=-1"),
        (("--prompt=a", "--step=77"), "77", "steps there"),
        (("--prompt=a", "--config.moe.gate.name=smear", "--config.moe.allow_future_leak=True"),
         "Smear", "lory"),
        (("--prompt=a", "--config.data.tokenizer=none.json"), "none.json"),
    ):  # fmt: skip
        runs.refused(["generate", f"--workdir={workdir}", *flags], *parts)


def test_a_folder_without_a_language_model_is_refused(workdir, folder):
    runs.refused(["generate", f"--workdir={folder}/none", "--prompt=a"], "none/config.json")
    bare = folder / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((workdir / "config.json").read_bytes())
    runs.refused(["generate", f"--workdir={bare}", "--prompt=a"], "checkpoint")


@pytest.mark.slow
def test_a_run_of_another_task_is_refused(folder):
    ended = runs.call(
        ["train", "--config=configs/vit.py:size=debug", f"--workdir={folder}/vit",
         "--config.train.steps=1"]
    )  # fmt: skip
    assert ended.status == 0, ended.err
    runs.refused(["generate", f"--workdir={folder}/vit", "--prompt=a"], "task.name=images")

"""lm-evaluation-harness on tasks of local files, against one forward pass per sequence."""

import json
import math
import re
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="needs the extra 'eval' (lm_eval)")

from lm_eval.api.instance import Instance

from moejax.config import load
from moejax.contrib.harness.model import HarnessModel
from moejax.data.tokenizers.byte import ByteTokenizer
from moejax.errors import UserError
from moejax.tasks.language.task import LanguageModel
from moejax.train.evaluate import open_run
from moejax.types import Context
from tests.environment import of_a_user
from tests.train import runs

pytestmark = pytest.mark.slow

L = 24
QUESTIONS = [
    {"question": "the gate", "choices": [" router", " expert", " a"], "answer": 1},
    {"question": "load a token to the expert router", "choices": [" gate", " load"], "answer": 0},
    {"question": "", "choices": ["token", "tö"], "answer": 0},
]
PASSAGES = [{"text": "a router to the gate, über alles"}, {"text": "load the token " * 5}]
STORIES = [{"start": "the gate", "end": "a"}, {"start": "load the token " * 3, "end": "b"}]
TASKS = {
    "choice": """
task: choice
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: answer
doc_to_choice: choices
target_delimiter: ""
metric_list: [{metric: acc}]
""",
    "rolling": """
task: rolling
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}, {metric: byte_perplexity}]
""",
    "story": """
task: story
output_type: generate_until
doc_to_text: "{{start}}"
doc_to_target: "{{end}}"
generation_kwargs: {until: ["e"], max_gen_toks: 7}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run on bytes, trained until its predictions are not all alike."""
    folder = tmp_path_factory.mktemp("harness")
    changes = {
        "moe__gate__name": "top_k", "moe__losses__load": 0.0, "train__steps": 30,
        "train__seq_len": L, "mesh__expert": 1, "optim__learning_rate": 0.03,
        "train__checkpoint_every": 30, "train__eval_every": 30, "optim__warmup_steps": 2,
    }  # fmt: skip
    argv = runs.command(folder / "run", runs.write_text(folder / "text", 300), **changes)
    ended = runs.call(argv)
    assert ended.status == 0, ended.err
    return folder / "run"


def harness(workdir, folder, data, *arguments):
    """The command line on the examples of each task: its samples, by task, and its results."""
    for name, rows in data.items():
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        files = {"data_files": {"test": str(file)}}
        head = f"dataset_path: json\ndataset_kwargs: {json.dumps(files)}\ntest_split: test\n"
        (folder / f"{name}.yaml").write_text(head + TASKS[name])
    model = ",".join([f"workdir={workdir}", *arguments])
    words = ["--model=moejax", f"--model_args={model}", f"--tasks={','.join(data)}"]
    words += [f"--include_path={folder}", f"--output_path={folder / 'out'}", "--log_samples"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    ended = subprocess.run(
        [sys.executable, "-m", "moejax.contrib.harness", "run", *words],
        cwd=runs.ROOT, env={**of_a_user(), **offline}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    found: dict[str, list] = {}
    for name in data:
        (file,) = (folder / "out").rglob(f"samples_{name}_*.jsonl")
        lines = map(json.loads, file.read_text().splitlines())
        found[name] = sorted(lines, key=lambda row: row["doc_id"])
    (file,) = (folder / "out").rglob("results_*.json")
    return found, json.loads(file.read_text())["results"]


class Plain:
    """Log-probabilities of the next byte after some bytes, by one forward pass without padding."""

    def __init__(self, workdir):
        with open_run(load(str(workdir / "config.json")).config, str(workdir), None) as opened:
            self.task, self.state = opened.run.task, opened.state

    def after(self, tokens):
        task, state = self.task, self.state
        assert isinstance(task, LanguageModel)
        token_BL = jnp.asarray([list(tokens)], jnp.int32)
        context = Context.of(*token_BL.shape, token_BL=token_BL)
        logits_BLV, _ = task.built(state.params)(token_BL, context, state.gate_state, False)
        return np.asarray(jax.nn.log_softmax(logits_BLV[0]), np.float64)

    def greedy(self, context, count, window=L):
        """The ``count`` likeliest next bytes, one after another."""
        tokens = list(context.encode())
        for _ in range(count):
            tokens.append(int(self.after(tokens[-window:])[-1].argmax()))
        return bytes(tokens[-count:]).decode()

    def pair(self, context, continuation):
        """Log-likelihood and greediness."""
        context, continuation = list(context.encode()) or [0], list(continuation.encode())
        whole = (context + continuation)[-L - 1 :]
        log_p = self.after(whole[:-1])[-len(continuation) :]
        total = sum(log_p[i, token] for i, token in enumerate(continuation))
        return total, all(log_p[i].argmax() == token for i, token in enumerate(continuation))


def test_choices_and_passages_have_the_log_likelihoods_of_plain_passes(workdir, tmp_path):
    plain = Plain(workdir)
    likely = plain.greedy("the gate", 3)
    questions = [*QUESTIONS, {"question": "the gate", "choices": ["q", likely], "answer": 1}]
    data = {"choice": questions, "rolling": PASSAGES}
    samples, results = harness(workdir, tmp_path, data, "batch_size=3")
    right, greedy = 0, set[bool]()
    for row, question in zip(samples["choice"], questions, strict=True):
        wanted = [plain.pair(question["question"], choice) for choice in question["choices"]]
        for resps, (total, is_greedy) in zip(row["resps"], wanted, strict=True):
            got = resps[0]
            assert float(got[0]) == pytest.approx(total, rel=1e-5)
            assert str(got[1]) == str(is_greedy)
            greedy.add(is_greedy)
        best = max(range(len(wanted)), key=lambda i: wanted[i][0])
        right += best == question["answer"]
    assert results["choice"]["acc,none"] == pytest.approx(right / len(questions))
    assert greedy == {True, False}
    nats, size = 0.0, 0
    for row, passage in zip(samples["rolling"], PASSAGES, strict=True):
        tokens, total = list(passage["text"].encode()), 0.0
        # Windows of L inputs, one after another; the last one reaches back.
        for begin in range(0, len(tokens), L):
            end = min(begin + L, len(tokens))
            log_p = plain.after([0, *tokens][max(end - L, 0) : end])[begin - end :]
            total += sum(log_p[i, token] for i, token in enumerate(tokens[begin:end]))
        ((got,),) = row["resps"]
        assert float(got) == pytest.approx(total, rel=1e-5)
        nats, size = nats - total, size + len(tokens)
    bits = nats / size / math.log(2)
    assert results["rolling"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-5)


def test_a_text_begins_with_the_opening_of_its_tokenizer(workdir):
    class Opening(ByteTokenizer):
        opening = (7,)

    model: Any = HarnessModel.create_from_arg_string(f"workdir={workdir}")
    plain = Plain(workdir)
    model._tokenizer = Opening()
    pairs = [("the gate", " router"), ("", "token")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    for pair, (got, _) in zip(pairs, model.loglikelihood(requests), strict=True):
        context, continuation = map(str.encode, pair)
        log_p = plain.after([7, *context, *continuation][:-1])[-len(continuation) :]
        total = sum(log_p[i, token] for i, token in enumerate(continuation))
        assert got == pytest.approx(total, rel=1e-5)
    assert model._prompt("ab", 8).tolist() == [7, *b"ab"]
    assert model._prompt("ab", 1).tolist() == [*b"b"] and model._prompt("", 8).tolist() == [7]
    (got,) = model.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("token",), 0)])
    log_p = plain.after([7, *b"toke"])
    assert got == pytest.approx(sum(log_p[i, x] for i, x in enumerate(b"token")), rel=1e-5)


@pytest.mark.parametrize("size", [1, 3])
def test_generated_text_is_the_greedy_continuation_up_to_a_stop(workdir, tmp_path, size):
    samples, _ = harness(workdir, tmp_path, {"story": STORIES}, f"batch_size={size}")
    plain, stopped = Plain(workdir), []
    for row, story in zip(samples["story"], STORIES, strict=True):
        # Of a context that leaves no room for 7 tokens, the beginning is cut off.
        text = plain.greedy(story["start"][7 - L :], 7, window=10**6)
        assert row["resps"] == [[text.split("e")[0]]]
        stopped.append("e" in text)
    assert any(stopped)


MISTAKES = {
    "step=1": "--model_args: workdir=DIR must name the run",
    "workdir={run},steps=3": "--model_args: steps=3 is unknown; use workdir",
    "workdir={run},max_length=1": "max_length=1 must be a number of tokens, at least 2",
    "workdir={run},batch_size=-2": "train.batch_size",
}


@pytest.mark.parametrize("arguments", MISTAKES)
def test_a_mistake_in_the_arguments_is_one_line(workdir, arguments):
    given = arguments.format(run=workdir)
    with pytest.raises(UserError, match=re.escape(MISTAKES[arguments])) as raised:
        HarnessModel.create_from_arg_string(given, {"batch_size": 1, "device": "cuda:0"})
    assert "\n" not in str(raised.value)

"""`moejax eval --text`: the loss of a text file, against a loop over its tokens."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from moejax.config import load, to_dict
from moejax.data.tokenizers.bpe import train_bpe
from moejax.tasks.language.task import LanguageModel
from moejax.train.evaluate import open_run
from moejax.train.perplexity import Window, windows
from moejax.types import Context
from tests.train import runs

L = 8
TEXT = "gäte α router → expert token; load a the to! " * 2
PLAIN = {
    "moe__gate__name": "top_k", "moe__losses__load": 0.0, "train__steps": 2, "train__seq_len": L,
    "mesh__expert": 1, "optim__learning_rate": 0.05,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs "bytes" and, once asked for, "bpe", beside text.txt and tokenizer.json."""
    path = tmp_path_factory.mktemp("perplexity")
    runs.write_text(path / "data")
    (path / "text.txt").write_text(TEXT, encoding="utf-8")
    train(path, "bytes")
    return path


@pytest.fixture(scope="module")
def bpe(folder):
    train_bpe(str(folder / "data"), 290, str(folder / "tokenizer.json"), eval_fraction=0.2)
    return train(folder, "bpe", data__tokenizer=folder / "tokenizer.json")


def train(folder, name, **changes):
    argv = runs.command(folder / name, folder / "data", **{**PLAIN, **changes})
    ended = runs.call(argv)
    assert ended.status == 0, ended.err
    return folder / name


def measured(workdir, text, *flags):
    ended = runs.call(["eval", f"--workdir={workdir}", f"--text={text}", "--json", *flags])
    assert ended.status == 0, ended.err
    return json.loads(ended.out)


def by_hand(workdir, token_N, window, stride, before=()):
    """Nats of each token, each from a forward pass over nothing but the inputs it is predicted
    from: those from the begin of the first window that reaches it. ``before``: the inputs before
    the text, or none for the separator."""
    with open_run(load(str(workdir / "config.json")).config, str(workdir), None) as opened:
        run, state, _ = opened
        task = run.task
        assert isinstance(task, LanguageModel)

        @jax.jit
        def nats(input_L, count, target):
            valid_BL = (jnp.arange(window) < count)[None]
            context = Context.of(1, window, token_BL=input_L[None], valid_BL=valid_BL)
            model = task.built(state.params)
            logits_BLV, _ = model(input_L[None], context, state.gate_state, False)
            return -jax.nn.log_softmax(logits_BLV[0, count - 1])[target]

        before = list(before) or [runs.text_of(run).corpus.separator]
        input_N, found = [*before, *token_N], []
        for n, target in enumerate(token_N, len(before) - 1):
            begin = max(0, math.ceil((n + 1 - window) / stride)) * stride
            seen = input_N[begin : n + 1]
            assert len(seen) > window - stride or begin == 0
            padded = jnp.asarray([*seen, *[0] * (window - len(seen))], jnp.int32)
            found.append(float(nats(padded, len(seen), int(target))))
    return np.array(found)


def test_each_target_is_in_one_window_and_has_the_promised_inputs():
    assert list(windows(5, 8, 4)) == [Window(0, 5, 0)]
    assert list(windows(11, 4, 3)) == [
        Window(0, 4, 0), Window(3, 7, 4), Window(6, 10, 7), Window(9, 11, 10),
    ]  # fmt: skip
    for tokens in range(1, 30):
        for window in range(1, 8):
            for stride in range(1, window + 1):
                found = list(windows(tokens, window, stride))
                scored = [n for part in found for n in range(part.new, part.end)]
                assert scored == list(range(tokens))
                for part in found[1:]:
                    assert part.new - part.begin >= window - stride
                assert all(0 < part.end - part.begin <= window for part in found)


@pytest.mark.parametrize(
    "window,stride", [(L, 3), pytest.param(11, 1, marks=pytest.mark.slow)], ids=str
)
def test_the_loss_of_a_text_is_that_of_a_loop_over_its_tokens(folder, window, stride):
    data = TEXT.encode("utf-8")
    row = measured(
        folder / "bytes", folder / "text.txt", f"--window={window}", f"--stride={stride}"
    )
    wanted = by_hand(folder / "bytes", list(data), window, stride)
    assert (row["tokens"], row["bytes"], row["step"]) == (len(data), len(data), 2)
    assert (row["window"], row["stride"], row["leak"]) == (window, stride, "")
    assert row["loss"] == pytest.approx(wanted.mean(), rel=1e-5)
    assert row["perplexity"] == pytest.approx(math.exp(wanted.mean()), rel=1e-4)
    assert row["bits_per_byte"] == pytest.approx(wanted.sum() / math.log(2) / len(data), rel=1e-5)


@pytest.mark.slow
def test_bits_per_byte_of_a_vocabulary_are_over_the_bytes_of_the_file(folder, bpe):
    """Tokens are fewer than bytes, and characters too."""
    row = measured(bpe, folder / "text.txt")
    token_N = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode(TEXT).ids
    assert row["tokens"] == len(token_N) < len(TEXT) < row["bytes"] == len(TEXT.encode())
    wanted = by_hand(bpe, token_N, L, L // 2)
    assert row["loss"] == pytest.approx(wanted.mean(), rel=1e-5)
    assert row["bits_per_byte"] == pytest.approx(
        wanted.sum() / math.log(2) / row["bytes"], rel=1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize("opening", [["<s>"], ["<s>", "<sop>"]], ids=str)
def test_a_text_begins_with_the_opening_that_documents_have(folder, bpe, tmp_path, opening):
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    library.add_special_tokens(opening)
    special = [(token, library.token_to_id(token)) for token in opening]
    library.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{' '.join(opening)} $A", special_tokens=special
    )
    library.save(str(tmp_path / "tokenizer.json"))
    token_N = library.encode(TEXT, add_special_tokens=False).ids
    before = {"auto": [token for _, token in special], "none": []}  # none: the separator
    for bos in before if len(opening) == 1 else ("auto",):
        changes = {"data__tokenizer": tmp_path / "tokenizer.json", "data__bos": bos}
        workdir = train(folder, f"{bos}{len(opening)}", **changes)
        row = measured(workdir, folder / "text.txt")
        assert row["tokens"] == len(token_N) and row["bytes"] == len(TEXT.encode())
        wanted = by_hand(workdir, token_N, L, L // 2, before[bos])
        assert row["loss"] == pytest.approx(wanted.mean(), rel=1e-5)


MESHES = [
    ["--config.train.batch_size=3"],
    ["--config.mesh.expert=4"],
    ["--config.mesh.data=2", "--config.mesh.tensor=2"],
]


@pytest.mark.slow
@pytest.mark.parametrize("flags", MESHES, ids=str)
def test_no_token_is_counted_differently_on_another_mesh_or_in_other_batches(folder, flags):
    wanted = measured(folder / "bytes", folder / "text.txt")
    got = measured(folder / "bytes", folder / "text.txt", *flags)
    assert got["tokens"] == wanted["tokens"] and got["bytes"] == wanted["bytes"]
    assert got["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
    assert got["accuracy"] == wanted["accuracy"]


def test_a_text_shorter_than_a_window_is_scored_from_its_first_token(folder, tmp_path):
    (tmp_path / "short.txt").write_text("to")
    row = measured(folder / "bytes", tmp_path / "short.txt")
    assert row["tokens"] == 2
    assert row["loss"] == pytest.approx(by_hand(folder / "bytes", b"to", L, 4).mean(), rel=1e-5)


def test_on_request_a_summary_is_printed(folder):
    argv = ["eval", f"--workdir={folder / 'bytes'}", f"--text={folder / 'text.txt'}", "--summary"]
    said = runs.call(argv).out
    assert f"{len(TEXT.encode())} bytes" in said and "bits/byte" in said and "perplexity" in said


MISTAKES = {
    "--text=missing.txt": ["--text: cannot read 'missing.txt'", "No such file"],
    "--text={data}": ["--text: ", "is a folder; name one file"],
    "--text={empty}": ["--text: ", "empty.txt' holds no text"],
    "--text={text} --stride=9": ["--stride=9 must be from 1 to the window of 8 tokens"],
    "--text={text} --window=3 --stride=4": ["--stride=4", "window of 3 tokens"],
    "--text={text} --window=0": ["--window=0 must be a number of tokens"],
    "--stride=4": ["--stride=4 is about a text file; name it with --text=FILE"],
    "--text={text} --measure-leak": ["--measure-leak=8 is about the run's held-out text"],
    "--text={text} --tokenizer=no.json": ["cannot read 'no.json'"],
    "--text=": ["--text= must name a file"],
}  # fmt: skip


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_one_line(folder, words):
    (folder / "empty.txt").touch()
    places = {name: folder / f"{name}.txt" for name in ("text", "empty")}
    flags = words.format(**places, data=folder / "data").split()
    runs.refused(["eval", f"--workdir={folder / 'bytes'}", *flags], *MISTAKES[words])


@pytest.mark.slow
def test_a_vocabulary_refuses_bytes_that_are_not_utf8(folder, bpe, tmp_path):
    (tmp_path / "latin.txt").write_bytes("gäte".encode("latin-1"))
    argv = ["eval", f"--workdir={bpe}", f"--text={tmp_path / 'latin.txt'}"]
    runs.refused(argv, "--text: ", "latin.txt' is not UTF-8")
    assert measured(folder / "bytes", tmp_path / "latin.txt")["bytes"] == 4


@pytest.mark.slow
def test_a_run_on_shards_needs_to_be_told_its_tokenizer(folder, bpe, tmp_path):
    words = [f"--path={folder / 'data'}", f"--out={tmp_path / 'shards'}", "--eval-fraction=0.2"]
    made = runs.call(["data", "prepare", *words, f"--tokenizer={folder / 'tokenizer.json'}"])
    assert made.status == 0, made.err
    workdir = train(folder, "shards", data__path=tmp_path / "shards")
    argv = ["eval", f"--workdir={workdir}", f"--text={folder / 'text.txt'}"]
    runs.refused(argv, "holds tokens and no tokenizer", "--tokenizer=FILE")
    named = measured(workdir, folder / "text.txt", f"--tokenizer={folder / 'tokenizer.json'}")
    assert named["loss"] == pytest.approx(measured(bpe, folder / "text.txt")["loss"], rel=1e-5)


@pytest.mark.slow
def test_a_task_without_text_is_refused(tmp_path):
    config = load(f"{runs.ROOT}/configs/vit.py").config
    (tmp_path / "config.json").write_text(json.dumps({"config": to_dict(config)}))
    runs.refused(["eval", f"--workdir={tmp_path}", "--text=x"], "--text=x: task.name=", "predicts")

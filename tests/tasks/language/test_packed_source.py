"""A text as rows of whole documents: numbers of an evaluation, labels, and what a run says."""

import dataclasses
import math

import numpy as np
import pytest

from moejax.data.baselines import fit_ngrams
from moejax.data.domains import label_bytes
from moejax.data.load import load_corpus
from moejax.data.prepare import prepare
from moejax.data.tokenizers.bpe import train_bpe
from moejax.errors import UserError
from moejax.record.experts import ABSENT, Choices
from moejax.tasks.language.source import TextSource

SEQ_LEN = 24
WAYS = ["greedy", "best_fit"]
CODE = b'"""A docstring."""\n\nx = 1  # a comment\n\n\ndef f():\n    return "text"\n'


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Python files of one to six statements, some longer than a row and some shorter."""
    root = tmp_path_factory.mktemp("packed")
    rng = np.random.default_rng(0)
    for side, count in (("train", 40), ("val", 15)):
        (root / "text" / side).mkdir(parents=True)
        for i in range(count):
            lines = [f"{side}_{i} = {i}", *(f"# {rng.integers(99)}" for _ in range(i % 5))]
            (root / "text" / side / f"{i:02}.py").write_text("\n".join(lines))
    (root / "text" / "val" / "long.py").write_bytes(CODE)
    train_bpe(str(root / "text"), 300, str(root / "bpe.json"))
    return root


def source_of(root, packing, tokenizer="", rows=10_000, seq_len=SEQ_LEN):
    corpus = load_corpus(str(root / "text"), tokenizer and str(root / tokenizer))
    return TextSource(corpus, seq_len, 4, 0, rows, packing=packing)


def spans(batches):
    """The tokens of each piece: its inputs, and the target of the last."""
    for batch in batches:
        for row, (segment, valid) in enumerate(zip(batch["segment"], batch["valid"], strict=True)):
            for number in np.unique(segment[valid]):
                at = np.flatnonzero((segment == number) & valid)
                yield batch["tokens"][row, at[0] : at[-1] + 2]


@pytest.mark.parametrize("packing", WAYS)
def test_batches_have_the_shapes_that_are_promised(root, packing):
    source = source_of(root, packing)
    for batch in (source.train_batch(3), *source.eval_batches(4, 6)):
        shapes = source.shapes(4)
        assert batch.keys() == shapes.keys() >= {"segment"}
        for name, values in batch.items():
            assert (values.shape, values.dtype) == (shapes[name].shape, shapes[name].dtype)


@pytest.mark.parametrize("packing", WAYS)
def test_an_epoch_reads_every_row_once_in_an_order_of_step_and_seed(root, packing):
    source = source_of(root, packing)
    rows = len(source.train_rows)
    seen = [source.train_batch(step)["tokens"] for step in range(rows)]  # four epochs
    epochs = np.concatenate(seen).reshape(4, rows, -1)
    for epoch in epochs:
        assert len(np.unique(epoch, axis=0)) == rows
    again = source_of(root, packing)
    np.testing.assert_array_equal(again.train_batch(5)["tokens"], seen[5])
    other = dataclasses.replace(source, seed=1)
    assert not np.array_equal(other.train_batch(5)["tokens"], seen[5])


@pytest.mark.parametrize("rows", [1, 3, 10_000])
@pytest.mark.parametrize("tokenizer", ["", "bpe.json"])
@pytest.mark.parametrize("packing", WAYS)
def test_bits_per_byte_divide_by_the_bytes_of_the_evaluated_targets(root, packing, tokenizer, rows):
    source = source_of(root, packing, tokenizer, rows)
    assert source.corpus.origin is not None
    size_V = source.corpus.origin.tokenizer.token_bytes()
    targets = np.concatenate([span[1:] for span in spans(source.eval_batches(4, rows))])
    seen = source.evaluated
    assert (seen["tokens"], seen["bytes"]) == (targets.size, size_V[targets].sum())
    bits = 2.5 * targets.size / math.log(2) / size_V[targets].sum()
    assert source.eval_extras(2.5) == {"bits_per_byte": pytest.approx(bits, rel=1e-12)}
    if rows == 10_000:  # all held-out documents, each with a separator of one byte
        files = list((root / "text" / "val").iterdir())
        assert seen["bytes"] == sum(file.stat().st_size for file in files) + len(files)


@pytest.mark.parametrize("packing", WAYS)
def test_the_token_that_a_tokenizer_puts_before_a_text_begins_every_document(root, packing):
    import tokenizers

    made = tokenizers.Tokenizer.from_file(str(root / "bpe.json"))
    made.add_special_tokens(["<s>"])
    bos = made.token_to_id("<s>")
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    made.save(str(root / "bos.json"))
    source = source_of(root, packing, "bos.json")
    assert source.corpus.opening == (bos,) and source.corpus.heldout_start_D is not None
    found = list(spans(source.eval_batches(4, 10_000)))
    documents = len(source.corpus.heldout_start_D)
    assert sum(span[0] == bos for span in found) == documents == 16
    assert sum((span[1:] == source.corpus.separator).sum() for span in found) == documents
    assert not any((span[1:] == bos).any() for span in found)
    files = list((root / "text" / "val").iterdir())
    size = sum(file.stat().st_size for file in files) + len(files)
    assert source.evaluated["bytes"] == size  # a separator is a byte, an opening none


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize("packing", WAYS)
def test_baselines_predict_each_target_from_its_own_document(root, packing, opened):
    source = source_of(root, packing)
    if opened:  # every document begins with its first byte
        source = dataclasses.replace(
            source, corpus=dataclasses.replace(source.corpus, opening=(1,))
        )
    model = fit_ngrams(np.asarray(source.corpus.train_N), 256, 2)
    found = [model.log_probs(span) for span in spans(source.eval_batches(4, 10_000))]
    for order, name in ((1, "bigram"), (2, "trigram")):
        expected = -np.mean(np.concatenate([x[order][1:] for x in found]))
        assert source.baselines()[name] == pytest.approx(expected, rel=1e-12)  # float64 sums


@pytest.mark.parametrize("packing", WAYS)
def test_the_probe_labels_each_input_by_its_own_file(root, packing):
    source = source_of(root, packing)
    (batch,) = source.eval_batches(99, 99)
    real = batch["valid"].any(axis=1)
    arrays = source.probe_arrays({name: x[real] for name, x in batch.items()}, 99)
    label_BL = arrays["label"]
    assert label_BL.dtype == np.uint8 and label_BL.shape == arrays["token"].shape
    row, at = np.argwhere(arrays["token"] == ord("A"))[0]  # the only one is in long.py
    begin = at - CODE.index(b"A")
    assert begin in (0, 1)  # a full row, behind the separator if it begins the document
    wanted = label_bytes(CODE)[: SEQ_LEN - begin]
    assert len(np.unique(wanted)) > 1
    np.testing.assert_array_equal(label_BL[row, begin:], wanted)
    is_separator = (arrays["token"] == 0) & arrays["valid"]
    assert is_separator.any() and not label_BL[is_separator].any()


def test_experts_that_were_recorded_for_packed_rows_are_found(root):
    source = source_of(root, "best_fit")
    batches = [*source.eval_batches(4, 99), *map(source.train_batch, range(3))]
    token_NL = np.unique(np.concatenate([x["tokens"][:, :-1] for x in batches]), axis=0)
    expert_NLMK = np.full((len(token_NL), SEQ_LEN, 1, 2), ABSENT, np.int32)
    expert_NLMK[...] = np.arange(len(token_NL))[:, None, None, None]
    given = dataclasses.replace(source, choices=Choices(token_NL, expert_NLMK))
    given.check_rows(3)
    batch = given.train_batch(2)
    assert given.shapes(4)["experts"].shape == batch["experts"].shape
    np.testing.assert_array_equal(token_NL[batch["experts"][:, 0, 0, 0]], batch["tokens"][:, :-1])
    with pytest.raises(UserError, match="moe.replay: row "):
        dataclasses.replace(given, packing="none").check_rows(3)


def test_the_start_of_a_run_says_how_full_the_rows_are(root):
    source = source_of(root, "best_fit")
    rows = source.train_rows
    valid = np.concatenate(
        [rows.read(np.array([i]), np.array([i]))["valid"] for i in range(len(rows))]
    )
    sizes = [file.stat().st_size for file in (root / "text" / "train").iterdir()]
    cut = sum(size + 1 > SEQ_LEN for size in sizes)
    padding = 1 - valid.mean()
    assert 0 < cut < 40 and padding > 0
    assert source.facts()["packing"] == (
        f"best_fit: {len(rows)} rows, {padding:.1%} of the slots are padding, {cut} documents "
        "longer than a row are cut"
    )
    assert source.about()["packing"]["train"] == {
        "rows": len(rows), "padding": pytest.approx(padding, abs=1e-12), "cut": cut,
    }  # fmt: skip
    windows = source_of(root, "none")
    assert "packing" not in windows.facts() and "packing" not in windows.about()


@pytest.mark.parametrize("packing", WAYS)
def test_prepared_shards_make_the_same_rows(root, tmp_path, packing):
    prepare(str(root / "text"), "", str(tmp_path / "shards"))
    mapped = dataclasses.replace(
        source_of(root, packing), corpus=load_corpus(str(tmp_path / "shards"))
    )
    made = source_of(root, packing)
    for a, b in ((mapped.train_batch(2), made.train_batch(2)),
                 (mapped.eval_batches(4, 8)[1], made.eval_batches(4, 8)[1])):  # fmt: skip
        for name, values in a.items():
            np.testing.assert_array_equal(values, b[name])
    assert mapped.evaluated == made.evaluated
    old = dataclasses.replace(mapped.corpus, train_start_D=None)
    with pytest.raises(UserError, match=f"data.packing={packing}: .* is not known; prepare "):
        dataclasses.replace(mapped, corpus=old).train_batch(0)

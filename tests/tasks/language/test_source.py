"""Ratios of an evaluation: numerator and denominator cover the same targets."""

import math

import numpy as np
import pytest

from moejax.data.baselines import fit_ngrams
from moejax.data.load import load_corpus
from moejax.data.tokenizers.bpe import train_bpe
from moejax.tasks.language.remarks import FEW
from moejax.tasks.language.source import TextSource


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A text whose tokens stand for many bytes in one file and for one in the next."""
    root = tmp_path_factory.mktemp("mixed")
    rng = np.random.default_rng(0)
    (root / "text" / "train").mkdir(parents=True)
    (root / "text" / "val").mkdir()
    for i in range(6):
        words = " ".join(
            ["expert", "router", "token", "balance"][j] for j in rng.integers(4, size=300)
        )
        noise = "".join(chr(c) for c in rng.integers(0x4E00, 0x4F00, 600))
        for side in ("train", "val"):
            (root / "text" / side / f"{i}.txt").write_text(
                (noise if i % 2 else words) + ("!" if side == "train" else "")
            )
    train_bpe(str(root / "text"), 300, str(root / "bpe.json"))
    return root


@pytest.mark.parametrize("rows", [1, 3, 7, 10_000])
@pytest.mark.parametrize("with_bpe", [False, True])
def test_bits_per_byte_divide_by_the_bytes_of_the_evaluated_targets(mixed, with_bpe, rows):
    corpus = load_corpus(str(mixed / "text"), str(mixed / "bpe.json") if with_bpe else "")
    source = TextSource(corpus, 16, 4, 0, rows)
    assert corpus.origin is not None
    sizes = corpus.origin.tokenizer.token_bytes()
    batches = source.eval_batches(4, rows)
    targets = np.concatenate([b["tokens"][:, 1:][b["valid"]] for b in batches])
    seen = source.evaluated
    assert (seen["tokens"], seen["bytes"]) == (targets.size, sizes[targets].sum())
    nats = 2.5 * targets.size
    bits = nats / math.log(2) / sizes[targets].sum()
    assert source.eval_extras(2.5) == {"bits_per_byte": pytest.approx(bits, rel=1e-12)}
    if with_bpe and rows == 3:  # the ratio of all held-out text is another one
        whole = sizes[corpus.heldout_N].sum() / len(corpus.heldout_N)
        assert abs(whole / (seen["bytes"] / seen["tokens"]) - 1) > 0.05


@pytest.mark.parametrize("rows", [1, 5])
def test_baselines_are_computed_on_the_evaluated_rows(mixed, rows):
    corpus = load_corpus(str(mixed / "text"))
    source = TextSource(corpus, 16, 4, 0, rows)
    model = fit_ngrams(corpus.train_N, 256, 2)
    seen = [
        b["tokens"][i]
        for b in source.eval_batches(4, rows)
        for i in np.flatnonzero(b["valid"][:, 0])
    ]
    assert len(seen) == rows
    for order, name in ((1, "bigram"), (2, "trigram")):
        expected = -np.mean([model.log_probs(row)[order][1:] for row in seen])
        assert source.baselines()[name] == pytest.approx(expected, rel=1e-12)
    assert source.baselines() != TextSource(corpus, 16, 4, 0, 2 * rows).baselines()


def test_the_start_of_a_run_describes_the_held_out_text_and_warns_if_it_is_small(mixed):
    corpus = load_corpus(str(mixed / "text"), str(mixed / "bpe.json"))
    source = TextSource(corpus, 16, 4, 0, 3)
    said = source.facts()
    assert said["held out"] == "what is called 'val': 6 documents beside 6 to train on"
    assert said["evaluation"].startswith(f"3 rows, 48 tokens, {source.evaluated['bytes']} bytes of")
    assert said["overlap"].startswith("100.0% of held-out bytes are in a 50-byte window")
    assert said["separator"] == "<|doc|> between documents"
    few, copies = source.warnings()
    assert f"only {len(corpus.heldout_N)} tokens are held out" in few and str(FEW) in few
    assert "100% of held-out bytes occur in the training text" in copies
    about = source.about()
    assert about["evaluated"] == source.evaluated
    assert about["text"]["overlap"]["share"] == 1.0
    assert about["text"]["separator"] == "<|doc|>"

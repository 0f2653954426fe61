"""Bits per byte of a model that is known: all tokens are equally likely.

It spends log2(V) bits on every token, so that its bits per byte are log2(V) times the tokens and
divided by the bytes, both counted by the tokenizers' own libraries.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
import tokenizers

from moejax.data.load import load_corpus
from moejax.data.prepare import prepare
from moejax.data.tokenizers.bpe import train_bpe
from moejax.hf.fields import config_of
from moejax.tasks.language.source import TextSource
from moejax.tasks.language.task import LanguageModel, build
from tests.data.test_sentencepiece import WORDS, trained

HELD_OUT = ("Zum router — 日本語 🙂\n  each\ttoken the", " gates balance naïve\r\n", "x")
ENDS, BEGINS, SPACE = "</s>", "<s>", "\u2581"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Texts with three held-out documents, and a tokenizer of each kind."""
    root, rng = tmp_path_factory.mktemp("kinds"), np.random.default_rng(0)
    for side in ("train", "val"):
        (root / "text" / side).mkdir(parents=True)
    for i in range(4):
        (root / "text" / "train" / f"{i}.txt").write_text(" ".join(rng.choice(WORDS, 200)))
    for i, text in enumerate(HELD_OUT):
        (root / "text" / "val" / f"{i}.txt").write_bytes(text.encode())
    train_bpe(str(root / "text"), 300, str(root / "bpe.json"))
    for model_type in ("unigram", "bpe"):
        trained(root / f"{model_type}.model", model_type=model_type)
    trained(root / "no_bos.model", bos_id=-1)
    unigram(root / "unigram.json")
    unigram(root / "opens.json", opens=True)
    return root


def unigram(path, opens=False) -> None:
    """A Unigram tokenizer.json as converted SentencePiece models have it."""
    library = sentencepiece.SentencePieceProcessor(str(path.parent / "unigram.model"))
    ids = range(library.get_piece_size())
    scores = [(library.id_to_piece(i), library.get_score(i)) for i in ids]
    model = tokenizers.models.Unigram(scores, unk_id=library.unk_id(), byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend(SPACE), tokenizers.normalizers.Replace(" ", SPACE)]
    )
    tokenizer.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace(SPACE, " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens([ENDS, BEGINS])
    if opens:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{BEGINS} $A", special_tokens=[(BEGINS, library.bos_id())]
        )
    tokenizer.save(str(path))


def counted(path) -> tuple[int, int, int, bool]:
    """Vocabulary, tokens of the held-out documents, bytes of the first one, and whether documents
    have an opening; by the libraries."""
    if not path:
        return 256, sum(len(text.encode()) for text in HELD_OUT), 1, False
    if path.endswith(".model"):
        library = sentencepiece.SentencePieceProcessor(path)
        ids = library.encode(list(HELD_OUT))
        first = library.encode(HELD_OUT[0], return_type="proto").pieces[0].end
        return library.vocab_size(), sum(map(len, ids)), first, library.bos_id() >= 0
    library = tokenizers.Tokenizer.from_file(path)
    plain = [library.encode(text, add_special_tokens=False) for text in HELD_OUT]
    whole = [library.encode(text) for text in HELD_OUT]
    tokens, opens = sum(map(len, plain)), len(whole[0]) > len(plain[0])
    first = len(HELD_OUT[0][: plain[0].offsets[0][1]].encode())
    return library.get_vocab_size(), tokens, first, opens


KINDS = ["", "bpe.json", "unigram.json", "opens.json", "unigram.model", "bpe.model", "no_bos.model"]


@pytest.mark.parametrize("bos", ["auto", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_bits_per_byte_of_equally_likely_tokens(root, tmp_path, kind, bos):
    path = str(root / kind) if kind else ""
    vocab, tokens, first, opens = counted(path)
    opens = opens and bos == "auto"
    documents = len(HELD_OUT)
    # Each target is in one row of one token; the first token of all is no target.
    targets = tokens + (documents - 1) + documents * opens - 1
    size = sum(len(text.encode()) for text in HELD_OUT) + documents - 1 - (0 if opens else first)
    wanted = math.log2(vocab) * targets / size
    corpus = load_corpus(str(root / "text"), path, bos=bos)
    assert corpus.vocab_size == vocab and len(corpus.opening) == opens
    prepare(str(root / "text"), path, str(tmp_path / "shards"), bos=bos)
    shards = load_corpus(str(tmp_path / "shards"))
    assert (shards.fingerprint, shards.opening) == (corpus.fingerprint, corpus.opening)
    assert shards.facts == corpus.facts and corpus.facts.opening == BEGINS * opens
    for same in (corpus, shards):
        source = TextSource(same, 1, 4, 0, 10_000)
        assert source.evaluated["tokens"] == targets
        bits = source.eval_extras(math.log(vocab))["bits_per_byte"]
        assert bits == pytest.approx(wanted, rel=1e-12)


@pytest.mark.slow
def test_a_model_of_equally_likely_tokens_has_them_in_an_evaluation(root):
    """With embeddings of 0, which are the output's too, all logits are 0."""
    path = str(root / "unigram.model")
    vocab, tokens, _, _ = counted(path)
    config = config_of(
        {
            "data.path": str(root / "text"), "data.tokenizer": path, "train.seq_len": 1,
            "train.batch_size": 4, "train.eval_rows": 1000, "model.d_model": 8,
            "model.num_layers": 1, "model.num_heads": 1, "model.num_kv_heads": 1,
            "model.tie_embeddings": True,
        }
    )  # fmt: skip
    task, source = build(config)
    assert isinstance(task, LanguageModel)
    params = jax.tree.map(lambda x: x * 0, task.init(jax.random.key(0)))
    nats, count = 0.0, 0
    for rows in source.eval_batches(64, 1000):
        batch = jax.tree.map(jnp.asarray, rows)
        logits_BLV, _ = task.apply(params, {}, batch, jnp.int32(0), jax.random.key(0), train=False)
        nats_BL = np.asarray(task.token_losses(logits_BLV, batch))
        nats += float(nats_BL[batch["valid"]].sum())
        count += int(batch["valid"].sum())
    size = sum(len(text.encode()) for text in HELD_OUT) + len(HELD_OUT) - 1
    assert count == tokens + 2 * len(HELD_OUT) - 2
    bits = source.eval_extras(nats / count)["bits_per_byte"]
    assert bits == pytest.approx(math.log2(vocab) * count / size, rel=1e-6)

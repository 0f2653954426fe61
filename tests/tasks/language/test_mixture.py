"""Rows of several texts: their order, their held-out shares, and what is said about them."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moejax.config import apply_overrides, default
from moejax.contrib.openmoe.texts import all_texts
from moejax.data.prepare import prepare
from moejax.data.tokenizers.bpe import train_bpe
from moejax.data.tokenizers.byte import ByteTokenizer
from moejax.errors import UserError
from moejax.tasks.language.mixture import Mixture, open_mixture
from moejax.tasks.language.task import LanguageModel, build
from moejax.train.scoring import tokenizer_of

LENGTH, BATCH = 16, 8
LETTERS = {"web": b"abcdefgh", "code": b"uvwxyz"}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Texts whose letters tell them apart: 100 rows of one to train on, 25 of the other."""
    root = tmp_path_factory.mktemp("texts")
    rng = np.random.default_rng(0)
    for name, size in (("web", 100 * LENGTH + 1), ("code", 25 * LENGTH + 1)):
        for side, count in (("train", size), ("val", size // 4)):
            folder = root / name / side
            folder.mkdir(parents=True)
            letters = rng.choice(list(LETTERS[name]), count)
            (folder / "a.txt").write_bytes(bytes(letters.astype(np.uint8)))
    return root


def configured(root, weights=(0.7, 0.3), **fields):
    config = default()
    named = zip(("web", "code"), weights, strict=True)
    given = {
        "data.mixture": {name: (str(root / name), weight) for name, weight in named},
        "train.seq_len": LENGTH,
        "train.batch_size": BATCH,
        "train.steps": 10,
        "train.eval_rows": 10,
        **fields,
    }
    apply_overrides(config, [f"--config.{name}={value}" for name, value in given.items()])
    return config


def of_batch(batch):
    """The text of each row by its letters; None if it has both, or none."""
    names = []
    for row in batch["tokens"]:
        here = [n for n, name in enumerate(LETTERS) if set(row.tolist()) <= set(LETTERS[name])]
        names.append(here[0] if len(here) == 1 else None)
    return names


def test_the_source_of_a_row_is_the_text_that_it_is_from(texts):
    source = open_mixture(configured(texts))
    for batch in [source.train_batch(step) for step in range(20)]:
        assert batch["source"].tolist() == of_batch(batch)
        assert {name: (x.dtype, x.shape) for name, x in batch.items()} == {
            name: (x.dtype, x.shape) for name, x in source.shapes(BATCH).items()
        }
    for batch in source.eval_batches(4, 10):
        real = batch["valid"][:, 0]
        assert batch["source"][real].tolist() == np.array(of_batch(batch))[real].tolist()


def test_shares_of_training_rows_are_the_weights_and_every_row_of_a_text_is_read_once_an_epoch(
    texts,
):
    source = open_mixture(configured(texts, (3, 1)))
    batches = [source.train_batch(step) for step in range(25)]
    number_N = np.concatenate([b["source"] for b in batches])
    tokens_NL = np.concatenate([b["tokens"] for b in batches])
    assert np.bincount(number_N).tolist() == [150, 50]
    for number, (rows, member) in enumerate(zip((100, 25), source.members, strict=True)):
        stream = member.corpus.train_N
        windows = {stream[i * LENGTH : (i + 1) * LENGTH + 1].tobytes() for i in range(rows)}
        own = tokens_NL[number_N == number][:rows].astype(stream.dtype)
        assert {row.tobytes() for row in own} == windows
    # Two epochs of the smaller text, and another order in the second.
    small = tokens_NL[number_N == 1]
    assert sorted(map(bytes, small[:25])) == sorted(map(bytes, small[25:]))
    assert small[:25].tolist() != small[25:].tolist()
    assert [source.epochs[name] for name in ("web", "code")] == [0.6, 0.8]


def test_a_batch_is_a_function_of_seed_and_step_and_any_host_reads_its_rows_alone(texts):
    config = configured(texts)
    whole, other = open_mixture(config), open_mixture(config)
    for step in (7, 0, 123456):
        expected = whole.train_batch(step)
        for share in (slice(0, 3), slice(3, 8), slice(1, 8, 2)):
            part = other.train.batch(step, share)
            for name, values in part.items():
                assert np.array_equal(values, expected[name][share]), name
    seeded = open_mixture(configured(texts, **{"train.seed": 1})).train_batch(0)
    assert not np.array_equal(seeded["tokens"], whole.train_batch(0)["tokens"])


@pytest.mark.parametrize(
    ("weights", "rows", "counts"),
    [((0.7, 0.3), 10, [7, 3]), ((0.7, 0.3), 9, [6, 3]), ((999, 1), 10, [9, 1])],
)
def test_held_out_rows_are_in_the_shares_of_the_weights_and_at_least_one(
    texts, weights, rows, counts
):
    source = open_mixture(configured(texts, weights, **{"train.eval_rows": rows}))
    batches = source.eval_batches(4, rows)
    number_N = np.concatenate([b["source"][b["valid"].all(axis=1)] for b in batches])
    assert np.bincount(number_N).tolist() == counts
    assert source.evaluated == {
        "rows": rows, "tokens": rows * LENGTH, "bytes": rows * LENGTH
    }  # fmt: skip
    assert np.concatenate([b["row"] for b in batches])[:rows].tolist() == list(range(rows))
    # Each text's rows are those that it evaluates alone.
    for number, (count, member) in enumerate(zip(counts, source.members, strict=True)):
        mine = np.concatenate([b["tokens"][b["source"] == number] for b in batches])[:count]
        alone = member.eval_batches(count, count)[0]["tokens"]
        assert np.array_equal(mine, alone)


def test_baselines_are_means_over_the_same_rows(texts):
    source = open_mixture(configured(texts))
    alone = [member.baselines() for member in source.members]
    for name in ("bigram", "trigram"):
        expected = 0.7 * alone[0][name] + 0.3 * alone[1][name]
        assert source.baselines()[name] == pytest.approx(expected, rel=1e-12)


def test_the_start_of_a_run_states_shares_and_epochs_and_warns_above_four(texts):
    config = configured(texts, **{"train.steps": 60})
    source = open_mixture(config)
    said = source.facts()
    assert said["source web"].startswith("0.7 of the rows; 3.36 epochs of web in 60 steps")
    assert said["source code"].startswith("0.3 of the rows; 5.76 epochs of code in 60 steps")
    assert said["evaluation"].startswith("web: 7 rows, 112 tokens, 112 bytes of the 400")
    repeated = [line for line in source.warnings() if "is read" in line]
    assert len(repeated) == 1 and "'code' is read 5.76 times in train.steps=60" in repeated[0]
    about = source.about()["mixture"]
    assert about["code"]["epochs"] == pytest.approx(5.76) and about["code"]["share"] == 0.3
    assert about["code"]["evaluated"]["rows"] == 3
    assert not [line for line in open_mixture(configured(texts)).warnings() if "is read" in line]


def test_a_text_with_too_few_held_out_rows_is_reported(texts):
    source = open_mixture(configured(texts, (0.2, 0.8), **{"train.eval_rows": 20}))
    rows = sum(int(b["valid"].all(axis=1).sum()) for b in source.eval_batches(8, 20))
    assert rows == source.evaluated["rows"] == 4 + 6
    short = [line for line in source.warnings() if "fewer than its share" in line]
    assert len(short) == 1 and "'code' has 6 held-out rows" in short[0]
    assert "it counts 0.6 in the held-out loss" in short[0]


def test_the_fingerprint_depends_on_names_weights_and_texts(texts, tmp_path):
    def fingerprint(mixture):
        return open_mixture(configured(texts, **{"data.mixture": mixture})).fingerprint

    web, code = str(texts / "web"), str(texts / "code")
    base = fingerprint({"web": (web, 0.7), "code": (code, 0.3)})
    assert fingerprint({"web": (web, 7), "code": (code, 3)}) == base
    (tmp_path / "train").mkdir()
    (tmp_path / "val").mkdir()
    for side in ("train", "val"):
        data = (texts / "code" / side / "a.txt").read_bytes()
        (tmp_path / side / "a.txt").write_bytes(data)
    assert fingerprint({"web": (web, 0.7), "code": (str(tmp_path), 0.3)}) == base
    others = [
        {"web": (web, 0.6), "code": (code, 0.4)},
        {"web": (web, 0.7), "text": (code, 0.3)},
        {"web": (code, 0.7), "code": (web, 0.3)},
    ]
    assert len({base, *map(fingerprint, others)}) == 4


def test_counts_of_tokens_are_those_that_training_sees(texts):
    source = open_mixture(configured(texts, (0.7, 0.3)))
    counts = source.token_counts(256)
    share = counts / counts.sum()
    letters = {name: share[list(LETTERS[name])].sum() for name in LETTERS}
    assert letters == {"web": pytest.approx(0.7, abs=1e-6), "code": pytest.approx(0.3, abs=1e-6)}
    assert set(np.flatnonzero(counts)) == set(LETTERS["web"] + LETTERS["code"])


def test_labels_of_the_probe_are_the_sources(texts):
    source = open_mixture(configured(texts))
    batches = source.eval_batches(5, 10)
    held = {name: np.concatenate([b[name] for b in batches])[[0, 3, 9]] for name in batches[0]}
    arrays = source.probe_arrays(held, 10)
    assert arrays["label_names"] == ("web", "code")
    assert arrays["label"].dtype == np.uint8 and arrays["label"].shape == (3, LENGTH)
    assert (arrays["label"] == held["source"][:, None]).all()
    assert arrays["token_text"][ord("a")] == "a"


def test_prepared_shards_go_with_text_of_the_same_tokens_and_no_others(texts, tmp_path):
    prepare(str(texts / "code"), "", str(tmp_path / "shards"))
    mixture = {"web": (str(texts / "web"), 0.7), "code": (str(tmp_path / "shards"), 0.3)}
    mixed = open_mixture(configured(texts, **{"data.mixture": mixture}))
    plain = open_mixture(configured(texts))
    for step in (0, 5):
        assert np.array_equal(mixed.train_batch(step)["tokens"], plain.train_batch(step)["tokens"])
    train_bpe(str(texts / "web"), 300, str(tmp_path / "bpe.json"))
    with pytest.raises(UserError, match="data.mixture: 'code' has 256 tokens .* and 'web' has 30"):
        fields = {"data.mixture": mixture, "data.tokenizer": str(tmp_path / "bpe.json")}
        open_mixture(configured(texts, **fields))


@pytest.mark.parametrize(
    ("path", "problem"),
    [("absent", "absent"), ("short", "train.seq_len: the training text has")],
)
def test_a_mistake_in_a_text_names_the_text(texts, tmp_path, path, problem):
    (tmp_path / "short" / "train").mkdir(parents=True)
    (tmp_path / "short" / "val").mkdir()
    for side in ("train", "val"):
        (tmp_path / "short" / side / "a.txt").write_text(f"few {side}")
    mixture = {"web": (str(texts / "web"), 1), "bad": (str(tmp_path / path), 1)}
    with pytest.raises(UserError, match=f"^data.mixture: source 'bad': .*{problem}") as caught:
        open_mixture(configured(texts, **{"data.mixture": mixture})).train_batch(0)
    assert "\n" not in str(caught.value)


def test_bits_per_byte_of_a_source_are_of_its_own_targets(texts):
    task, source = build(configured(texts))
    assert isinstance(task, LanguageModel) and isinstance(source, Mixture)
    assert task.sources == source.names == ("web", "code")
    row = {"loss/web": 2.0, "loss/code": 3.0}
    assert source.extras_apart(row) == {
        "bits_per_byte/web": pytest.approx(2 / math.log(2)),
        "bits_per_byte/code": pytest.approx(3 / math.log(2)),
    }


def spaced(root):
    """Texts of many short documents."""
    rng = np.random.default_rng(1)
    for name, count in (("web", 60), ("code", 30)):
        for side, number in (("train", count), ("val", count // 3)):
            (root / name / side).mkdir(parents=True)
            for i in range(number):
                letters = rng.choice(list(LETTERS[name]), rng.integers(3, 40)).astype(np.uint8)
                (root / name / side / f"{i:03}.txt").write_bytes(bytes(letters))
    return root


@pytest.mark.parametrize("packing", ["greedy", "best_fit"])
def test_packed_rows_are_those_of_each_text(tmp_path, packing):
    source = open_mixture(configured(spaced(tmp_path), **{"data.packing": packing}))
    for step in range(12):
        batch = source.train_batch(step)
        assert batch.keys() == source.shapes(BATCH).keys() >= {"segment", "source"}
        for i, number in enumerate(batch["source"]):
            seen = set(batch["tokens"][i, 1:][batch["valid"][i]].tolist()) - {0}
            assert seen and seen <= set(LETTERS[("web", "code")[number]])
    counts = np.zeros(2, int)
    for step in range(30):
        counts += np.bincount(source.train_batch(step)["source"], minlength=2)
    assert counts.tolist() == [168, 72]
    evaluated = source.eval_batches(4, 10)
    assert source.evaluated["tokens"] == sum(int(b["valid"].sum()) for b in evaluated)
    assert source.about()["mixture"]["web"]["packing"]["train"]["rows"] > 0


def test_rows_of_another_length_and_the_tokenizer_are_known_as_for_one_text(texts):
    config = configured(texts)
    source = open_mixture(config)
    longer = source.of_length(2 * LENGTH)
    assert longer.shapes(3)["tokens"].shape == (3, 2 * LENGTH + 1)
    assert longer.train_batch(0)["tokens"].shape == (BATCH, 2 * LENGTH + 1)
    run: Any = SimpleNamespace(data=source, config=config)
    assert isinstance(tokenizer_of(run), ByteTokenizer)


def test_a_measurement_of_routing_has_a_text_for_each_source(texts):
    run: Any = SimpleNamespace(data=open_mixture(configured(texts)), config=configured(texts))
    found = all_texts(run, [], 5)
    assert [text.name for text in found] == ["web", "code"]
    for text in found:
        tokens = np.concatenate([b["tokens"][b["valid"].any(axis=1)] for b in text.batches])
        assert len(tokens) == 5 and set(tokens.ravel().tolist()) <= set(LETTERS[text.name])

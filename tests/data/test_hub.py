"""Data sets of the library `datasets`, from folders that it wrote, without a network."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from moejax.config import default, validate
from moejax.errors import UserError
from moejax.tasks.language.stream import StreamSource
from moejax.tasks.language.task import build

TEXTS = [f"document {n}: " + "é🙂 مرحبا\r\n"[: n % 12] * (n % 5) for n in range(90)]


def source(path: object, **fields: object) -> StreamSource:
    config = default()
    config.train.update({"seq_len": 16, "batch_size": 4, "eval_rows": 8})
    config.data.update({"path": str(path), "eval_fraction": 0.2, **fields})
    validate(config)
    found = build(config)[1]
    assert isinstance(found, StreamSource)
    return found


@pytest.fixture(scope="module")
def library():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        patch.setenv("HF_HUB_OFFLINE", "1")
        import datasets

        yield datasets


@pytest.fixture(params=["parquet", "json"])
def written(request, library, tmp_path) -> Path:
    """A folder with three files of one split, as the library writes them."""
    data = library.Dataset.from_dict({"text": TEXTS, "number": list(range(len(TEXTS)))})
    for shard in range(3):
        part = data.shard(3, shard, contiguous=True)
        path = str(tmp_path / f"train-{shard:05d}-of-00003.{request.param}")
        part.to_parquet(path) if request.param == "parquet" else part.to_json(path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="needs datasets")
class TestLibrary:
    def test_its_documents_are_those_that_the_library_gives(self, written, library):
        own = source(f"hf://{written}")
        units = own.survey.sides.train.texts
        reader = own.survey.sides.train
        found = [text.data.decode() for u in range(len(units)) for _, text in reader.read(u)]
        assert len(units) == 3
        assert found == library.load_dataset(str(written), split="train")["text"][:] == TEXTS
        assert [number for number, _ in reader.read(1, 7)] == list(range(7, 30))
        assert [text.data.decode() for _, text in reader.read(1, 7)] == TEXTS[37:60]

    def test_a_batch_is_a_function_of_the_step_alone(self, written):
        own = source(f"hf://{written}?split=train", stream=True)
        wanted = [own.train_batch(step)["tokens"] for step in range(40)]
        other = source(f"hf://{written}?split=train", stream=False)  # the same
        other.resume(own.position(30))
        for step in (30, 31, 39, 0):
            np.testing.assert_array_equal(other.train_batch(step)["tokens"], wanted[step])
        assert own.fingerprint == other.fingerprint
        assert own.facts()["order"].startswith("shards shuffled, then rows within blocks of ")
        assert own.name.endswith(" (train)")

    def test_another_split_is_held_out(self, library, tmp_path):
        for split, texts in (("train", TEXTS[:60]), ("validation", TEXTS[60:])):
            data = library.Dataset.from_dict({"text": texts})
            data.to_parquet(str(tmp_path / f"{split}-00000-of-00001.parquet"))
        own = source(f"hf://{tmp_path}", eval_path=f"hf://{tmp_path}?split=validation")
        held = bytes(np.asarray(own.corpus.heldout_N).astype(np.uint8)).split(b"\0")
        assert {text.decode() for text in held} <= set(TEXTS[60:])
        trained = [bytes(x.token_N.astype(np.uint8)).decode() for x in own.documents(0, 0, 0)]
        assert sorted(trained) == sorted(set(TEXTS[:60]) - {text.decode() for text in held})

    def test_null_is_no_text(self, library, tmp_path):
        data = library.Dataset.from_dict({"text": ["some text " * 40, None, "more text " * 40]})
        data.to_parquet(str(tmp_path / "train.parquet"))
        with pytest.raises(UserError, match=r"shard 0, record 2 has null for a text; repair"):
            list(source(f"hf://{tmp_path}", eval_fraction=0.5).documents(0, 0, 0))

    @pytest.mark.parametrize(
        "query, message",
        [
            ("?split=nothing", "datasets cannot load it: Bad split: nothing"),
            ("?config=other", "datasets cannot load it: BuilderConfig 'other' not found"),
            ("?rows=3", "rows=3 is no option; use hf://NAME with config=.., split=.., revision=.."),
            ("-gone", "datasets cannot load it: Couldn't find any data file"),
        ],
    )
    def test_what_the_library_does_not_find_is_one_line(self, written, query, message):
        with pytest.raises(UserError) as error:
            source(f"hf://{written}{query}")
        assert message in str(error.value) and "\n" not in str(error.value)
        assert str(error.value).startswith(f"data.path='hf://{written}{query}'")

    def test_an_unknown_name_without_a_network_is_one_line(self, library):
        with pytest.raises(
            UserError, match=r"^data\.path='hf://no/such': datasets cannot load it:"
        ):
            source("hf://no/such")

    def test_a_missing_column_is_named_with_those_that_there_are(self, written):
        with pytest.raises(UserError, match=r"data\.text_field='body'.*'text', 'number'"):
            source(f"hf://{written}", text_field="body")


def test_without_the_library_the_message_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        UserError, match=r"^data\.path='hf://a/b' needs datasets; pip install 'moejax\[hf\]'$"
    ):
        source("hf://a/b")

"""The texts and the config page of experiments/openmoe."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from moejax.config import load, validate
from moejax.data.builtin import builtin_documents
from moejax.data.load import load as load_text
from moejax.errors import UserError
from moejax.tasks.language.windows import Windows

FOLDER = Path(__file__).parents[2] / "experiments" / "openmoe"
PAGE = f"{FOLDER}/config.py"


def module():
    spec = importlib.util.spec_from_file_location("openmoe_texts", FOLDER / "texts.py")
    assert spec and spec.loader
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    out = tmp_path_factory.mktemp("texts") / "texts"
    module().write(out)
    return out


def test_the_page_is_a_small_openmoe():
    config = load(f"{PAGE}:texts=/t,steps=40,k=1").config
    assert (config.moe.gate.name, config.moe.gate.k, config.moe.num_experts) == ("openmoe", 1, 16)
    assert (config.moe.transport, config.moe.priority, config.moe.group) == (
        "cells", "position", "sequence",
    )  # fmt: skip
    assert config.moe.shared_experts == 1 and config.train.steps == 40
    assert config.data.path == "/t/code"
    kept = load(PAGE).config.train
    assert kept.steps // kept.checkpoint_every <= kept.keep_checkpoints


@pytest.mark.slow
def test_the_three_texts_are_the_built_in_corpus(texts):
    """Every file is in one of them, the language reference as its chapters."""
    source = {doc.name: doc.read() for doc in builtin_documents()}
    topics = source.pop("pydoc_data/topics.py").decode()
    written = {
        str(path.relative_to(texts / folder)): path.read_bytes()
        for folder in ("code", "tables")
        for path in (texts / folder).rglob("*.py")
    }
    assert written == source
    english = "".join(path.read_text() for path in (texts / "english").iterdir())
    assert len(english) > 0.5 * len(topics) and "topics =" not in english
    with pytest.raises(UserError, match="exists"):
        module().write(texts)


@pytest.mark.slow
def test_the_page_with_these_texts_is_valid_and_holds_out_a_thousand_rows(texts):
    config = load(f"{PAGE}:texts={texts}").config
    validate(config)
    found = load_text(config.data)
    assert found.vocab_size == 2048
    assert len(Windows(found.heldout_N, config.train.seq_len, "held-out")) >= 1000
    assert np.max(found.heldout_N) < 2048

"""Remarks about a text at the start of a run: facts, and likely mistakes."""

from moejax.data.corpus import Corpus, Facts
from moejax.data.duplicates import Overlap

FEW = 10_000
"""Held-out tokens below which a run warns. At a standard deviation of 2 nats between tokens, the
standard error of their mean loss is 0.02 nats."""

MUCH = 0.2
"""Share of held-out bytes found in the training text above which a run warns."""

BYTES = 256
"""The size of the vocabulary without a tokenizer, whose separator needs no mention."""


def text_lines(corpus: Corpus) -> dict[str, str]:
    """Facts about a text, each under its heading."""
    facts, lines = corpus.facts, {}
    if facts.arrays or facts.formats:
        lines["read as"] = facts.arrays or formats_in_words(facts)
    if facts.arrays and not facts.heldout_documents:
        lines["held out"] = f"{facts.split}; where documents begin is not known"
    elif facts.split:
        unread = f", {facts.unread_documents} are not read" if facts.unread_documents else ""
        copies = f", {facts.copies} near copies left out" if facts.copies else ""
        lines["held out"] = (
            f"{facts.split}: {documents(facts.heldout_documents)} beside "
            f"{facts.train_documents} to train on{unread}{copies}"
        )
    if shared := corpus.overlap:
        lines["overlap"] = overlap_in_words(shared)
    if facts.separator and corpus.vocab_size != BYTES:
        opening = f", {facts.opening} before each" if facts.opening else ""
        lines["separator"] = f"{facts.separator} between documents{opening}"
    return lines


def formats_in_words(facts: Facts) -> str:
    """The files of each format, and the documents that were left out."""
    files = ", ".join(
        f"{name} ({count} file{'s' if count != 1 else ''})" for name, count in facts.formats.items()
    )
    left_out = {
        "exact cop{}": (facts.duplicates, "y", "ies"),
        "empty document{}": (facts.empty_documents, "", "s"),
        "record{} that cannot be read": (facts.bad_records, "", "s"),
    }
    parts = [
        f"{count} {what.format(one if count == 1 else more)}"
        for what, (count, one, more) in left_out.items()
        if count
    ]
    return files + (f"; left out: {', '.join(parts)}" if parts else "")


def overlap_in_words(shared: Overlap) -> str:
    """The overlap of the sides, and how much of them was compared."""
    compared = (
        ""
        if shared.complete
        else (
            f" at least ({shared.heldout_bytes / 2**20:.0f} MiB compared with "
            f"{shared.train_bytes / 2**20:.0f} MiB of the training text)"
        )
    )
    return (
        f"{shared.share:.1%} of held-out bytes are in a {shared.window}-byte window that "
        f"the training text has too{compared}"
    )


def text_warnings(corpus: Corpus) -> list[str]:
    """Likely mistakes in a text, one line each."""
    lines, shared = reading_warnings(corpus.facts), corpus.overlap
    if len(corpus.heldout_N) < FEW:
        lines.append(few_held_out(len(corpus.heldout_N)))
    if shared and shared.share > MUCH:
        lines.append(
            f"{shared.share:.0%} of held-out bytes occur in the training text too, so that the "
            "held-out loss is partly a training loss; remove copies from data.path or "
            "name another text in data.eval_path"
        )
    if corpus.heldout_size_M is None:
        remedy = "these shards are of an older version, so prepare the text again to get them"
        if corpus.facts.arrays:
            remedy = "name the byte-level tokenizer that made the ids in data.tokenizer"
        lines.append(
            "how many bytes each token encodes is not known, so there are no bits per byte; "
            + remedy
        )
    return lines


def reading_warnings(facts: Facts) -> list[str]:
    """Documents that do not look like text, and records that were left out."""
    lines = [facts.warning] if facts.warning else []
    if facts.bad_records:
        count = facts.bad_records
        lines.append(
            f"{count} record{' was' if count == 1 else 's were'} left out because "
            f"{'it' if count == 1 else 'they'} cannot be read (the first: "
            f"{facts.first_bad_record})"
        )
    return lines


def few_held_out(tokens: int) -> str:
    """The warning about a small held-out side."""
    return (
        f"only {tokens} tokens are held out, and a held-out loss of fewer than {FEW} is mostly "
        "noise; raise data.eval_fraction, name a text in data.eval_path or give more text"
    )


def documents(count: int) -> str:
    """A number of documents in words."""
    return "1 document" if count == 1 else f"{count} documents"

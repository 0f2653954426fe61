"""The contents of data, for people."""

from moejax.data.survey import Survey

WIDTH = 32
"""Characters of the longest bar of the histogram."""
MOST = 10
"""Files of a kind that are listed."""


def survey_lines(found: Survey) -> list[str]:
    """The lines that ``moejax data inspect`` prints."""
    rows = [("data", f"{found.name}, {found.kind}"), ("files", _files(found))]
    if found.split:
        s = found.split
        rows.append(
            (
                "sides",
                f"{s['train_tokens']:,} tokens to train on, {s['heldout_tokens']:,} held out"
                + (f" ({s['rule']})" if s["rule"] else ""),
            )
        )
        rows.append(("fingerprint", s["fingerprint"]))
    count = found.documents
    rows.append(("documents", "not known" if count is None else f"{count:,}"))
    rows.append(("bytes", "not known" if found.bytes is None else f"{found.bytes:,}"))
    rows.append(("tokens", _tokens(found)))
    rows += [(name, text) for name, text in _troubles(found) if text]
    for name in ("shortest", "longest"):
        extreme = getattr(found, name)
        if extreme:
            rows.append((name, f"{extreme['tokens']:,} tokens: {extreme['place']}"))
    if found.shards.get("licence"):
        rows.append(("licence", found.shards["licence"]))
    lines = [f"{name:<12}{text}" for name, text in rows]
    if found.lengths:
        lines += ["", "documents by length in tokens", *_histogram(found.lengths)]
    if found.first:
        lines += ["", "first documents", *(f"  {line}" for line in found.first)]
    if found.first_bad:
        lines += ["", "records that cannot be read", *_listed(found.first_bad, found.bad)]
    if found.refused:
        reasons = [f"{file['path']}: {file['reason']}" for file in found.refused[:MOST]]
        lines += ["", "files that cannot be read", *_listed(reasons, len(found.refused))]
    if found.ignored:
        title = "text beside files of records, which is not read"
        lines += ["", title, *_listed(found.ignored[:MOST], len(found.ignored))]
    return lines


def _files(found: Survey) -> str:
    formats = ", ".join(f"{name} ({count})" for name, count in found.formats.items())
    return formats or f"{found.files}"


def _tokens(found: Survey) -> str:
    named = f" ({found.tokenizer})" if found.tokenizer else ""
    mean = ""
    if found.bytes and found.tokens and found.bytes != found.tokens:
        mean = f", {found.bytes / found.tokens:.2f} bytes each"
    return f"{found.tokens:,}{named}{mean}"


def _troubles(found: Survey) -> list[tuple[str, str]]:
    unread = [
        f"{count:,} {what}{'s' if count > 1 else ''}"
        for count, what in ((found.bad, "record"), (len(found.refused), "file"))
        if count
    ]
    odd = lambda count, first: f"{count:,}, the first: {first}" if count else ""
    return [
        ("duplicates", f"{found.duplicates:,}" if found.duplicates else ""),
        ("empty", f"{found.empty:,}" if found.empty else ""),
        ("not read", ", ".join(unread)),
        ("not UTF-8", odd(found.not_utf8, found.first_not_utf8)),
        ("binary", odd(found.binary, found.first_binary)),
    ]


def _histogram(lengths: dict[str, int]) -> list[str]:
    most = max(lengths.values())
    lower = [int(name) for name in lengths]
    whole = [*(n for n in range(0, max(lower).bit_length()) if 1 << n >= min(lower))]
    rows = ([0] if 0 in lower else []) + [1 << n for n in whole]
    names = {n: f"{n:,}" if n < 2 else f"{n:,} to {2 * n - 1:,}" for n in rows}
    wide = max(map(len, names.values()))
    tall = max(len(f"{count:,}") for count in lengths.values())
    return [
        f"  {names[n]:>{wide}}  {lengths.get(str(n), 0):>{tall},}  "
        f"{'#' * -(-WIDTH * lengths.get(str(n), 0) // most)}".rstrip()
        for n in rows
    ]


def _listed(lines: list[str], count: int) -> list[str]:
    more = [f"  and {count - len(lines):,} more"] if count > len(lines) else []
    return [f"  {line}" for line in lines] + more

"""Numbers and units as text for people."""

from collections.abc import Mapping
from typing import Any

PER_BYTE = "nats/byte"
PER_TOKEN = "nats/token"


def bytes_per_token(saved: Mapping[str, Any]) -> float | None:
    """Bytes of text per token of the evaluated targets, from config.json; None if unknown.

    Versions up to 0.1.0 recorded the ratio of all held-out text, which equals that of the evaluated
    targets only if every token is a byte.
    """
    evaluated = saved.get("evaluated")
    if evaluated:
        return evaluated["bytes"] / evaluated["tokens"] if "bytes" in evaluated else None
    return 1.0 if saved.get("heldout_bytes_per_token") == 1.0 else None


def loss_unit(saved: Mapping[str, Any]) -> str:
    """The unit of a run's losses, from its config.json: per byte for text whose tokens are bytes.

    So pictures and pages of one run, which also show bits per byte, and those of a sweep, which
    compares text per byte, use one unit for one number.
    """
    if bytes_per_token(saved) == 1.0:
        return PER_BYTE
    # Runs older than tasks are of text.
    return saved.get("units", {"loss": PER_TOKEN})["loss"]


def count(number: float) -> str:
    """A number with a letter for thousands, millions, billions: 5.37M."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.2f}{unit}"
    return f"{number:.0f}"


def size(number: float) -> str:
    """Bytes, in binary units."""
    for limit, unit in ((2**30, "GiB"), (2**20, "MiB")):
        if number >= limit:
            return f"{number / limit:.1f} {unit}"
    return f"{number / 1024:.1f} KiB"


def duration(seconds: float) -> str:
    """Hours and minutes, or minutes and seconds: ``1h02m``, ``12m05s``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s"


def rough_duration(seconds: float) -> str:
    """Seconds, minutes or hours, whichever reads best: ``80 s``, ``12 min``, ``1.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

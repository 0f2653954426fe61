"""Numbers as people read them."""

from collections.abc import Mapping
from typing import Any

PER_BYTE = "nats/byte"
PER_TOKEN = "nats/token"


def loss_unit(saved: Mapping[str, Any]) -> str:
    """The unit of a run's losses, from its config.json: of text whose tokens are bytes, per byte.

    So that pictures and pages of one run, which also say bits per byte, and those of a sweep, which
    compares text per byte, name one unit for one number.
    """
    if saved.get("heldout_bytes_per_token") == 1.0:
        return PER_BYTE
    # Runs from before there were tasks are of text.
    return saved.get("units", {"loss": PER_TOKEN})["loss"]


def count(number: float) -> str:
    """With a letter for thousands, millions, billions: 5.37M."""
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
    """Hours and minutes, or minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s"

"""Continuations of prompts by the decoder of ``moejax generate``."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Integer

from moejax.config import Config
from moejax.errors import UserError
from moejax.generate import run
from moejax.generate.load import open_speaker
from moejax.generate.sampling import Sampling


class Wanted(NamedTuple):
    """The continuation that a task asks for."""

    stops: tuple[str, ...] = ()
    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0


def continued(
    config: Config,
    workdir: str,
    step: int | None,
    prompts: Sequence[Integer[np.ndarray, " N"]],
    wanted: Wanted,
) -> list[str]:
    """The continuations, each without the stop string or the separator that ended it.

    Raises:
      UserError: see `open_speaker`; a distribution that does not exist.
    """
    try:
        sampling = Sampling(wanted.temperature, wanted.top_k, wanted.top_p)
    except ValueError as error:
        raise UserError(f"generation_kwargs: {error}") from error
    size = config.train.batch_size
    request = run.Request(sampling, wanted.max_tokens, wanted.stops, batch_size=size)
    texts = [""] * len(prompts)
    with open_speaker(config, workdir, step) as speaker:
        given = [("", prompt) for prompt in prompts]
        for text in run.generate(speaker, given, request, run.Speed()):
            texts[text.number] = text.text
    return texts

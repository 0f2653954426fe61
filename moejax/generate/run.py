"""Continuations of prompts: batches, speed, and the experts that each token visited."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from moejax.data.documents import Document, Piece
from moejax.data.tokenizers.interface import Tokenizer
from moejax.errors import UserError
from moejax.generate.decode import Decoder, Visits
from moejax.generate.load import Speaker
from moejax.generate.prompts import Prompts, batches
from moejax.generate.sampling import Sampling
from moejax.generate.text import Continuation, Finish


@dataclasses.dataclass(frozen=True)
class Request:
    """The continuations that are wanted: see `Sampling`, and ``moejax generate --help``."""

    sampling: Sampling = Sampling()
    max_tokens: int = 128
    stops: tuple[str, ...] = ()
    seed: int = 0
    batch_size: int = 8
    with_visits: bool = False


@dataclasses.dataclass(frozen=True)
class Generated:
    """The continuation of one prompt, which is number ``number`` of the prompts, from 0."""

    number: int
    prompt: str
    text: str
    tokens: list[int]
    finish: Finish
    visits: Visits | None = None
    """The experts of the tokens, [N, M, K]."""


@dataclasses.dataclass
class Speed:
    """Tokens and seconds so far, without those of compiling."""

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    tokens: int = 0
    seconds: float = 0.0
    compile_seconds: float = 0.0

    @property
    def of_prompt(self) -> float:
        """Tokens of prompts per second."""
        return self.prompt_tokens / max(self.prompt_seconds, 1e-9)

    @property
    def of_text(self) -> float:
        """Generated tokens per second."""
        return self.tokens / max(self.seconds, 1e-9)


def encoded(tokenizer: Tokenizer, prompt: str, name: str) -> np.ndarray:
    """The prompt's tokens, behind those that the tokenizer's file puts before every text.

    Raises:
      UserError: it has none, or the tokenizer does not give it back.
    """
    data = prompt.encode("utf-8", "surrogateescape")
    piece = Piece(Document(name, name, len(data), field=name), data, True)
    tokens = tokenizer.encode([piece])[0] if data else np.zeros(0, np.int32)
    if not len(tokens):
        raise UserError(f"{name}={prompt!r} is empty; give the text to continue")
    return np.concatenate([tokenizer.opening, tokens]).astype(np.int32)


def generate(
    speaker: Speaker,
    prompts: Sequence[tuple[str, np.ndarray]],
    request: Request,
    speed: Speed,
    on_text: Callable[[int, Continuation], None] | None = None,
) -> Iterator[Generated]:
    """The continuation of each prompt, (text, tokens), batch by batch.

    A text depends on its prompt and on ``request.seed`` alone, not on the prompts beside it.
    ``on_text`` sees the continuations while they grow. Fills in ``speed``.
    """
    tokenizer = speaker.tokenizer
    eos = speaker.ends
    decoder = Decoder(
        speaker.task,
        speaker.weights,
        request.sampling,
        vocab=tokenizer.vocab_size,
        eos=eos,
        with_visits=request.with_visits,
        mesh=speaker.mesh,
    )
    rows = min(request.batch_size, len(prompts))
    for numbers in batches([len(tokens) for _, tokens in prompts], rows):
        own = [prompts[number][1] for number in numbers]
        texts = [Continuation(tokenizer, tokens, request.stops, eos) for tokens in own]
        visits = _decoded(decoder, Prompts.of(own, rows), numbers, texts, request, speed, on_text)
        for row, (number, text) in enumerate(zip(numbers, texts, strict=True)):
            count, seen = len(text.tokens), None
            if visits:
                seen = Visits(
                    *(np.concatenate(x, axis=1)[row, :count] for x in zip(*visits, strict=True))
                )
            yield Generated(number, prompts[number][0], text.text, text.tokens, text.finish, seen)


def _decoded(
    decoder: Decoder,
    prompts: Prompts,
    numbers: Sequence[int],
    texts: Sequence[Continuation],
    request: Request,
    speed: Speed,
    on_text: Callable[[int, Continuation], None] | None,
) -> list[Visits]:
    """Fills in the texts of one batch; their tokens' experts, chunk by chunk."""
    rows, visits = len(prompts.token_BP), []
    seed_B, compiling, begin = np.full(rows, request.seed), decoder.compile_seconds, _now()
    progress = decoder.start(prompts, seed_B, request.max_tokens)
    progress.logits_BV.block_until_ready()
    speed.prompt_seconds += _now() - begin - (decoder.compile_seconds - compiling)
    speed.prompt_tokens += int(prompts.valid_BP.sum())
    compiling, begin = decoder.compile_seconds, _now()
    for text in texts:
        text.add((), request.max_tokens)
    left = request.max_tokens
    while left > 0 and not all(text.finish for text in texts):
        done_B = np.ones(rows, bool)
        done_B[: len(texts)] = [bool(text.finish) for text in texts]
        progress = decoder.with_done(progress, done_B)
        progress, token_BN, seen = decoder.more(progress, left)
        left -= token_BN.shape[1]
        if seen is not None:
            visits.append(seen)
        for number, text, token_N in zip(numbers, texts, token_BN, strict=False):
            if not text.finish:
                text.add(token_N.tolist(), request.max_tokens)
                if on_text is not None:
                    on_text(number, text)
    speed.seconds += _now() - begin - (decoder.compile_seconds - compiling)
    speed.tokens += sum(len(text.tokens) for text in texts)
    speed.compile_seconds = decoder.compile_seconds
    return visits


def _now() -> float:
    return time.perf_counter()

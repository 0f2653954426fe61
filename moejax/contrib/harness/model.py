"""The model "moejax" of lm-evaluation-harness: log-likelihoods and continuations of a run.

Importing this module registers it:

    import lm_eval
    import moejax.contrib.harness.model
    lm_eval.simple_evaluate("moejax", "workdir=runs/x,batch_size=8", tasks=["lambada_openai"])
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import (
    get_rolling_token_windows,
    make_disjoint_window,
    simple_parse_args_string,
)

from moejax.config import load
from moejax.contrib.harness.generation import Wanted, continued
from moejax.data.documents import Document, Piece
from moejax.data.tokenizers.interface import before_text
from moejax.errors import UserError
from moejax.train import scoring
from moejax.train.evaluate import open_run

NAME = "moejax"
LEAST = 16
"""The shortest length that rows are padded to; further ones are twice, four times, ... as long."""
MOST_NEW = 256
"""Tokens of a continuation, where a task sets no limit; fewer where the model has less room."""


@register_model(NAME)
class HarnessModel(TemplateLM):
    """The newest checkpoint of the run in ``workdir``, or that of ``step``.

    A text begins behind its tokenizer's opening (BOS), which every context has too, or behind the
    separator of the run's documents. A text longer than ``max_length``
    (default: ``train.seq_len``) loses its beginning; log-likelihoods of whole texts are those of
    windows without overlap. ``tokenizer``: see ``moejax eval --tokenizer``. Further arguments are
    fields of the config, as ``config.mesh.expert=4``; ``batch_size`` is ``train.batch_size``.

    Raises:
      UserError: see ``moejax eval``; an unknown argument.
    """

    def __init__(
        self,
        workdir: str = "",
        batch_size: int | str | None = None,
        step: int | None = None,
        max_length: int | None = None,
        tokenizer: str = "",
        **others: Any,
    ):
        super().__init__()
        if not workdir:
            raise UserError("--model_args: workdir=DIR must name the run to evaluate")
        self._overrides = _overrides(batch_size, others)
        config = load(os.path.join(workdir, "config.json"), self._overrides).config
        scoring.check(config, f"--model={NAME}")
        self.max_length = config.train.seq_len if max_length is None else max_length
        if self.max_length < 2:
            raise UserError(f"max_length={self.max_length} must be a number of tokens, at least 2")
        with open_run(config, str(workdir), step) as (run, state, _):
            self._run, self._scorer = run, scoring.Scorer(run, state)
            self._tokenizer = scoring.tokenizer_of(run, tokenizer)
        self.workdir, self.step = str(workdir), step

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> "HarnessModel":
        """With the arguments in ``arg_dict``, and the harness's own ``--batch_size``.

        That is 1 unless it is given, which no mesh of several devices takes: 1 there means the
        run's own, 1 in ``arg_dict`` means 1. The harness's ``--device`` (by default a CUDA device)
        means nothing here: devices are those of the config.
        """
        size = (additional_config or {}).get("batch_size")
        return cls(**{"batch_size": None if size in (1, "1") else size, **arg_dict})

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> "HarnessModel":
        """See `create_from_arg_obj`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @property
    def tokenizer_name(self) -> str:
        return self._tokenizer.name

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.separator

    @property
    def prefix_token_id(self) -> int:
        """The token before a text: the last of its opening, or the separator of documents."""
        return before_text(self._tokenizer)[-1]

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids of a text alone; nothing is added to it."""
        data = string.encode("utf-8")
        document = Document("text", "a text of the task", len(data), field="--tasks")
        return self._tokenizer.encode([Piece(document, data, True)])[0].tolist() if data else []

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The tokens of both, those of the context behind its opening."""
        context_tokens, continuation_tokens = super()._encode_pair(context, continuation)
        return [*self._tokenizer.opening, *context_tokens], continuation_tokens

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether each of its tokens is the likeliest."""
        rows = [self._row(*request) for request in requests]
        found: list[tuple[float, bool]] = [(0.0, True)] * len(rows)
        for (length, numbers), first in _by_length(rows, self.max_length):
            with jax.set_mesh(self._run.mesh):
                scored = list(self._scorer([rows[i] for i in numbers], length, first))
            for number, (nats_N, greedy_N) in zip(numbers, scored, strict=True):
                key, _, continuation = requests[number]
                new = len(nats_N) - len(continuation)
                total = -float(nats_N[new:].sum(dtype=np.float64))
                found[number] = total, bool(greedy_N[new:].all())
                if key is not None:
                    self.cache_hook.add_partial("loglikelihood", key, found[number])
        return found

    def _row(self, key: Any, context: list[int], continuation: list[int]) -> np.ndarray:
        """The tokens to read, of which the continuation is scored."""
        if not 1 <= len(continuation) <= self.max_length:
            raise UserError(
                f"the continuation {str(key)[:60]!r} has {len(continuation)} tokens, but 1 to "
                f"{self.max_length} are scored at once; raise max_length"
            )
        return np.array((context + continuation)[-self.max_length - 1 :], np.int32)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each whole text, in windows of ``max_length``."""
        texts = [request.args[0] for request in requests]
        parts, owners = [], []
        for number, text in enumerate(texts):
            windows = get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1
            )
            for window in map(make_disjoint_window, windows):
                parts.append((None, *window))
                owners.append(number)
        totals = [0.0] * len(texts)
        for number, (total, _) in zip(owners, self._loglikelihood_tokens(parts), strict=True):
            totals[number] += total
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each context, up to a stop string or the end of the text."""
        wanted = [self._wanted(request.args[1]) for request in requests]
        texts = [""] * len(requests)
        for own in dict.fromkeys(wanted):
            numbers = [i for i, other in enumerate(wanted) if other == own]
            room = self.max_length - own.max_tokens
            prompts = [self._prompt(requests[i].args[0], room) for i in numbers]
            config = load(os.path.join(self.workdir, "config.json"), self._overrides).config
            continuations = continued(config, self.workdir, self.step, prompts, own)
            for number, text in zip(numbers, continuations, strict=True):
                texts[number] = text
                self.cache_hook.add_partial("generate_until", requests[number].args, text)
        return texts

    def _prompt(self, context: str, room: int) -> np.ndarray:
        """The last tokens of a context, behind its opening; the separator before an empty one."""
        tokens = [*self._tokenizer.opening, *self.tok_encode(context)] or [self.eot_token_id]
        return np.array(tokens[-room:], np.int32)

    def _wanted(self, given: Mapping[str, Any]) -> Wanted:
        most = min(MOST_NEW, self.max_length // 2)
        known: dict[str, Any] = {**normalize_gen_kwargs(dict(given), most)}
        stops, sampled = known.pop("until", None) or [], known.pop("do_sample", False)
        stops = [stops] if isinstance(stops, str) else stops
        wanted = Wanted(
            tuple(stop for stop in stops if stop),
            known.pop("max_gen_toks", most),
            known.pop("temperature", 1.0 if sampled else 0.0),  # 0 by now unless sampled
            known.pop("top_k", 0),
            known.pop("top_p", 1.0),
        )
        if known:
            name, value = next(iter(known.items()))
            raise UserError(
                f"generation_kwargs: {name}={value} is not known here; leave it out, or use until, "
                "max_gen_toks, do_sample, temperature, top_k and top_p"
            )
        if not 1 <= wanted.max_tokens < self.max_length:
            raise UserError(
                f"generation_kwargs: max_gen_toks={wanted.max_tokens} must leave room for the "
                f"context in max_length={self.max_length}; lower it, or raise max_length"
            )
        return wanted


def _overrides(batch_size: int | str | None, others: Mapping[str, Any]) -> list[str]:
    """Arguments of the model as fields of the config."""
    for name, value in others.items():
        if not name.startswith("config."):
            raise UserError(
                f"--model_args: {name}={value} is unknown; use workdir, step, max_length, "
                "tokenizer, batch_size, or a field such as config.mesh.expert"
            )
    fields = [f"--{name}={value}" for name, value in others.items()]
    if batch_size is None or str(batch_size).startswith("auto"):
        return fields
    return [*fields, f"--config.train.batch_size={batch_size}"]


def _by_length(
    rows: Sequence[np.ndarray], most: int
) -> Iterator[tuple[tuple[int, list[int]], int]]:
    """Lengths to pad to, with the numbers of the rows, and how many rows came before."""
    groups: dict[int, list[int]] = {}
    for number, row in enumerate(rows):
        length = LEAST
        while length < len(row) - 1:
            length *= 2
        groups.setdefault(min(length, most), []).append(number)
    first = 0
    for length in sorted(groups):
        yield (length, groups[length]), first
        first += len(groups[length])

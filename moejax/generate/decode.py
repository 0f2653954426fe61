"""Decoding on the devices: a prompt is read at once, then some tokens per call."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from moejax.generate.causal import Way, for_decoding, way_of
from moejax.generate.prompts import Prompts
from moejax.generate.sampling import Sampling, drawn
from moejax.tasks.language.task import LanguageModel
from moejax.types import Context, MoEInfo

CHUNK = 8
"""Tokens per call of the program that decodes."""

ROUND = 16
"""Room for texts is a multiple of this many tokens."""


class Weights(NamedTuple):
    """The arrays of a model to decode with; gates get ``step`` and ``key`` as in an evaluation."""

    params: PyTree
    """With a tree for each period: see ``apart``."""
    gate_state: PyTree
    step: Array
    key: Array
    """Raw data."""


class Visits(NamedTuple):
    """The experts of N tokens of each text in M layers, [B, N, M, K], and their weights.

    A pair of weight 0 was not visited.
    """

    expert: np.ndarray
    weight: np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Progress:
    """A batch of texts while they are generated. S is their room, padding and prompts included."""

    logits_BV: Array
    """Logits of the next token."""
    seen_BV: Array
    """The tokens of each text."""
    token_BS: Array
    valid_BS: Array
    memory: Any
    """None where every step reads the whole text."""
    length: Array
    """Tokens of each text so far, padding included."""
    count: Array
    """Those that were generated."""
    done_B: Array
    seed_B: Array


def apart(params: PyTree, periods: int) -> PyTree:
    """The parameters with a tree for each period, in place of one with all of them stacked.

    Empties ``params``, so that there are never two copies of more than one array.
    """
    stacked, tree = jax.tree.flatten(params.pop("periods"))
    parts: list[list[Array]] = [[] for _ in range(periods)]
    for number in range(len(stacked)):
        x, stacked[number] = stacked[number], None
        pieces = _split(x, periods)
        for own, piece in zip(parts, pieces, strict=True):
            own.append(piece)
    rest = {name: params.pop(name) for name in list(params)}
    return rest | {"periods": {str(i): jax.tree.unflatten(tree, p) for i, p in enumerate(parts)}}


def _split(x: Array, periods: int) -> tuple[Array, ...]:
    own = None
    if isinstance(x.sharding, NamedSharding):
        own = NamedSharding(x.sharding.mesh, PartitionSpec(*x.sharding.spec[1:]))
    split = jax.jit(lambda x: tuple(x[i] for i in range(periods)), out_shardings=own)
    return split(x)


class Decoder:
    """Programs that read prompts and decode, compiled once for each shape.

    ``vocab``: the ids below it may be drawn. ``eos``: the tokens after which a text is done.
    ``with_visits``: also return the experts of the tokens.

    Raises:
      UserError: the model's gate cannot be decoded.
    """

    def __init__(
        self,
        task: LanguageModel,
        weights: Weights,
        sampling: Sampling,
        *,
        vocab: int,
        eos: Sequence[int] = (),
        with_visits: bool = False,
        mesh: Mesh | None = None,
    ):
        self.way: Way = way_of(task.model)
        self._task = dataclasses.replace(task, model=for_decoding(task.model))
        self._weights, self._sampling = weights, sampling
        self._vocab, self._eos = vocab, np.asarray(eos, np.int32)
        self._with_visits = with_visits and task.model.num_moe_layers > 0
        self._mesh = mesh if mesh is not None and mesh.size > 1 else None
        self._programs: dict[Any, Any] = {}
        self.compile_seconds = 0.0

    @property
    def compiled(self) -> int:
        """The number of programs compiled so far."""
        return len(self._programs)

    def start(self, prompts: Prompts, seed_B: np.ndarray, max_tokens: int) -> Progress:
        """Reads the prompts. Rows without a prompt are done."""
        batch, length = prompts.token_BP.shape
        size = length + -(-max_tokens // ROUND) * ROUND
        given = (prompts.token_BP, prompts.valid_BP, np.asarray(seed_B, np.uint32))

        def read(weights: Weights, token_BP: Array, valid_BP: Array, seed_B: Array) -> Progress:
            return self._read_prompts(weights, token_BP, valid_BP, seed_B, size)

        with self._entered():
            program = self._program(("start", batch, length, size), read, (self._weights, *given))
            return program(self._weights, *given)

    def more(self, progress: Progress, most: int) -> tuple[Progress, np.ndarray, Visits | None]:
        """Up to ``CHUNK`` further tokens of each text, at most ``most``; [B, 0] if all are done.

        Uses up ``progress``. Tokens after the end of a text mean nothing.
        """
        before = int(progress.count)
        given = (self._weights, progress, np.int32(min(most, CHUNK)))
        shape = ("more", *progress.token_BS.shape)
        shardings = (jax.tree.map(lambda x: x.sharding, progress), None, None)
        with self._entered():
            program = self._program(
                shape, self._decode, given, donate_argnums=1, out_shardings=shardings
            )
            progress, token_NB, visits = program(*given)
        number = int(progress.count) - before
        token_BN = np.asarray(token_NB)[:number].T
        if visits is None:
            return progress, token_BN, None
        arrays = (np.asarray(visits[name])[:number] for name in ("expert", "weight"))
        return progress, token_BN, Visits(*(np.moveaxis(x, 2, 0) for x in arrays))

    def with_done(self, progress: Progress, done_B: np.ndarray) -> Progress:
        """The same texts, with those that get no further token."""
        given = jax.device_put(done_B, progress.done_B.sharding)
        return dataclasses.replace(progress, done_B=given)

    def _entered(self) -> Any:
        return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)

    def _program(self, name: Any, run: Callable, given: tuple[Any, ...], **options: Any) -> Any:
        if name not in self._programs:
            begin = time.perf_counter()
            self._programs[name] = jax.jit(run, **options).lower(*given).compile()
            self.compile_seconds += time.perf_counter() - begin
        return self._programs[name]

    # ------------------------------------------------------------------ the programs

    def _read_prompts(
        self, weights: Weights, token_BP: Array, valid_BP: Array, seed_B: Array, size: int
    ) -> Progress:
        batch, length = token_BP.shape
        filled = ((0, 0), (0, size - length))
        token_BS, valid_BS = jnp.pad(token_BP, filled), jnp.pad(valid_BP, filled)
        row_B1 = jnp.arange(batch)[:, None]
        seen_BV = jnp.zeros((batch, self._task.model.vocab_size), bool)
        seen_BV = seen_BV.at[row_B1, token_BP].max(valid_BP)
        memory = None
        if self.way == "memory":
            memory = self._task.built_apart(weights.params).empty_memory(batch, size)
            token_BL, valid_BL = token_BP, valid_BP
        else:
            token_BL, valid_BL = token_BS, valid_BS
        logits_BV, memory, _ = self._logits(weights, token_BL, valid_BL, None, memory, length - 1)
        return Progress(
            logits_BV,
            seen_BV,
            token_BS,
            valid_BS,
            memory,
            jnp.int32(length),
            jnp.int32(0),
            ~jnp.any(valid_BP, axis=1),
            seed_B,
        )

    def _decode(
        self, weights: Weights, progress: Progress, most: Array
    ) -> tuple[Progress, Array, dict[str, Array] | None]:
        """Tokens [N, B], N = ``CHUNK``, of which the first are new, and their experts."""

        def step(progress: Progress) -> tuple[Progress, Array, Any]:
            return self._step(weights, progress)

        shapes = jax.eval_shape(step, progress)[1:]
        found = jax.tree.map(lambda x: jnp.zeros((CHUNK, *x.shape), x.dtype), shapes)

        def is_on(carry: tuple[Array, Progress, Any]) -> Array:
            index, progress, _ = carry
            return (index < most) & ~jnp.all(progress.done_B)

        def body(carry: tuple[Array, Progress, Any]) -> tuple[Array, Progress, Any]:
            index, progress, found = carry
            progress, *new = step(progress)
            found = jax.tree.map(lambda all_N, x: all_N.at[index].set(x), found, tuple(new))
            return index + 1, progress, found

        carry = (jnp.int32(0), progress, found)
        _, progress, (token_NB, visits) = jax.lax.while_loop(is_on, body, carry)
        return progress, token_NB, visits

    def _step(self, weights: Weights, progress: Progress) -> tuple[Progress, Array, Any]:
        """Draws each text's next token and reads it."""
        logits_BV, at = progress.logits_BV, progress.length
        token_B = drawn(
            logits_BV, progress.seen_BV, self._sampling, progress.seed_B, progress.count
        )
        alive_B = ~progress.done_B
        token_BS = jax.lax.dynamic_update_slice_in_dim(
            progress.token_BS, token_B[:, None], at, axis=1
        )
        valid_BS = jax.lax.dynamic_update_slice_in_dim(
            progress.valid_BS, alive_B[:, None], at, axis=1
        )
        if self.way == "memory":
            first_B = jnp.argmax(progress.valid_BS, axis=1).astype(jnp.int32)
            position_B1 = (at - first_B)[:, None]
            given = token_B[:, None], alive_B[:, None], position_B1, progress.memory, 0
        else:
            given = token_BS, valid_BS, None, None, at
        logits_BV, memory, visits = self._logits(weights, *given)
        rows_B = jnp.arange(len(token_B))
        return (
            Progress(
                logits_BV,
                progress.seen_BV.at[rows_B, token_B].set(True),
                token_BS,
                valid_BS,
                memory,
                at + 1,
                progress.count + 1,
                progress.done_B | jnp.isin(token_B, self._eos),
                progress.seed_B,
            ),
            token_B,
            visits,
        )

    def _logits(
        self,
        weights: Weights,
        token_BL: Array,
        valid_BL: Array,
        position_BL: Array | None,
        memory: Any,
        at: Array | int,
    ) -> tuple[Array, Any, dict[str, Array] | None]:
        """Logits of the token with index ``at``, the memory with these tokens, and its experts."""
        known = {} if position_BL is None else {"position_BL": position_BL}
        batch, length = token_BL.shape
        context = Context.of(
            batch,
            length,
            token_BL=token_BL,
            valid_BL=valid_BL,
            row_B=jnp.zeros(batch, jnp.int32),  # a text has the same noise in every batch
            step=weights.step,
            key=jax.random.fold_in(jax.random.wrap_key_data(weights.key), weights.step),
            **known,
        )

        def tap(x_BLD: Array, info: MoEInfo) -> dict[str, Array]:
            def own(x_GTK: Array) -> Array:
                x_BLK = x_GTK.reshape(batch, length, -1)
                return jax.lax.dynamic_index_in_dim(x_BLK, at, axis=1, keepdims=False)

            return {"expert": own(info.routing.expert_GTK), "weight": own(info.routing.weight_GTK)}

        model = self._task.built_apart(weights.params)
        logits_B1V, aux = model(
            token_BL,
            context,
            weights.gate_state,
            False,
            tap if self._with_visits else None,
            memory,
            at,
        )
        logits_BV = logits_B1V[:, 0]
        allowed_V = jnp.arange(logits_BV.shape[-1]) < self._vocab
        visits = aux.taps if self._with_visits else None
        return jnp.where(allowed_V, logits_BV, -jnp.inf), aux.memory, visits

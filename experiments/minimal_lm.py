"""A mixture-of-experts language model in one file: the place to start reading.

A byte-level decoder whose feed-forward layers are `moejax.MoE`, trained with optax in a plain loop
on the built-in corpus, the source of Python's standard library. There is no config system, no
checkpoint and no mesh here; `moejax train` has these. Read from top to bottom: data, model, loss,
train step, loop.

    python experiments/minimal_lm.py --steps 300

takes about two minutes on two busy CPU cores and ends at a held-out loss of 1.731 nats per byte,
where a bigram model of the same rows has 2.485 and a trigram model 1.911. (Python 3.11.7: the
corpus, and with it the numbers, vary a little between Python versions.)

Array names end in their axes: B sequences, L positions, D model width, H heads, I head width,
V byte values, E experts.
"""

import argparse
import math
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import moejax
from moejax.data.baselines import ngram_baselines
from moejax.data.load import load_corpus

# ------------------------------------------------------------------------------------------- Data

BATCH, LENGTH, VOCAB = 16, 128, 256


def train_batches(train_N: np.ndarray, seed: int) -> Iterator[np.ndarray]:
    """Random windows of the training text; one byte more than the inputs, for the last target."""
    rng = np.random.default_rng(seed)
    while True:
        starts = rng.integers(len(train_N) - LENGTH, size=BATCH)
        yield np.stack([train_N[s : s + LENGTH + 1] for s in starts]).astype(np.int32)


def heldout_batches(heldout_N: np.ndarray, num_batches: int) -> list[np.ndarray]:
    """Evenly spaced windows of the held-out text, the same for every run."""
    starts = np.linspace(0, len(heldout_N) - LENGTH - 1, num_batches * BATCH).astype(int)
    rows = np.stack([heldout_N[s : s + LENGTH + 1] for s in starts]).astype(np.int32)
    return np.split(rows, num_batches)


# ------------------------------------------------------------------------------------------ Model

WIDTH, LAYERS, HEADS = 128, 3, 4
EXPERTS, EXPERT_WIDTH = 8, 128

# Each token visits the two experts with the highest sigmoid score plus bias. The bias is the gate's
# state: it grows for experts with too few tokens (Wang et al. 2024, arXiv 2408.15664).
GATE = moejax.gating.make("loss_free", k=2, bias_rate=0.01)


def rotate(x_BLHI: jax.Array) -> jax.Array:
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864)."""
    length, half = x_BLHI.shape[1], x_BLHI.shape[3] // 2
    frequency = 10_000.0 ** (-jnp.arange(half) / half)
    angle = jnp.arange(length)[:, None, None] * frequency
    first, second = jnp.split(x_BLHI, 2, axis=-1)
    return jnp.concatenate(
        [
            first * jnp.cos(angle) - second * jnp.sin(angle),
            second * jnp.cos(angle) + first * jnp.sin(angle),
        ],
        axis=-1,
    )


class Attention(nnx.Module):
    """Causal self-attention."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.query_key_value = nnx.Linear(WIDTH, 3 * WIDTH, use_bias=False, rngs=rngs)
        self.out = nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=rngs)

    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        batch, length, _ = x_BLD.shape
        heads = self.query_key_value(x_BLD).reshape(batch, length, 3, HEADS, WIDTH // HEADS)
        query_BLHI, key_BLHI, value_BLHI = (heads[:, :, i] for i in range(3))
        mixed_BLHI = jax.nn.dot_product_attention(
            rotate(query_BLHI), rotate(key_BLHI), value_BLHI, is_causal=True
        )
        return self.out(mixed_BLHI.reshape(batch, length, WIDTH))


class Block(nnx.Module):
    """Attention, then the mixture of experts, each with a norm before and a residual around it."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.attention_norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.attention = Attention(rngs=rngs)
        self.moe_norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.moe = moejax.MoE(
            WIDTH,
            EXPERT_WIDTH,
            EXPERTS,
            gate=GATE,
            transport="dropless",  # no capacity: every (token, expert) pair is computed
            rngs=rngs,
        )

    def __call__(self, x_BLD: jax.Array, gate_state, train: bool):
        x_BLD = x_BLD + self.attention(self.attention_norm(x_BLD))
        # The layer reads the gate's state and never writes it. `info` holds auxiliary losses,
        # statistics (loads, drops) and the routing itself.
        y_BLD, info = self.moe(self.moe_norm(x_BLD), gate_state=gate_state, train=train)
        return x_BLD + y_BLD, info


class LM(nnx.Module):
    """Embedding, blocks, norm; the output matrix is the embedding."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.embed_VD = nnx.Param(
            jax.random.normal(rngs.params(), (VOCAB, WIDTH)) / math.sqrt(WIDTH)
        )
        self.blocks = nnx.List([Block(rngs=rngs) for _ in range(LAYERS)])
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)

    def __call__(self, token_BL: jax.Array, gate_states: list, train: bool):
        x_BLD = self.embed_VD[...][token_BL] * math.sqrt(WIDTH)
        infos = []
        for block, gate_state in zip(self.blocks, gate_states, strict=True):
            x_BLD, info = block(x_BLD, gate_state, train)
            infos.append(info)
        return self.norm(x_BLD) @ self.embed_VD[...].T, infos


# ------------------------------------------------------------------------------------------- Loss

# The balance loss is 1 at perfect balance in every layer; the z-loss keeps router logits small.
LOAD_BALANCE, Z = 0.01, 1e-3


def cross_entropy(logits_BLV: jax.Array, target_BL: jax.Array) -> jax.Array:
    """Mean negative log-likelihood of the targets, in nats per byte."""
    return optax.softmax_cross_entropy_with_integer_labels(logits_BLV, target_BL).mean()


def objective(params, graph, gate_states, row_BL: jax.Array):
    """Cross-entropy plus auxiliary losses, and what the loop wants to know."""
    model = nnx.merge(graph, params)
    logits_BLV, infos = model(row_BL[:, :-1], gate_states, train=True)
    loss = cross_entropy(logits_BLV, row_BL[:, 1:])
    # The auxiliary losses come unweighted and are averaged over layers.
    balance = jnp.mean(jnp.array([info.losses["load_balance"] for info in infos]))
    z = jnp.mean(jnp.array([info.losses["z"] for info in infos]))
    return loss + LOAD_BALANCE * balance + Z * z, (loss, [info.stats for info in infos])


# ------------------------------------------------------------------------------------- Train step


def make_steps(graph, optimizer: optax.GradientTransformation):
    """The jitted update and the jitted evaluation."""

    @jax.jit
    def train_step(params, opt_state, gate_states, row_BL):
        grads, (loss, stats) = jax.grad(objective, has_aux=True)(params, graph, gate_states, row_BL)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        # After the update of the parameters each gate sees the loads of the batch, and moves its
        # bias for the next one.
        blocks = nnx.merge(graph, params).blocks
        gate_states = [
            block.moe.update_gate_state(state, stat)
            for block, state, stat in zip(blocks, gate_states, stats, strict=True)
        ]
        load_E = jnp.sum(jnp.stack([stat.load_E for stat in stats]), axis=0)
        metrics = {"loss": loss, "busiest": load_E.max() / load_E.mean()}
        return optax.apply_updates(params, updates), opt_state, gate_states, metrics

    @jax.jit
    def eval_loss(params, gate_states, row_BL):
        logits_BLV, _ = nnx.merge(graph, params)(row_BL[:, :-1], gate_states, train=False)
        return cross_entropy(logits_BLV, row_BL[:, 1:])

    return train_step, eval_loss


# ------------------------------------------------------------------------------------------- Loop


def train(steps: int, learning_rate: float = 5e-3, seed: int = 0) -> dict[str, float]:
    """Trains a model and returns its held-out loss beside those of n-gram models."""
    corpus = load_corpus()  # bytes; near copies of held-out files are not in the training text
    batches = train_batches(corpus.train_N, seed)
    heldout = heldout_batches(corpus.heldout_N, num_batches=16)

    model = LM(rngs=nnx.Rngs(seed))
    gate_states = [block.moe.init_gate_state() for block in model.blocks]
    graph, params = nnx.split(model)
    print(f"{sum(p.size for p in jax.tree.leaves(params)):,} parameters")

    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, min(30, steps // 2), steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.95))
    opt_state = optimizer.init(params)
    train_step, eval_loss = make_steps(graph, optimizer)

    start = time.perf_counter()
    for step in range(1, steps + 1):
        params, opt_state, gate_states, metrics = train_step(
            params, opt_state, gate_states, next(batches)
        )
        if step % 20 == 0 or step in (1, steps):
            print(
                f"step {step:4d}  loss {metrics['loss']:.3f}  "
                f"busiest expert {metrics['busiest']:.2f} x mean load  "
                f"{time.perf_counter() - start:.0f} s"
            )

    held_out = float(np.mean([eval_loss(params, gate_states, rows) for rows in heldout]))
    return {"model": held_out, **ngram_baselines(corpus.train_N, heldout, VOCAB)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--seed", type=int, default=0)
    losses = train(**vars(parser.parse_args()))
    print("held-out nats per byte: " + ", ".join(f"{k} {v:.3f}" for k, v in losses.items()))


if __name__ == "__main__":
    main()

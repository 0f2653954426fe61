"""A dense block of the stack in numpy and float64, written from the formulas."""

import numpy as np

from tests.layers.test_attention import rope_formula


def normed(x, scale, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def softmax(scores):
    shifted = np.exp(scores - scores.max())
    return shifted / shifted.sum()


def head(query_LI, key_LI, value_LI, position_L, seen_L, theta, causal=True):
    """One head, query by query: softmax over the keys that are seen (and not later)."""
    turned = [rope_formula(x[None, :, None], position_L[None], theta) for x in (query_LI, key_LI)]
    query_LI, key_LI = (x[0, :, 0] for x in turned)
    mixed = np.zeros(value_LI.shape)
    for t in range(len(query_LI)):
        keys = [s for s in range(len(key_LI)) if seen_L[s] and (s <= t or not causal)]
        if keys:
            scores = [query_LI[t] @ key_LI[s] / np.sqrt(query_LI.shape[-1]) for s in keys]
            mixed[t] = softmax(np.array(scores)) @ value_LI[keys]
    return mixed


def change(block, x_LD, position_L, config):
    """The block's update of a sequence of valid tokens at these positions."""
    leaf = lambda p: np.asarray(p[...], np.float64)
    attention, ffn = block.attention, block.ffn
    at_first = normed(x_LD, leaf(block.attention_norm.scale_D), config.norm_eps)
    mixed = np.zeros(x_LD.shape)
    for h in range(leaf(attention.query_DHI).shape[1]):
        query, key, value = (
            at_first @ leaf(w)[:, h]
            for w in (attention.query_DHI, attention.key_DJI, attention.value_DJI)
        )
        seen = np.ones(len(x_LD), bool)
        turn = (position_L, seen, config.attention.rope.theta, config.attention.causal)
        mixed += head(query, key, value, *turn) @ leaf(attention.out_HID)[h]
    at_second = normed(x_LD + mixed, leaf(block.ffn_norm.scale_D), config.norm_eps)
    gate = at_second @ leaf(ffn.gate_DF)
    hidden = gate / (1 + np.exp(-gate)) * (at_second @ leaf(ffn.up_DF))
    return mixed + hidden @ leaf(ffn.down_FD)

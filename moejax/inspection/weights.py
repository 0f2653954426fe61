"""Routers and experts by their weights, read block by block."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from moejax.inspection.stored import InLayer, Model, by_layer
from moejax.train.parameters import EXPERT_WEIGHTS

BLOCK_BYTES = 64 * 2**20
"""Most float32 bytes of experts that are in memory at once, unless one row of all experts is
larger."""


class Similarity(NamedTuple):
    """The cosines of all pairs of experts of a layer, with an expert's weights as one vector."""

    mean: float
    most: float
    pair: tuple[int, int]
    """The most similar experts."""


def router_norms(model: Model) -> dict[int, Float[np.ndarray, " E"]]:
    """The Euclidean norm of each expert's row of the router (a column of W in x W), by layer."""
    norms = {}
    for layer, own in by_layer(model.arrays).items():
        router = own.get("ffn/router/router_DE")
        if router is not None:
            norms[layer] = np.linalg.norm(router.read(), axis=0)
    return norms


def similarities(model: Model) -> Iterator[tuple[int, Similarity]]:
    """The similarity of the experts of each layer with more than one.

    Memory: a block of the experts, and E x E products.
    """
    for layer, own in by_layer(model.arrays).items():
        matrices = [own[f"ffn/{name}"] for name in EXPERT_WEIGHTS if f"ffn/{name}" in own]
        if matrices and matrices[0].shape[0] > 1:
            yield layer, _similarity(np.sum([_products(x) for x in matrices], axis=0))


def _products(matrix: InLayer) -> Float[np.ndarray, "E E"]:
    """The inner products of the experts' parts of one array [E, ...]."""
    experts, rows = matrix.shape[:2]
    per_row = 4 * int(np.prod(matrix.shape)) // rows
    step = max(1, BLOCK_BYTES // per_row)
    total_EE = np.zeros((experts, experts))
    for begin in range(0, rows, step):
        block = slice(begin, min(begin + step, rows))
        part_EN = matrix.read((slice(None), block)).reshape(experts, -1)
        total_EE += part_EN @ part_EN.T
    return total_EE


def _similarity(products_EE: Float[np.ndarray, "E E"]) -> Similarity:
    norm_E = np.sqrt(np.diag(products_EE))
    scale_EE = np.outer(norm_E, norm_E)
    cosine_EE = np.divide(products_EE, scale_EE, out=np.zeros_like(scale_EE), where=scale_EE > 0)
    first, second = np.triu_indices(len(cosine_EE), k=1)
    cosine_N = cosine_EE[first, second]
    largest = int(np.argmax(cosine_N))
    pair = int(first[largest]), int(second[largest])
    return Similarity(float(cosine_N.mean()), float(cosine_N[largest]), pair)

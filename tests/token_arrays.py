"""Token arrays written as the other programs write them."""

import struct
from pathlib import Path

import numpy as np

MEGATRON_CODES = {
    "uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "float64": 6, "float32": 7,
    "uint16": 8,
}  # fmt: skip
"""Megatron-LM, megatron/core/datasets/indexed_dataset.py, class DType."""


def nanogpt(path: Path, documents: list[np.ndarray], eot: int | None = 0) -> np.ndarray:
    """data/openwebtext/prepare.py: a uint16 memory map, every document with the token behind it."""
    tokens = np.concatenate([np.append(d, eot) if eot is not None else d for d in documents])
    array = np.memmap(path, dtype=np.uint16, mode="w+", shape=(len(tokens),))
    array[:] = tokens
    array.flush()
    return tokens


def llmc(path: Path, documents: list[np.ndarray], eot: int = 0, llama: bool = False) -> np.ndarray:
    """dev/data/fineweb.py and data_common.write_datafile: the token stands before documents."""
    tokens = np.concatenate([np.append(eot, document) for document in documents])
    header = np.zeros(256, dtype=np.int32)
    header[:3] = (20240801, 7, len(tokens)) if llama else (20240520, 1, len(tokens))
    with open(path, "wb") as file:
        file.write(header.tobytes())
        file.write(tokens.astype(np.uint32 if llama else np.uint16).tobytes())
    return tokens


def megatron(
    prefix: Path,
    documents: list[list[np.ndarray]],
    dtype: type = np.uint16,
    modes: bool = False,
) -> np.ndarray:
    """IndexedDatasetBuilder: documents are lists of sequences, written one after the other."""
    lengths, pointers, bounds, at = [], [], [0], 0
    with open(f"{prefix}.bin", "wb") as file:
        for document in documents:
            for sequence in document:
                file.write(np.array(sequence, dtype=dtype).tobytes(order="C"))
                lengths.append(len(sequence))
                pointers.append(at)
                at += len(sequence) * np.dtype(dtype).itemsize
            bounds.append(len(lengths))
    with open(f"{prefix}.idx", "wb") as file:
        file.write(b"MMIDIDX\x00\x00")
        file.write(struct.pack("<Q", 1))
        file.write(struct.pack("<B", MEGATRON_CODES[np.dtype(dtype).name]))
        file.write(struct.pack("<Q", len(lengths)))
        file.write(struct.pack("<Q", len(bounds)))
        file.write(np.array(lengths, dtype=np.int32).tobytes(order="C"))
        file.write(np.array(pointers, dtype=np.int64).tobytes(order="C"))
        file.write(np.array(bounds, dtype=np.int64).tobytes(order="C"))
        if modes:
            file.write(np.zeros(len(lengths), dtype=np.int8).tobytes(order="C"))
    return np.concatenate([sequence for document in documents for sequence in document])


def random_documents(count: int, seed: int = 0, vocab: int = 300) -> list[np.ndarray]:
    """Documents of 5 to 60 ids in [1, vocab)."""
    rng = np.random.default_rng(seed)
    return [rng.integers(1, vocab, rng.integers(5, 60)) for _ in range(count)]

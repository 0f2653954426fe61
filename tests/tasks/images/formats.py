"""The same labelled pictures in every format, each written by its own library."""

import gzip
import io
import json
import struct
import tarfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

NAMES = ("cat", "dog", "eel")


def make(seed: int, shape: tuple[int, ...], counts=(4, 5, 6)) -> list[tuple[np.ndarray, int]]:
    """Pictures with labels, class by class."""
    rng = np.random.default_rng(seed)
    return [
        (rng.integers(0, 256, shape, dtype=np.uint8), label)
        for label, count in enumerate(counts)
        for _ in range(count)
    ]


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def save_folder(root: Path, pictures, names=NAMES) -> Path:
    for i, (pixels, label) in enumerate(pictures):
        (root / names[label]).mkdir(parents=True, exist_ok=True)
        (root / names[label] / f"{i:04}.png").write_bytes(png(pixels))
    return root


def save_parquet(path: Path, pictures, names=NAMES, image="image", label="label", plain=False):
    """As ``datasets`` writes it, or without its description and with plain bytes."""
    data = [png(pixels) for pixels, _ in pictures]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    column = pa.array(data) if plain else pa.array([{"bytes": d, "path": None} for d in data], kind)
    labels = pa.array([label for _, label in pictures], pa.int64())
    features = {image: {"_type": "Image"}, label: {"names": list(names), "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    if plain:
        metadata, labels = {}, pa.array([names[label] for _, label in pictures])
    table = pa.table({image: column, label: labels}).replace_schema_metadata(metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=4)


def webdataset() -> Any:
    with warnings.catch_warnings():  # of packages that it imports where they are installed
        warnings.simplefilter("ignore")
        return pytest.importorskip("webdataset")


def save_tars(folder: Path, pictures, start="train", label="cls", maxcount=4):
    folder.mkdir(parents=True, exist_ok=True)
    with webdataset().ShardWriter(
        str(folder / f"{start}-%06d.tar"), maxcount=maxcount, verbose=0
    ) as writer:
        for i, (pixels, number) in enumerate(pictures):
            value = number if label == "cls" else {"label": number, "file": f"{i}.png"}
            writer.write({"__key__": f"{i:04}", "png": pixels, label: value, "txt": "a caption"})


def idx(array: np.ndarray) -> bytes:
    """An array of unsigned bytes as http://yann.lecun.com/exdb/mnist describes the format."""
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def save_idx(folder: Path, side: str, pictures, packed=False):
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in (
        ("images-idx3", np.stack([pixels for pixels, _ in pictures])),
        ("labels-idx1", np.array([label for _, label in pictures], np.uint8)),
    ):
        content = gzip.compress(idx(array)) if packed else idx(array)
        (folder / f"{side}-{name}-ubyte{'.gz' if packed else ''}").write_bytes(content)


def cifar(pictures, coarse=False) -> bytes:
    """Records as https://www.cs.toronto.edu/~kriz/cifar.html describes them."""
    records = b""
    for pixels, label in pictures:
        records += bytes([7, label] if coarse else [label])
        for channel in range(3):
            records += pixels[:, :, channel].tobytes()
    return records


def save_cifar10(folder: Path, train, test, names=NAMES):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(5):
        (folder / f"data_batch_{i + 1}.bin").write_bytes(cifar(train[3 * i : 3 * i + 3]))
    (folder / "test_batch.bin").write_bytes(cifar(test))
    (folder / "batches.meta.txt").write_text("\n".join(names) + "\n\n")
    (folder / "readme.html").write_text("<html>")


def save_cifar100(folder: Path, train, test, names=NAMES):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.bin").write_bytes(cifar(train, coarse=True))
    (folder / "test.bin").write_bytes(cifar(test, coarse=True))
    (folder / "fine_label_names.txt").write_text("\n".join(names) + "\n")
    (folder / "coarse_label_names.txt").write_text("fish\n")


def write_tar(path: Path, members) -> None:
    """An archive of (name, content); a link where the content is None."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            if data is None:
                info.type, info.linkname = tarfile.SYMTYPE, "elsewhere"
                tar.addfile(info)
                continue
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))

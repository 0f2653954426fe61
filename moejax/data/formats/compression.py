"""Compressed files as streams of bytes: gzip, bzip2, xz and Zstandard.

A file may consist of several compressed parts, as ``cat a.gz b.gz`` makes; its bytes are those of
all parts.
"""

import bz2
import functools
import io
import lzma
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple, Protocol, runtime_checkable

CHUNK = 1 << 18
STEP, SMALL_STEP = 1 << 15, 1 << 12
"""Bytes that a decompressor takes and gives at a time; fewer input bytes near damage."""


class Damaged(Exception):
    """Compressed data that end early or cannot be decompressed; the message is the reason."""


class Compression(NamedTuple):
    """A way of compressing files: its name, the endings of file names, and a regular expression of
    the bytes that its files begin with."""

    name: str
    suffixes: tuple[str, ...]
    mark: bytes


GZIP = Compression("gzip", ("gz", "gzip"), rb"\x1f\x8b")
BZIP2 = Compression("bzip2", ("bz2",), rb"BZh[1-9](1AY&SY|\x17rE8P\x90)")
XZ = Compression("xz", ("xz", "lzma"), rb"\xfd7zXZ\0|\x5d\0\0")
ZSTANDARD = Compression("Zstandard", ("zst", "zstd"), rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18")
COMPRESSIONS = (GZIP, BZIP2, XZ, ZSTANDARD)


def compression_of(name: str) -> Compression | None:
    """The compression that a file's name ends in."""
    suffix = name.lower().rpartition(".")[2] if "." in name else ""
    return next((c for c in COMPRESSIONS if suffix in c.suffixes), None)


def open_bytes(path: str, compression: Compression | None = None) -> io.BufferedReader:
    """The decompressed bytes of a file.

    Bytes that precede damage are read before ``Damaged`` is raised, down to the last one that the
    decompressor gives. Raises OSError if the file cannot be opened.
    """
    if compression is None:
        return io.BufferedReader(io.FileIO(path), CHUNK)
    return io.BufferedReader(_Decompressed(path, compression), CHUNK)


@runtime_checkable
class _Reader(Protocol):
    def read(self, most: int) -> bytes: ...


class _Decompressed(io.RawIOBase):
    """The decompressed bytes of a file, which end with the exception ``Damaged`` if need be.

    A decompressor that meets damage throws away what it made of the same input before. Therefore
    the last part is read once more, one byte at a time.
    """

    def __init__(self, path: str, compression: Compression):
        self._path, self._compression = path, compression
        self._at, self._is_careful = 0, False
        self._open(STEP)

    def _open(self, chunk: int) -> None:
        self._file = open(self._path, "rb", buffering=CHUNK)
        self._reader = _reader(self._file, self._compression, chunk)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._read(min(len(buffer), STEP))
        buffer[: len(data)] = data
        return len(data)

    def _read(self, most: int) -> bytes:
        if not self._is_careful:
            try:
                data = self._reader.read(most)
                self._at += len(data)
                return data
            except _DAMAGE:
                self._go_back()
        try:
            return self._reader.read(1)
        except _DAMAGE as error:
            raise Damaged(_reason(self._compression.name, error)) from error

    def _go_back(self) -> None:
        """Decompress the part before the damage again; then continue in steps of one byte."""
        self._file.close()
        self._is_careful = True
        self._open(SMALL_STEP)  # leaves little input in the decompressor
        left = self._at
        try:
            while left > 0:
                left -= len(self._reader.read(min(left, STEP)))
        except _DAMAGE as error:
            raise Damaged(_reason(self._compression.name, error)) from error
        if isinstance(self._reader, _Parts):
            self._reader.chunk = 1

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


_DAMAGE = (EOFError, OSError, ValueError, zlib.error, lzma.LZMAError)
"""Exceptions of decompressors."""


def _reason(name: str, error: Exception) -> str:
    if isinstance(error, EOFError) or "Truncated" in str(error):
        return f"the {name} data end early, as in an incomplete copy or download"
    return f"the {name} data are damaged ({error})"


def _reader(file: BinaryIO, compression: Compression, chunk: int) -> _Reader:
    if compression == ZSTANDARD:
        return _Zstandard(file)
    return _Parts(file, _CODECS[compression.name], chunk)


class _Inflate:
    """zlib's decompressor of gzip, with the methods of those of bz2 and lzma."""

    def __init__(self):
        self._zlib = zlib.decompressobj(wbits=31)

    def decompress(self, data: bytes, most: int) -> bytes:
        return self._zlib.decompress(self._zlib.unconsumed_tail + data, most)

    @property
    def needs_input(self) -> bool:
        return not self._zlib.unconsumed_tail

    @property
    def eof(self) -> bool:
        return self._zlib.eof

    @property
    def unused_data(self) -> bytes:
        return self._zlib.unused_data


_CODECS: dict[str, Callable[[], Any]] = {
    "gzip": _Inflate,
    "bzip2": bz2.BZ2Decompressor,
    "xz": functools.partial(lzma.LZMADecompressor, lzma.FORMAT_AUTO),
}


class _Parts:
    """Decompressed parts, one after another; zeros between and behind them are padding."""

    def __init__(self, file: BinaryIO, new: Callable[[], Any], chunk: int):
        self._file, self._new, self.chunk = file, new, chunk
        self._codec, self._next = new(), b""

    def read(self, most: int) -> bytes:
        while True:
            if self._codec.eof:
                self._next = self._next or self._codec.unused_data
                while not (rest := self._next.lstrip(b"\0")):
                    self._next = self._file.read(self.chunk)
                    if not self._next:
                        return b""
                self._codec, self._next = self._new(), rest
            data = b""
            if self._next or not self._codec.needs_input:
                data, self._next = self._next, b""
            else:
                data = self._file.read(self.chunk)
            is_end = self._codec.needs_input and not data
            if out := self._codec.decompress(data, most):
                return out
            if is_end and not self._codec.eof:
                raise EOFError


class _Zstandard:
    def __init__(self, file: BinaryIO):
        import pyarrow  # only where it is needed: it is slow to import

        self._stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(file), "zstd")

    def read(self, most: int) -> bytes:
        return self._stream.read(most)

"""Compressed plain text: the whole file is one document."""

import dataclasses
from collections.abc import Iterator

from moejax.data.documents import Document
from moejax.data.formats.compression import CHUNK, Compression, Damaged, open_bytes
from moejax.data.formats.format import Bad, Record, Span
from moejax.errors import UserError


@dataclasses.dataclass(frozen=True)
class CompressedText:
    """A compressed file of text. Its bytes are given as they are, like those of a file that is not
    compressed; memory is bounded by the document."""

    compression: Compression

    @property
    def name(self) -> str:
        return f"plain text, {self.compression.name}"

    def spans(self, file: Document, size: int) -> list[Span]:
        return [Span(0, file.size)]

    def read(self, file: Document, span: Span, text_field: str) -> Iterator[Record | Bad]:
        try:
            with open_bytes(file.path, self.compression) as stream:
                text = b"".join(iter(lambda: stream.read1(CHUNK), b""))
            yield Record(file.name, text)
        except Damaged as error:
            yield Bad(file.name, str(error))
        except OSError as error:
            raise UserError(
                f"{file.field}: cannot read {file.path!r}: {error.strerror or error}"
            ) from error

"""Compressed files as streams: gzip by the standard library, zstd by zstandard, either in flat memory."""

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, cast

import zstandard

from producer.file_format import Compression

#: What reading a compressed file raises when it breaks off (EOFError) or is not what it should be.
DAMAGES = (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError)

#: Bytes of zstd taken at a time: however well it is compressed, they become no more than 64 MiB.
_ZSTD_BLOCK = 2048
_BUFFER_BYTES = 1 << 16
#: Levels at which writing is not slower than what is written comes along.
_GZIP_LEVEL = 6
_ZSTD_LEVEL = 3


def decompressed(file: BinaryIO, compression: Compression | None) -> BinaryIO:
    """The content as a stream that raises one of DAMAGES where the file is broken. An empty file has no content."""
    if compression == "gzip":
        return cast(BinaryIO, gzip.GzipFile(fileobj=file, mode="rb"))
    if compression == "zstd":
        return cast(BinaryIO, io.BufferedReader(_ZstdReader(file), _BUFFER_BYTES))
    return file


@contextmanager
def compressed(file: BinaryIO, compression: Compression | None) -> Iterator[BinaryIO]:
    """What is written to the stream goes into the file, which stays open; it is whole when the context ends."""
    if compression is None:
        yield file
        return
    if compression == "gzip":
        # No time and no name: equal Results are equal bytes.
        stream = cast(BinaryIO, gzip.GzipFile("", "wb", _GZIP_LEVEL, file, mtime=0))
    else:
        stream = cast(BinaryIO, zstandard.ZstdCompressor(_ZSTD_LEVEL).stream_writer(file, closefd=False))
    with stream:
        yield stream


class _ZstdReader(io.RawIOBase):
    """One frame after the other; zstandard's own reader takes a frame that breaks off for the end."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._unread = b""
        self._content = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._content:
            block = self._unread or self._file.read(_ZSTD_BLOCK)
            if not block:
                if self._frame is not None:
                    raise EOFError
                return 0
            self._frame = self._frame or zstandard.ZstdDecompressor().decompressobj()
            self._content = memoryview(self._frame.decompress(block))
            self._unread = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        taken = self._content[: len(buffer)]
        buffer[: len(taken)] = taken
        self._content = self._content[len(taken) :]
        return len(taken)

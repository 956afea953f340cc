"""Bytes of a file, decompressed: every member or frame of it, and an error where it is damaged."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO

import pyarrow as pa

DAMAGE = (EOFError, OSError, zlib.error, lzma.LZMAError, pa.ArrowException)  # of OSErrors those without a number
CHUNK_BYTES = 1 << 20
_DECOMPRESSORS: dict[str, Callable[[], Any]] = {".bz2": bz2.BZ2Decompressor, ".xz": lzma.LZMADecompressor}


class ByteStream:
    """Reads lines and chunks from byte ``offset`` of the content on, forwards only.

    Args:
        path: the file.
        compression: its suffix, or an empty string.
        offset: decompressed bytes to skip.
        replace_cr: take each carriage return for a line feed.
    """

    def __init__(self, path: str, compression: str = "", offset: int = 0, *, replace_cr: bool = False) -> None:
        self._raw: BinaryIO = open(path, "rb")  # noqa: SIM115 - closed by close()
        try:
            stream = self._decompressed(compression)
            if not compression:
                stream.seek(offset)
            else:
                skip(stream, offset)
        except BaseException:
            self._raw.close()
            raise
        self._stream = io.BufferedReader(_LineFeeds(stream), CHUNK_BYTES) if replace_cr else stream
        self.readline = self._stream.readline
        self.read = self._stream.read
        self.read1 = self._stream.read1

    def consumed(self) -> int:
        """Bytes of the file on disk that were read, roughly."""
        return self._raw.tell() if not self._raw.closed else 0

    def close(self) -> None:
        self._stream.close()
        self._raw.close()

    def _decompressed(self, compression: str) -> Any:
        if compression == ".gz":
            return gzip.open(self._raw)
        if compression in _DECOMPRESSORS:
            return io.BufferedReader(_Members(self._raw, _DECOMPRESSORS[compression]), CHUNK_BYTES)
        if compression == ".zst":
            frames = pa.CompressedInputStream(pa.PythonFile(self._raw, mode="r"), "zstd")
            return io.BufferedReader(frames, CHUNK_BYTES)
        return self._raw


def skip(stream: Any, count: int) -> None:
    """Read and drop so many bytes."""
    while count:
        piece = stream.read(min(count, CHUNK_BYTES))
        if not piece:
            return
        count -= len(piece)


class _LineFeeds(io.RawIOBase):
    """A stream with a line feed for each carriage return; offsets stay."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece = self._stream.read(len(buffer)).replace(b"\r", b"\n")
        buffer[: len(piece)] = piece
        return len(piece)


class _Members(io.RawIOBase):
    """All streams of an .xz or a .bz2 file. Python's own readers drop what they cannot read behind the first without a
    word."""

    def __init__(self, raw: BinaryIO, new: Callable[[], Any]) -> None:
        self._raw, self._left, self._new = raw, b"", new
        self._decompressor = new()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            if self._decompressor.eof:
                self._left = (self._decompressor.unused_data + self._left).lstrip(b"\0")  # padding between streams
                while not self._left and (piece := self._raw.read(CHUNK_BYTES)):
                    self._left = piece.lstrip(b"\0")
                if not self._left:
                    return 0
                self._decompressor = self._new()
            piece = b""
            if self._decompressor.needs_input:
                piece = self._left or self._raw.read(CHUNK_BYTES)
                self._left = b""
                if not piece:
                    raise EOFError("the compressed file ends before its end mark")
            found = self._decompressor.decompress(piece, len(buffer))
            if found:
                buffer[: len(found)] = found
                return len(found)

"""Bytes of a file, decompressed: every member or frame of it, and an error where it is damaged."""

from __future__ import annotations

import gzip
import io
import lzma
import zlib
from typing import Any, BinaryIO

DAMAGE = (EOFError, OSError, zlib.error, lzma.LZMAError)  # of OSErrors those without a number
CHUNK_BYTES = 1 << 20
_ARROW_NAMES = {".bz2": "bz2", ".zst": "zstd"}  # Python's bz2 takes what follows a stream and is damaged for its end


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
        if compression == ".xz":
            return io.BufferedReader(_Xz(self._raw), CHUNK_BYTES)
        if compression in _ARROW_NAMES:
            import pyarrow as pa

            source = pa.PythonFile(self._raw, mode="r")
            return io.BufferedReader(pa.CompressedInputStream(source, _ARROW_NAMES[compression]), CHUNK_BYTES)
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


class _Xz(io.RawIOBase):
    """All streams of an .xz file. Python's own reader drops what it cannot read behind the first without a word."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw, self._left = raw, b""
        self._decompressor = lzma.LZMADecompressor()

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
                self._decompressor = lzma.LZMADecompressor()
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

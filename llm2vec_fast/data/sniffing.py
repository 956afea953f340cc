"""What a file's first bytes say of it: that it is not what its name tells, how its lines end, what its JSON is."""

from __future__ import annotations

import json
from pathlib import Path

from llm2vec_fast.data.streams import DAMAGE, ByteStream

HEAD_BYTES = 64 << 10
LINE_BYTES = 64 << 20
_LFS = b"version https://git-lfs.github.com/spec/"
_SIGNATURES = {
    b"\xff\xfe": "is UTF-16: convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)",
    b"\xfe\xff": "is UTF-16: convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)",
    b"\x1f\x8b": "is compressed by gzip: let its name end in .gz",
    b"\x28\xb5\x2f\xfd": "is compressed by zstd: let its name end in .zst",
    b"\xfd7zXZ\x00": "is compressed by xz: let its name end in .xz",
    b"BZh": "is compressed by bzip2: let its name end in .bz2",
    b"PK\x03\x04": "is a zip archive or a spreadsheet: unpack it, or save it as CSV",
    b"PAR1": "is a Parquet file: let its name end in .parquet",
}
_ZEROS = 0.2  # the share of zero bytes from which a text is taken for UTF-16


def head_of(path: str, compression: str) -> bytes:
    """The first bytes of the content, of a damaged file as many as there are.

    Raises:
        OSError: the disk does not give the file.
    """
    head, stream = b"", ByteStream(path, compression)
    try:
        while len(head) < HEAD_BYTES and (piece := stream.read1(HEAD_BYTES)):
            head += piece
    except DAMAGE as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
    finally:
        stream.close()
    return head[:HEAD_BYTES]


def what_it_is_instead(head: bytes, kind: str) -> str | None:
    """How the sentence goes on that begins with the file's name, where it is not of format ``kind``."""
    if head.startswith(_LFS):
        return "is a git-lfs pointer, not the file itself: fetch it with git lfs pull"
    if kind == "parquet":
        return None
    for signature, sentence in _SIGNATURES.items():
        if head.startswith(signature):
            return sentence
    if head.count(0) > _ZEROS * len(head):
        return "is no text, or UTF-16: convert it to UTF-8"
    return None


def has_mac_line_ends(head: bytes) -> bool:
    """Whether lines end in carriage returns alone."""
    return b"\r" in head and b"\n" not in head


def is_json_list(path: str, compression: str) -> bool:
    """Whether a file of JSON is one list, and not a value a line."""
    stream = ByteStream(path, compression)
    try:
        line = _first_line(stream)
        if not line.startswith(b"["):
            return False
        whole = _parsed(line)
        return whole is None or not _first_line(stream)  # a list a line, of which the first is one
    finally:
        stream.close()


def holds_no_rows(path: Path) -> bool:
    """Whether a .json file is one object, such as settings are; one that cannot be read is left to who reads it."""
    suffix = path.suffix.lower()
    compression = "" if suffix == ".json" else suffix
    try:
        return is_one_object(str(path), compression)
    except DAMAGE:
        return False


def is_one_object(path: str, compression: str) -> bool:
    """Whether a file of JSON is one object over several lines, or on one and alone."""
    stream = ByteStream(path, compression)
    try:
        line = _first_line(stream)
        if not line.startswith(b"{"):
            return False
        following = _first_line(stream)
        return not following or (_parsed(line) is None and not following.startswith(b"{"))
    finally:
        stream.close()


def _first_line(stream: ByteStream) -> bytes:
    """The first line that is not blank, of a long one the beginning; no bytes at the end, or where damage is."""
    try:
        while line := stream.readline(LINE_BYTES):
            line = line.removeprefix(b"\xef\xbb\xbf").strip()
            if line:
                return line
    except DAMAGE as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
    return b""


def _parsed(line: bytes) -> list | dict | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, list | dict) else None

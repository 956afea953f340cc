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
    line, following = _first_lines(path, compression)
    return line.startswith(b"[") and (not following or _parsed(line) is None)  # else a list a line


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
    line, following = _first_lines(path, compression)
    if not line.startswith(b"{"):
        return False
    return not following or (_parsed(line) is None and not following.startswith(b"{"))


def _first_lines(path: str, compression: str) -> tuple[bytes, bytes]:
    """The first two lines that are not blank, of what can be read; no bytes where there are none."""
    content, stream = bytearray(), ByteStream(path, compression)
    found: list[bytes] = []
    try:
        while len(found) < 2 and len(content) < LINE_BYTES and (piece := stream.read1(HEAD_BYTES)):
            content += piece
            if b"\n" in piece:
                found = [line for line in map(_bare, content.split(b"\n")[:-1]) if line][:2]
    except DAMAGE as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
    finally:
        stream.close()
    found += [line for line in [_bare(content.rpartition(b"\n")[2])] if line]
    return (*found, b"", b"")[:2]


def _bare(line: bytearray) -> bytes:
    return bytes(line).removeprefix(b"\xef\xbb\xbf").strip()


def _parsed(line: bytes) -> list | dict | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, list | dict) else None

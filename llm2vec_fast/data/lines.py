"""Lines of a text file: decoded, numbered, and with what is wrong with them."""

from __future__ import annotations

from llm2vec_fast.data.inputs import InputFile
from llm2vec_fast.data.rows import MAX_ROW_BYTES
from llm2vec_fast.data.sniffing import has_mac_line_ends, head_of, what_it_is_instead
from llm2vec_fast.data.streams import ByteStream
from llm2vec_fast.errors import InputError

_MARK = "\ufeff"  # a byte order mark: at the beginning, and where files that begin with one were joined


class Lines:
    """Decoded lines with their line ends, from a byte offset on; ``problem`` tells what is wrong with those since
    `forget`: bytes that are not UTF-8, or a line of more than MAX_ROW_BYTES.

    Args:
        file: a text file; carriage returns alone end lines where it has no other ends.
        offset: decompressed bytes to skip.
        number: lines that these are.

    Raises:
        InputError: the file is not what its name tells.
    """

    def __init__(self, file: InputFile, offset: int = 0, number: int = 0) -> None:
        head = head_of(file.path, file.compression)
        wrong = what_it_is_instead(head, file.format)
        if wrong is not None:
            raise InputError(f"{file.shown} {wrong}")
        self._stream = ByteStream(file.path, file.compression, offset, replace_cr=has_mac_line_ends(head))
        self.offset = offset
        self.number = number
        self.problem: str | None = None
        self.consumed = self._stream.consumed
        self.close = self._stream.close

    def __iter__(self) -> Lines:
        return self

    def __next__(self) -> str:
        line = self._stream.readline(MAX_ROW_BYTES)
        if not line:
            raise StopIteration
        start, self.offset = self.offset, self.offset + len(line)
        self.number += 1
        if len(line) == MAX_ROW_BYTES and not line.endswith(b"\n"):
            line = self._skip_rest(start)
        try:
            return line.decode().removeprefix(_MARK)
        except UnicodeDecodeError as error:
            bad, place = error.object[error.start], start + error.start
            self.problem = self.problem or f"byte 0x{bad:02x} at byte {place} of the file is not UTF-8"
            return line.decode("utf-8", "replace")

    def forget(self) -> str | None:
        """The problem since the last call, if any."""
        problem, self.problem = self.problem, None
        return problem

    def _skip_rest(self, start: int) -> bytes:
        self.problem = f"the line that starts at byte {start} of the file is longer than {MAX_ROW_BYTES >> 20} MiB"
        line = b"-"
        while line and not line.endswith(b"\n"):
            line = self._stream.readline(MAX_ROW_BYTES)
            self.offset += len(line)
        return b""

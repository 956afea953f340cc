"""CSV and TSV as they are met: stray quotes, delimiters at the end, what Excel writes, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm2vec_fast.data.columns import Columns
from llm2vec_fast.data.delimited import Csv
from llm2vec_fast.data.inputs import find_inputs
from llm2vec_fast.data.reading import check_heads, open_reader
from llm2vec_fast.data.rows import Row
from llm2vec_fast.errors import InputError


def read(path: Path, content: str, columns: Columns = Columns("text", "id"), how: Csv = Csv()) -> list[Row]:  # noqa: B008
    path.write_text(content, newline="")
    [file] = find_inputs([str(path)])
    reader = open_reader(file, columns.asked, how)
    try:
        return list(reader)
    finally:
        reader.close()


def good(rows: list[Row]) -> list[list[str]]:
    return [list(row.values) for row in rows if row.problem is None]


def bad(rows: list[Row]) -> dict[int | None, str | None]:
    """What is wrong, by line."""
    return {row.line: row.problem for row in rows if row.problem is not None}


def test_a_stray_quote_in_a_tsv_is_a_letter(tmp_path: Path) -> None:
    lines = [f"{i}\t{chr(34) if i in (20, 150) else ''}text {i}" for i in range(200)]
    rows = read(tmp_path / "a.tsv", "id\ttext\n" + "".join(f"{line}\n" for line in lines))
    assert [f"{key}\t{text}" for text, key in good(rows)] == lines


def test_quotes_of_a_tsv_are_told_and_read_on_request(tmp_path: Path) -> None:
    content = 'id\ttext\n1\t"a ""b"" c"\n2\t"two\nlines"\n'
    rows = read(tmp_path / "a.tsv", content)
    assert good(rows)[0] == ['"a ""b"" c"', "1"]
    assert bad(rows) == {4: "the record has 1 fields, the header has 2"}
    [sentence] = check_heads(find_inputs([str(tmp_path / "a.tsv")]), Columns().asked, Csv())
    assert "a.tsv has fields in quotes, which stay in the text: --csv-quote" in sentence
    how = Csv(quote='"')
    assert good(read(tmp_path / "a.tsv", content, how=how)) == [['a "b" c', "1"], ["two\nlines", "2"]]
    assert check_heads(find_inputs([str(tmp_path / "a.tsv")]), Columns().asked, how) == []


@pytest.mark.parametrize(
    ("content", "line", "told"),
    [
        ('id,text\n1,a\n2,"b\n3,c\n', 3, "the quote that opens in line 3 is never closed: lines 3 to 4 are not read"),
        ('id,text\n1,a\n"2\n\n",b\n"x\n",",c\n4,d', 6, "the quote that opens in line 7 is never closed: lines 6 to 8"),
        ('id,text\n1,"a ""b"" \n', 2, "the quote that opens in line 2 is never closed: line 2 is not read"),
    ],
)
def test_a_quote_that_is_never_closed_is_named_by_its_line(tmp_path: Path, content: str, line: int, told: str) -> None:
    *before, last = read(tmp_path / "a.csv", content)
    assert not bad(before)
    assert (last.line, last.damaged) == (line, True)
    assert str(last.problem).startswith(told)


def test_a_quote_escaped_by_a_backslash_is_refused_until_told(tmp_path: Path) -> None:
    content = 'id,text\n1,"he said \\"hi\\" to me"\n2,b\n'
    rows = read(tmp_path / "a.csv", content)
    assert good(rows) == [["b", "2"]]
    assert "the record in line 2 cannot be read: ',' expected after '\"' (" in str(bad(rows)[2])
    assert "--csv-escape" in str(bad(rows)[2])
    told = read(tmp_path / "a.csv", content, how=Csv(escape="backslash"))
    assert good(told) == [['he said "hi" to me', "1"], ["b", "2"]]


def test_an_escape_that_is_needless_stays(tmp_path: Path) -> None:
    """A path of Windows, a regular expression: csv would drop its backslashes."""
    how = Csv(escape="\\")
    content = 'id,text\n1,"C:\\new \\"x\\" \\\\ \\d"\n2,a\\,b\n3,\\\n,c\n'
    assert good(read(tmp_path / "a.csv", content, how=how))[:2] == [['C:\\new "x" \\ \\d', "1"], ["a,b", "2"]]
    assert good(read(tmp_path / "a.tsv", "id\ttext\n1\ta\\tb\n", how=how)) == [["a\\tb", "1"]]


def test_what_a_reader_of_tsv_may_trip_over_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a\.tsv has its columns' names in quotes: give --csv-quote"):
        read(tmp_path / "a.tsv", '"id"\t"text"\n"1"\t"a"\n')
    rows = read(tmp_path / "a.csv", "id,text\n1,a\rb\n2,c\n")
    assert bad(rows) == {2: "the record in line 2 cannot be read: a carriage return stands in it outside quotes"}
    assert good(read(tmp_path / "a.tsv", "id\ttext\n1\ta\rb\n")) == [["a\rb", "1"]]


def test_quotes_may_be_others_or_none(tmp_path: Path) -> None:
    content = "id,text\n1,'a, \"b\"'\n"
    assert good(read(tmp_path / "a.csv", content, how=Csv(quote="'"))) == [['a, "b"', "1"]]
    content = 'id,text\n1,"a\n2,b"\n'
    assert good(read(tmp_path / "a.csv", content, how=Csv(quote="none"))) == [['"a', "1"], ['b"', "2"]]


def test_a_delimiter_at_the_end_of_every_row_shifts_nothing(tmp_path: Path) -> None:
    assert good(read(tmp_path / "a.csv", "id,text\n1,a,\n2,b,\n")) == [["a", "1"], ["b", "2"]]
    assert good(read(tmp_path / "a.csv", "id,text,\n1,a,\n2,b,\n")) == [["a", "1"], ["b", "2"]]
    mixed = read(tmp_path / "a.csv", "id,text\n" + "1,a,\n" * 100 + "2,b\n3,Hello, world\n4,c,\n")
    assert len(good(mixed)) == 101
    told = "the header has 2, and others end in a delimiter"
    assert bad(mixed) == {102: f"the record has 2 fields, {told}", 103: f"the record has 3 fields, {told}"}


def test_a_delimiter_at_the_end_of_every_row_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,text\n1,a,\n2,b,\n")
    [sentence] = check_heads(find_inputs([str(tmp_path / "a.csv")]), Columns().asked, Csv())
    assert sentence.endswith("a.csv has a delimiter at the end of its rows that the header has not: it is left out")
    assert bad(read(tmp_path / "a.csv", "text\nwell,\n", Columns())) == {2: "the record has 2 fields, the header has 1"}


def test_a_delimiter_at_the_end_of_some_rows_is_refused(tmp_path: Path) -> None:
    rows = read(tmp_path / "a.csv", "text,id\nHello, world,\nb,2\n")
    assert good(rows) == [["b", "2"]]
    assert bad(rows) == {2: "the record has 3 fields, the header has 2"}


@pytest.mark.parametrize("first", ["sep=;\n", "SEP=;\r\n", "\ufeffsep=;\n"])
def test_the_first_line_of_excel_tells_the_delimiter(tmp_path: Path, first: str) -> None:
    rows = read(tmp_path / "a.csv", f"{first}id;text\n1;a, b\n")
    assert (good(rows), rows[0].line) == ([["a, b", "1"]], 3)
    rows = read(tmp_path / "a.csv", f"{first.replace(';', ',')}id,text\n1,a; b\n")
    assert good(rows) == [["a; b", "1"]]


def test_a_column_name_that_occurs_twice_is_named_if_it_is_asked_for(tmp_path: Path) -> None:
    content = "id,text,text,other,other\n1,a,b,c,d\n"
    with pytest.raises(InputError, match=r"a\.csv has 2 columns named 'text' \(--text-column\): rename all but one"):
        read(tmp_path / "a.csv", content)
    assert good(read(tmp_path / "a.csv", content.replace("text,text", "text,body"))) == [["a", "1"]]


def test_the_delimiter_may_be_told(tmp_path: Path) -> None:
    assert good(read(tmp_path / "a.csv", "id:text\n1:a,b\n", how=Csv(delimiter=":"))) == [["a,b", "1"]]
    assert good(read(tmp_path / "a.tsv", "id,text\n1,a\n", how=Csv(delimiter=","))) == [["a", "1"]]
    for wrong in ({"delimiter": ""}, {"quote": "''"}, {"escape": "\n"}):
        with pytest.raises(InputError, match=r"csv (delimiter|quote|escape) .* is not one character"):
            Csv(**wrong)


def test_rows_are_named_by_the_lines_they_begin_in(tmp_path: Path) -> None:
    rows = read(tmp_path / "a.csv", 'id,text\n\n1,"two\nlines"\n2\n3,b\n')
    assert [(row.line, row.problem) for row in rows] == [
        (3, None), (5, "the record has 1 fields, the header has 2"), (6, None),
    ]  # fmt: skip

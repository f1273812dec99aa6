"""Tables: text to records, records to columns, columns to rows of photos."""

from __future__ import annotations

import csv
import difflib
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from gm_mlic.datasets.annotation_rows import ImageRow, Source, TableFormat, place, shown
from gm_mlic.datasets.base import read_bytes
from gm_mlic.errors import DataError
from gm_mlic.io import few

_DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}

#: Values allowed in a label column, and their meaning. Spreadsheets and pandas write 1.0 for 1 where a column had gaps,
#: and True for a Boolean.
_CELLS = {
    "binary": {
        **dict.fromkeys(("1", "1.0", "true", "True", "TRUE"), "present"),
        **dict.fromkeys(("0", "0.0", "false", "False", "FALSE"), "absent"),
    },
    "voc": {
        "1": "present", "1.0": "present", "0": "difficult", "0.0": "difficult", "-1": "absent", "-1.0": "absent",
    },
}  # fmt: skip
#: Column names that are rarely labels, although all of their values may be 0 and 1.
_SUSPICIOUS = re.compile(
    r"(.*[_ ])?(ids?|idx|index|fold|kfold|width|height|count|size|score|confidence|weight|year|page|group|batch|"
    r"version|rating|is_?(valid|val|train|training|test|labell?ed|verified|checked|crowd|reviewed)|verified|reviewed|"
    r"unnamed: ?\d+|level_\d+)",
    re.IGNORECASE,
)


def read_table(source: Source) -> tuple[tuple[str, ...] | None, list[ImageRow]]:
    """Read a table: labels that columns declare, if any, and one row per record."""
    form, path = source.form, source.path
    header, records = _open_table(source, read_text(path))
    for name in form.ignore:
        if name not in header:
            raise DataError(f"{path} has no column {name!r}, listed in `ignore_columns`{close_to(name, header)}")
    listed = form.labels in header
    others = [name for name in header if name not in (form.file, form.labels, form.split, *form.ignore)]
    if not listed and not others:
        raise DataError(
            f"{path} has neither a column {form.labels!r} nor label columns: add one, or set `columns['labels']` to "
            "its name."
        )
    if not listed and "" in others:
        raise DataError(
            f"{path}: column {header.index('') + 1} has no name: remove it (pandas: to_csv(..., index=False))."
        )
    rows = []
    for line, record in records:
        where = f"{path}: line {line}"
        split = source.split(record, where)
        cells = {column: record[column] for column in others}
        if listed:
            labels: tuple[tuple[str, ...], ...] = (source.labels_of_text(record[str(form.labels)], where),)
            other: dict[str, Any] = {column: cell.strip() for column, cell in cells.items()}
        else:
            labels = _labels_of_cells(source, cells, where)
            other = {"labels": labels}
        rows.append(source.row(record[form.file].strip(), where, split, *labels, other=other))
    if listed:
        return None, rows
    if form.target_format == "voc" and rows and all(len(r.present) + len(r.difficult) == len(others) for r in rows):
        raise DataError(
            f"{path} has no value -1, so no label is ever absent: set `target_format='binary'` if 0 means absent."
        )
    doubtful = [name for name in others if _SUSPICIOUS.fullmatch(name)]
    if doubtful:
        source.note(
            "{example}; list columns that are not labels in the option ignore_columns",
            f"each column is read as a label, also {few(doubtful)} (all: {few(others, 20)})",
        )
    return tuple(others), rows


def read_text(source: Path, remedy: str = "check the path and the permissions") -> str:
    """Content of a UTF-8 text file, without its byte order mark."""
    content = read_bytes(source, remedy)
    save = "save it as UTF-8 (in a spreadsheet: CSV UTF-8)."
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{source} is UTF-16: {save}")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{source}: line {line} is not UTF-8 (byte {content[error.start]:#04x}): {save}") from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(f"{source}: line {line} has a NUL character, so it is not text: {save}")
    return text


def close_to(name: str, names: Iterable[str]) -> str:
    """Message ending ``; did you mean 'x' or 'y'?`` for names similar to ``name``; a period if none is similar."""
    by_folded = {other.casefold(): other for other in names}
    close = difflib.get_close_matches(name.casefold(), by_folded, n=2, cutoff=0.7)
    return f"; did you mean {' or '.join(repr(by_folded[key]) for key in close)}?" if close else "."


# ---- Text to records ----


def _open_table(source: Source, text: str) -> tuple[list[str], Iterator[tuple[int, dict[str, str]]]]:
    """Column names, and an iterator over the remaining records with their line numbers."""
    path, file = source.path, source.form.file
    text, delimiters = _without_preamble(path, text)
    headers: dict[str, list[str]] = {}
    for delimiter in delimiters:
        try:
            _, record = next(_records(path, text, delimiter))
            headers[delimiter] = [name.strip() for name in record]
        except StopIteration:
            raise DataError(f"{path} is empty: its first line must name the columns.") from None
        except DataError:  # quoting is invalid for this delimiter
            if delimiter == delimiters[-1] and not headers:
                raise
    fitting = [delimiter for delimiter, header in headers.items() if file in header]
    if any(len(headers[delimiter]) == 1 for delimiter in fitting):
        fitting = fitting[:1]  # a single column, under any delimiter
    if not fitting:
        header = max(headers.values(), key=len)
        for cell in header:
            if source.is_photo(cell):
                raise DataError(
                    f"{path} has no column names: its first line lists the photo {shown(cell)}. Add a first line, such "
                    f"as {file}{max(headers, key=lambda mark: len(headers[mark]))}{source.form.labels or 'cat'}."
                )
        cells = few([cell[:40] for cell in header], 6)
        raise DataError(
            f"{path} has no column {file!r} in its first line ({cells}): set `columns['file']` to the column with the "
            f"file names{close_to(file, header)}"
        )
    if len(fitting) > 1:
        names = " or ".join(_DELIMITERS[delimiter] for delimiter in fitting)
        raise DataError(f"{path}: the delimiter is ambiguous ({names}): rename the columns in the first line.")
    header = headers[fitting[0]]
    for n, name in enumerate(header):
        if header.index(name) != n:
            raise DataError(f"{path} has two columns {shown(name)}: rename or remove one.")
    records = _records(path, text, fitting[0])
    next(records)
    return header, _completed(source, header, fitting[0], records)


def _without_preamble(path: Path, text: str) -> tuple[str, Sequence[str]]:
    """Blank the lines before the header (``# comment``, ``sep=;``); the possible delimiters."""
    delimiters: Sequence[str] = tuple(_DELIMITERS)
    lines = start = 0
    for line in re.finditer(r"([^\r\n]*)(\r\n|\r|\n|$)", text):
        content = line[1].strip(" ")
        if content[:4].casefold() == "sep=":
            delimiters = [content[4:].replace("\\t", "\t")]
            if delimiters[0] not in _DELIMITERS:
                raise DataError(f"{path}: {shown(content)} is no known delimiter: use one of {few(list(_DELIMITERS))}.")
        elif content.strip() and not content.startswith("#"):
            break
        lines, start = lines + 1, line.end()
        if start == len(text):
            break
    return "\n" * lines + text[start:], delimiters


def _records(source: Path, text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Non-blank records with the number of their last line."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, skipinitialspace=True)
    try:
        for record in reader:
            if any(map(str.strip, record)):
                yield reader.line_num, record
    except csv.Error as error:
        raise DataError(f"{source}: line {reader.line_num} is malformed ({error}): check its quotes.") from error


def _completed(
    source: Source, header: list[str], delimiter: str, records: Iterable[tuple[int, list[str]]]
) -> Iterator[tuple[int, dict[str, str]]]:
    """Records as cells by column. If the delimiter separates labels too, surplus fields are further labels."""
    listed = source.form.labels in header
    column = header.index(str(source.form.labels)) if listed and delimiter == source.form.separator else None
    for line, record in records:
        surplus = len(record) - len(header)
        if surplus > 0 and column is not None:
            record[column : column + surplus + 1] = [delimiter.join(record[column : column + surplus + 1])]
        elif surplus:
            hint = f", or set `separator={delimiter!r}` if they are labels" if surplus > 0 and listed else ""
            raise DataError(
                f"{source.path}: line {line} has {len(record)} fields, but the first line has {len(header)}: quote "
                f"fields that contain the delimiter{hint}."
            )
        yield line, dict(zip(header, record, strict=True))


# ---- Records to labels ----


def _labels_of_cells(source: Source, cells: dict[str, str], where: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Present and difficult labels of a record with one column per label."""
    form, meanings = source.form, _CELLS[source.form.target_format]
    found: dict[str, list[str]] = {"present": [], "difficult": [], "absent": []}
    for label, cell in cells.items():
        meaning = meanings.get(cell)
        if meaning is None:
            meaning = meanings.get(cell := cell.strip())
        if meaning is None:
            if form.missing_value == "error" or (cell and not form.is_missing(cell)):
                raise DataError(f"{where}: column {shown(label)} has {shown(cell)}{_expected_cell(cell, label, form)}")
            source.note("{count} empty cells are read as absent, the first at {example}", f"{place(where)}, {label}")
            meaning = "absent"
        found[meaning].append(label)
    return tuple(found["present"]), tuple(found["difficult"])


def _expected_cell(cell: str, label: str, form: TableFormat) -> str:
    values = "1 (present), 0 (difficult) or -1 (absent)" if form.target_format == "voc" else "1 or 0"
    if not cell or form.is_missing(cell):
        return f": expected {values}; set `missing_value='absent'` if empty cells and NaN mean absent."
    if form.target_format == "voc":
        return f": expected {values}."
    if cell in ("-1", "-1.0"):
        return f": expected {values}; set `target_format='voc'` if -1 means absent and 0 difficult."
    return (
        f": expected {values}. If the column is not a label, add it to `ignore_columns`; if it lists the labels, set "
        f"`columns['labels']={label!r}`."
    )

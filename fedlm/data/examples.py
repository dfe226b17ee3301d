"""Files of examples, the unit of privacy of `fedlm finetune`, each also as .xz.

.csv     a header and records, fields quoted where they need it (E2E: mr, ref)
.tsv     a header and one record a line, never quoted (GLUE's form of SST-2: sentence, label)
.jsonl   one object a line, the same keys in each
.txt     one text a line, column `text`; blank lines are skipped
.tokens  one running text (WikiText): no examples of its own, `read_stream` gives its lines
"""

from __future__ import annotations

import csv
import json
import lzma
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from fedlm.errors import DataError

KINDS = (".csv", ".tsv", ".jsonl", ".txt", ".tokens")
_TEXT_COLUMNS = ("text", "sentence")
_NO_TEXT = frozenset({"id", "idx", "index", "label"})
_MAX_LABEL = 9_999  # a larger number is no class but an identifier

Record = tuple[int, dict[str, Any]]  # the number of its line, and its fields


@dataclass(frozen=True)
class TextRows:
    """Examples as text.

    Arguments:
        columns: The one or two columns that an example's texts come from.
        texts: For each example as many texts as there are columns.
        labels: The class of each example; None where none was asked for.
    """

    columns: tuple[str, ...]
    texts: Sequence[tuple[str, ...]]
    labels: Sequence[int] | None = None

    def __len__(self) -> int:
        return len(self.texts)


def kind_of(path: Path) -> str:
    """Return the form of a file by its name, one of `KINDS`.

    Raises:
        DataError: Another ending.
    """
    kind = Path(path.name.removesuffix(".xz")).suffix
    if kind not in KINDS:
        raise DataError(
            f"{path} is no file of examples by its name; it must end in {', '.join(KINDS)}, or that and .xz"
        )
    return kind


def read_rows(path: Path, columns: Sequence[str] = (), label: str | None = None) -> TextRows:
    """Read a file whose records are examples.

    Arguments:
        path: Any of `KINDS` but .tokens; `.xz` is decompressed on the fly.
        columns: One or two columns of text; empty: `text` or `sentence` if there is one, else the one or two columns
            that are neither the label nor an identifier (id, idx, index).
        label: The column of the class, a whole number from 0; None: none is read.

    Raises:
        DataError: The file is missing, damaged or empty, lacks a column, or a record is broken (with its line).
    """
    records = list(_records(path))
    if not records:
        raise DataError(f"{path} has no example; give a file with at least one")
    chosen = _text_columns(path, list(records[0][1]), columns, label)
    texts = [tuple(_text(path, record, name) for name in chosen) for record in records]
    labels = None if label is None else [_label(path, record, label) for record in records]
    return TextRows(chosen, texts, labels)


def read_stream(path: Path) -> list[str]:
    """Return the lines of a running text that are not blank, without spaces around them.

    Raises:
        DataError: The file is missing, damaged or has no text.
    """
    with _opened(path) as file:
        lines = [text for line in file if (text := line.strip())]
    if not lines:
        raise DataError(f"{path} has no text; give a file with some")
    return lines


def _records(path: Path) -> Iterator[Record]:
    match kind_of(path):
        case ".csv":
            yield from _separated(path, csv.excel)
        case ".tsv":
            yield from _separated(path, _PlainTabs)
        case ".jsonl":
            yield from _json_lines(path)
        case ".txt":
            with _opened(path) as file:
                yield from ((number, {"text": line.strip()}) for number, line in enumerate(file, 1) if line.strip())
        case _:
            raise DataError(f"{path} is one running text; finetune.task = 'language_model' alone takes it")


class _PlainTabs(csv.Dialect):
    """GLUE's files: a quotation mark is a character like any other."""

    delimiter, lineterminator, quoting = "\t", "\n", csv.QUOTE_NONE


def _separated(path: Path, dialect: type[csv.Dialect]) -> Iterator[Record]:
    with _opened(path) as file:
        # The reader joins quoted lines; a record's number is that of its last line.
        reader = csv.reader(file, dialect, strict=True)
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise DataError(f"{path}, line 1: the header {header} names a column twice; rename one")
        try:
            for fields in reader:
                if not fields:
                    continue
                if len(fields) != len(header):
                    raise DataError(
                        f"{path}, line {reader.line_num}: {len(fields)} fields, but the header has {len(header)} "
                        f"({', '.join(header)}); mend the line"
                    )
                yield reader.line_num, dict(zip(header, fields, strict=True))
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.line_num}: {error}; mend the line") from None


def _json_lines(path: Path) -> Iterator[Record]:
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}, line {number}: not JSON ({error}); mend the line") from None
            if not isinstance(record, dict):
                raise DataError(f"{path}, line {number}: {type(record).__name__}, must be an object; mend the line")
            yield number, record


def _text_columns(path: Path, header: list[str], wanted: Sequence[str], label: str | None) -> tuple[str, ...]:
    for name in (*wanted, *([] if label is None else [label])):
        if name not in header:
            key = "finetune.label" if name == label else "finetune.columns"
            raise DataError(f"{path} has no column {name!r}; it has {', '.join(header)}: set {key} to one of them")
    if wanted:
        if len(wanted) > 2:
            raise DataError(f"finetune.columns = {list(wanted)}: an example has one or two texts; name at most two")
        return tuple(wanted)
    if known := [name for name in _TEXT_COLUMNS if name in header]:
        return (known[0],)
    others = [name for name in header if name not in _NO_TEXT and name != label]
    if not 1 <= len(others) <= 2:
        raise DataError(f"{path} has the columns {', '.join(header)}; say which are text in finetune.columns")
    return tuple(others)


def _text(path: Path, record: Record, name: str) -> str:
    number, fields = record
    if not isinstance(text := fields.get(name), str):
        raise DataError(f"{path}, line {number}: {name!r} is {text!r}, must be text; mend the line")
    return text


def _label(path: Path, record: Record, name: str) -> int:
    number, fields = record
    given = fields.get(name)
    text = str(given).strip() if isinstance(given, str | int) and not isinstance(given, bool) else ""
    if not (text.isascii() and text.isdigit()) or int(text) > _MAX_LABEL:
        raise DataError(
            f"{path}, line {number}: {name!r} is {given!r}, must be a whole number from 0 to {_MAX_LABEL:,}; "
            "number the classes from 0"
        )
    return int(text)


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    """Open a text file for reading; what goes wrong then becomes one line."""
    try:
        with (
            lzma.open(path, "rt", encoding="utf-8-sig", newline="")
            if path.suffix == ".xz"
            else path.open(encoding="utf-8-sig", newline="") as file
        ):
            yield file
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error.reason}); convert the file") from None
    except (lzma.LZMAError, EOFError) as error:
        raise DataError(f"{path}: damaged xz data ({error}); fetch the file again") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}; check finetune.train and .test") from None

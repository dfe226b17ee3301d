"""Readers of files: users.jsonl[.xz] with one user a line, and plain text[.xz] by article or by line."""

from __future__ import annotations

import json
import lzma
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from fedlm.data.users import UserTexts
from fedlm.errors import DataError

# WikiText marks an article's title by one equals sign and its sections by two or more, each followed by a
# space.
_ARTICLE_TITLE = re.compile(r"^\s*= (?!=)(.+)(?<!=) =\s*$")


def is_users_file(path: Path) -> bool:
    """Tell users.jsonl[.xz] from plain text, by the name."""
    return path.name.removesuffix(".xz").endswith(".jsonl")


def read_users_file(path: Path) -> Iterator[UserTexts]:
    """Yield the users of a file whose every line is `{"user": str, "texts": [str, ...], "split": str}`.

    Arguments:
        path: The file; `.xz` is decompressed on the fly. `split` may be left out.

    Raises:
        DataError: The file is missing or damaged, or a line is not such an object (file name and line
            number).
    """
    for number, line in _numbered_lines(path):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error})") from None
        yield _user_of(record, f"{path}, line {number}")


def read_plain_text(path: Path, split_by: str) -> Iterator[UserTexts]:
    """Yield the "users" of a plain text: its articles (` = Title = ` lines start one) or its lines.

    Arguments:
        path: The file; `.xz` is decompressed on the fly. Blank lines are skipped.
        split_by: "article" (each line is a message; the title is the first) or "line" (each line is a user).

    Raises:
        DataError: The file is missing or damaged.
    """
    name, lines = "0", list[str]()
    for number, line in _numbered_lines(path):
        text = line.strip()
        title = _ARTICLE_TITLE.match(line)
        if lines and (split_by == "line" or title):
            yield UserTexts(name, lines)
            lines = []
        if text:
            # The line number keeps two articles of one title apart.
            name = f"{number} {title[1]}" if title else (name if lines else str(number))
            lines.append(text)
    if lines:
        yield UserTexts(name, lines)


def _user_of(record: Any, where: str) -> UserTexts:
    """Check one parsed line."""
    if not isinstance(record, dict):
        raise DataError(f'{where}: expected an object {{"user", "texts"}}, found {type(record).__name__}')
    user, texts, split = record.get("user"), record.get("texts"), record.get("split") or ""
    if not isinstance(user, str) or not user:
        raise DataError(f"{where}: 'user' is {user!r}; it must be a string that is not empty")
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise DataError(f"{where}: 'texts' of user {user!r} must be a list of strings")
    if not isinstance(split, str):
        raise DataError(f"{where}: 'split' of user {user!r} is {split!r}; it must be a string, or left out")
    return UserTexts(user, texts, split)


def _numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, line)."""
    number = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                yield number, line
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, near line {number + 1}: not UTF-8 ({error.reason}); convert the file") from None
    except (lzma.LZMAError, EOFError) as error:
        raise DataError(f"{path}, after line {number}: damaged xz data ({error}); fetch the file again") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}; check data.corpus") from None


def _open(path: Path) -> TextIO:
    # newline="\n": other line ends inside a JSON string must not shift the line numbers.
    if path.suffix == ".xz":
        return lzma.open(path, "rt", encoding="utf-8", newline="\n")
    return path.open(encoding="utf-8", newline="\n")

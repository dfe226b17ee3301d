"""Files by user: any text survives, and every damaged line is named."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlm.data.text_files import read_plain_text, read_users_file
from fedlm.data.users import UserTexts
from fedlm.errors import DataError

records = st.lists(
    st.builds(
        UserTexts,
        st.text(min_size=1),
        st.lists(st.text(), max_size=4),
        st.sampled_from(["", "train", "test"]),
    ),
    max_size=5,
)


@given(users=records, compressed=st.booleans(), ascii_only=st.booleans())
def test_any_text_survives_the_file(
    tmp_path_factory: pytest.TempPathFactory, users: list[UserTexts], compressed: bool, ascii_only: bool
) -> None:
    path = tmp_path_factory.mktemp("users") / ("users.jsonl.xz" if compressed else "users.jsonl")
    lines = [json.dumps({"user": u.user, "texts": u.texts, "split": u.split}, ensure_ascii=ascii_only) for u in users]
    content = "".join(line + "\n" for line in lines).encode()
    path.write_bytes(lzma.compress(content) if compressed else content)
    assert list(read_users_file(path)) == users


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "not JSON"),
        ("[1]", "expected an object"),
        ('{"texts": []}', "'user' is None"),
        ('{"user": "", "texts": []}', "'user' is ''"),
        ('{"user": 3, "texts": []}', "'user' is 3"),
        ('{"user": "a", "texts": "hello"}', "'texts' of user 'a' must be a list of strings"),
        ('{"user": "a", "texts": [1]}', "'texts' of user 'a' must be a list of strings"),
        ('{"user": "a", "texts": [], "split": 1}', "'split' of user 'a' is 1"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, complaint: str) -> None:
    path = tmp_path / "users.jsonl"
    path.write_text('{"user": "fine", "texts": ["hi"]}\n\n' + line + "\n", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        list(read_users_file(path))
    assert f"users.jsonl, line 3: {complaint}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_truncated_archive_and_a_foreign_encoding_are_named(tmp_path: Path) -> None:
    archive = tmp_path / "text.xz"
    archive.write_bytes(lzma.compress(b"words\n" * 1000)[:-20])
    with pytest.raises(DataError, match=r"text\.xz, after line .* damaged xz data"):
        list(read_plain_text(archive, "line"))
    latin = tmp_path / "latin.txt"
    latin.write_bytes("caf\xe9\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.txt, near line 1: not UTF-8"):
        list(read_plain_text(latin, "line"))


def test_articles_begin_at_top_level_titles_only(tmp_path: Path) -> None:
    path = tmp_path / "wiki.tokens"
    path.write_text(
        "before\n \n = One = \n \n text a \n = = Part = = \n = = = Deep = = = \n text b \n = Two = \n = One = \n c\n",
        encoding="utf-8",
    )
    users = list(read_plain_text(path, "article"))
    assert [list(user.texts) for user in users] == [
        ["before"],
        ["= One =", "text a", "= = Part = =", "= = = Deep = = =", "text b"],
        ["= Two ="],
        ["= One =", "c"],
    ]
    assert [user.user for user in users] == ["1", "3 One", "9 Two", "10 One"]


def test_each_line_can_be_a_user(tmp_path: Path) -> None:
    path = tmp_path / "lines.txt"
    path.write_text("one\n\n two \n", encoding="utf-8")
    assert list(read_plain_text(path, "line")) == [UserTexts("1", ["one"]), UserTexts("3", ["two"])]


def test_wikitext_articles_hold_every_line_once() -> None:
    path = Path(__file__).resolve().parents[3] / "shared" / "data" / "wikitext2" / "wiki.valid.tokens.xz"
    if not path.exists():
        pytest.skip("shared/data/wikitext2 is not beside the project")
    articles = list(read_plain_text(path, "article"))
    with lzma.open(path, "rt", encoding="utf-8") as file:
        lines = [line.strip() for line in file if line.strip()]
    assert [text for article in articles for text in article.texts] == lines
    assert len(articles) == 60  # the published count of this split

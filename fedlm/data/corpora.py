"""A corpus is a stream of users: this module finds the reader that `data.corpus` names.

A reader yields one user at a time and each user once; `fingerprint` says what content it would yield, so that
a cached token store is used exactly as long as it is true.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path

from fedlm.config.schema import Config
from fedlm.data.cache import file_digest
from fedlm.data.chitchat import chitchat_version, read_chitchat
from fedlm.data.hugging_face import read_hugging_face
from fedlm.data.text_files import is_users_file, read_plain_text, read_users_file
from fedlm.data.users import UserTexts as UserTexts
from fedlm.errors import DataError
from fedlm.plugins import load_object

_PLUG_IN = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def read_users(config: Config) -> Iterator[UserTexts]:
    """Yield the users of `config.data.corpus`, one at a time.

    Arguments:
        config: `data.corpus` is "chitchat", a users.jsonl[.xz] file, a text file (then `data.split_by`
            applies),
            "hf:NAME", or "pkg.mod:function", a function that takes the Config and yields `UserTexts`.

    Returns:
        A stream; nothing is read before its first item is asked for.

    Raises:
        DataError: The corpus cannot be read; the message says where and what to do.
    """
    corpus = config.data.corpus
    if corpus == "chitchat":
        return read_chitchat()
    if corpus == "synthetic":
        raise DataError("corpus 'synthetic' has token ids and no text; get it from build_store")
    if corpus.startswith("hf:"):
        return read_hugging_face(corpus.removeprefix("hf:"))
    if _is_plug_in(corpus):
        return _read_plug_in(config)
    path = _path(corpus)
    return read_users_file(path) if is_users_file(path) else read_plain_text(path, config.data.split_by)


def fingerprint(config: Config) -> str:
    """Return a string that changes when the corpus's content does.

    The version of the chitchat package; the settings and the seed of the synthetic corpus; the bytes of a
    file; for the others, whose content nobody vouches for, a hash over the whole stream.
    """
    corpus = config.data.corpus
    if corpus == "chitchat":
        return f"chitchat-dataset {chitchat_version()}"
    if corpus == "synthetic":
        return json.dumps({"seed": config.seed, **asdict(config.synthetic)}, sort_keys=True)
    if corpus.startswith("hf:") or _is_plug_in(corpus):
        return f"stream {_stream_digest(read_users(config))}"
    path = _path(corpus)
    form = "users file" if is_users_file(path) else f"text by {config.data.split_by}"
    return f"{form} {file_digest(path)}"


def _path(corpus: str) -> Path:
    path = Path(corpus).expanduser()
    if not path.is_file():
        raise DataError(
            f"no corpus {corpus!r}: no such file; data.corpus is chitchat, synthetic, a users.jsonl[.xz] "
            "or text file, hf:NAME, or pkg.mod:function"
        )
    return path


def _is_plug_in(corpus: str) -> bool:
    return _PLUG_IN.fullmatch(corpus) is not None and not Path(corpus).exists()


def _read_plug_in(config: Config) -> Iterator[UserTexts]:
    """Import and call `pkg.mod:function`, and check what it yields."""
    function = load_object(config.data.corpus, "data.corpus")
    if not callable(function) or not isinstance(users := function(config), Iterable):
        raise DataError(f"corpus plug-in {config.data.corpus!r} is no function that yields UserTexts; write it as one")
    for item in users:
        if not isinstance(item, UserTexts):
            found = type(item).__name__
            raise DataError(f"corpus plug-in {config.data.corpus!r} yielded {found}; it must yield UserTexts")
        yield item


def _stream_digest(users: Iterator[UserTexts]) -> str:
    digest = blake2b(digest_size=16)
    for user in users:
        # ASCII-only JSON: one unambiguous spelling of names and texts, lone surrogates included.
        digest.update(json.dumps([user.user, user.split, *user.texts]).encode("ascii"))
    return digest.hexdigest()

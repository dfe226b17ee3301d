"""The embedded corpus: the Chit Chat Challenge of the package `chitchat-dataset` (MIT), by participant.

1,315 participants, 258,145 messages, 2.5 M words of phone-like chat. Its one JSON file is read directly: the
package's own classes drop who sent what. The text is not moderated; do not print samples of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files

from fedlm.data.users import UserTexts
from fedlm.errors import DataError

_PACKAGE = "chitchat-dataset"


def chitchat_version() -> str:
    """Return the installed version of the package, which fixes the content.

    Raises:
        DataError: The package is not installed.
    """
    try:
        return version(_PACKAGE)
    except PackageNotFoundError:
        raise DataError(f"corpus 'chitchat' needs the package {_PACKAGE}: pip install {_PACKAGE}") from None


def read_chitchat() -> Iterator[UserTexts]:
    """Yield the participants in order of their first message, each with all messages in order."""
    chitchat_version()
    conversations = json.loads((files("chitchat_dataset") / "dataset.json").read_text(encoding="utf-8"))
    texts_by_user: dict[str, list[str]] = {}
    for conversation in conversations.values():
        for turn in conversation["messages"]:
            for message in turn:
                texts_by_user.setdefault(message["sender"], []).append(message["text"])
    for user, texts in texts_by_user.items():
        yield UserTexts(user, texts)

"""Hugging Face data sets through `flwr-datasets`, an optional extra.

A corpus is `hf:NAME[?user=COLUMN&text=COLUMN&split=NAME]`.

Rows are sorted by the user column on disk (Arrow), so a user's rows are adjacent and one user at a time is in
memory. Only one split is read: in most sets the same user occurs in several, and held-out users must not
train.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from urllib.parse import parse_qsl

from fedlm.data.users import UserTexts
from fedlm.errors import DataError

_DEFAULTS = {"user": "user", "text": "text", "split": "train"}


def read_hugging_face(specification: str) -> Iterator[UserTexts]:
    """Yield the users of a Hugging Face data set.

    Arguments:
        specification: What follows `hf:`, for example `fedlm/chat?user=author&text=body`.

    Raises:
        DataError: The extra is not installed, an option is unknown, or the data set lacks a column.
    """
    name, options = _parse(specification)
    try:
        from flwr_datasets import FederatedDataset
    except ImportError:
        raise DataError(f"corpus 'hf:{name}' needs an extra: pip install 'fedlm[hf]'") from None
    # One partition: flwr-datasets wants a partitioner, but partitions of 100,000 users one by one are slow.
    dataset = FederatedDataset(dataset=name, partitioners={options["split"]: 1}, shuffle=False)
    rows = dataset.load_split(options["split"])
    for column in (options["user"], options["text"]):
        if column not in rows.column_names:
            columns = ", ".join(rows.column_names)
            raise DataError(f"hf:{name} has no column {column!r} but {columns}; name yours: hf:{name}?user=..&text=..")
    for user, group in groupby(rows.sort(options["user"]), key=lambda row: str(row[options["user"]])):
        yield UserTexts(user, [str(row[options["text"]]) for row in group if row[options["text"]]])


def _parse(specification: str) -> tuple[str, dict[str, str]]:
    """Split `NAME?key=value&...` and fill in the defaults."""
    name, _, query = specification.partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    unknown = sorted(set(options) - set(_DEFAULTS))
    if unknown:
        raise DataError(f"unknown option {unknown[0]!r} in 'hf:{specification}'; allowed are user, text and split")
    return name, _DEFAULTS | options

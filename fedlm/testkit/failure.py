"""What a check of the test kit raises."""

from __future__ import annotations


class PrivacyTestFailure(AssertionError):  # noqa: N818  pytest shows an assertion's sentence, not its traceback
    """A guarantee does not hold; one sentence says which, how, and with which figures."""

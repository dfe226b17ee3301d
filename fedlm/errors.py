"""Every error that fedlm raises on purpose.

    FedlmError                 exit 1   anything below that is not the user's input
    ├── ConfigError            exit 2   an unknown key, a wrong type, a value out of range, an impossible combination
    ├── DataError              exit 2   a corpus, vocabulary or model that cannot be read or does not fit
    ├── OutputError            exit 1   the run folder cannot be written (read-only, no space)
    ├── WorkerError            exit 1   no worker is left to run the round's devices
    ├── BudgetExceededError    exit 3   the privacy budget would be exceeded
    └── Interrupted            exit 130 Ctrl-C or SIGTERM; a checkpoint was written

Each message is one line: what is wrong, the value, what is allowed, the fix.
"""

from __future__ import annotations


class FedlmError(Exception):
    """Base of every error that fedlm raises on purpose; `exit_code` is what the command line returns."""

    exit_code = 1


class ConfigError(FedlmError, ValueError):
    """The configuration is not valid."""

    exit_code = 2


class DataError(FedlmError, ValueError):
    """A corpus, vocabulary or model cannot be read or does not fit the configuration."""

    exit_code = 2


class OutputError(FedlmError, OSError):
    """The run folder cannot be written."""


class WorkerError(FedlmError, RuntimeError):
    """Work was lost and no worker is left to do it again."""


class BudgetExceededError(FedlmError):
    """The privacy budget would be exceeded."""

    exit_code = 3


class Interrupted(FedlmError):  # noqa: N818  named like KeyboardInterrupt: not an error of the program
    """Ctrl-C or SIGTERM ended the program; the run can be resumed."""

    exit_code = 130

"""The environment variables that keep Flower, Ray and Hugging Face quiet and off the network."""

from __future__ import annotations

import os

QUIET_ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    # Without it Flower installs the app's dependencies from the network at every run.
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
}
"""Set before any of the libraries is imported, unless the user has set them."""


def set_quiet_environment() -> None:
    """Set the variables that the user has not set; libraries that are imported already have read their own."""
    for name, value in QUIET_ENVIRONMENT.items():
        os.environ.setdefault(name, value)

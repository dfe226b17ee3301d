"""One experiment as one frozen, checked object: the schema, its TOML file, overrides, hash and help."""

from fedlm.config.keys import describe
from fedlm.config.load import config_from_toml, config_hash, config_to_toml, load_config
from fedlm.config.schema import Config
from fedlm.config.validate import validate

__all__ = [
    "Config",
    "config_from_toml",
    "config_hash",
    "config_to_toml",
    "describe",
    "load_config",
    "validate",
]

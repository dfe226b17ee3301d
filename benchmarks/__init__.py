"""Measurements of fedlm and its peers, each a module with a command line."""

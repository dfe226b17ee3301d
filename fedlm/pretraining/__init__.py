"""Pretraining of the public base model, and its cache by content."""

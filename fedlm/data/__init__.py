"""Corpora by user, the public vocabulary and its frequencies, memory-mapped tokens, batches."""

"""Training losses that never hold scores of the whole vocabulary, and exact evaluation."""

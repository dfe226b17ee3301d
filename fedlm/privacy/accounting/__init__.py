"""Accounting of epsilon: the subsampled Gaussian mechanism, composition of events, Renyi divergences."""

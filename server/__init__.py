"""The aggregating side: the Flower ServerApp, the round loop, strategies, and the run folder."""

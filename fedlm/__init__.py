"""fedlm: private federated learning of large-vocabulary language models.

The library: configuration, data, models, what trains, losses, local training, privacy, and the contract of aggregation
strategies. It knows nothing of the transport; `server`, `clients` and `simulations` build on it.
"""

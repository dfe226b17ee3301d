"""Aggregation strategies: the contract, which a plug-in imports from here, and the built-in ones, one paper a file.

`fedlm.registry.STRATEGIES` names them.
"""

from fedlm.strategies.contract import Release, ServerOptimizer, Strategy, StrategyState, UpdateSpec, Vector

__all__ = ["Release", "ServerOptimizer", "Strategy", "StrategyState", "UpdateSpec", "Vector"]

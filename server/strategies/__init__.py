"""Built-in strategies, one paper a file; `fedlm.registry.STRATEGIES` names them."""

"""Per-example gradients of the modules that own trained parameters: taps, and a piece for each kind of parameter."""

"""Per-example gradients of the modules that own trained parameters: hooks, and a gradient sampler for each kind of
parameter."""

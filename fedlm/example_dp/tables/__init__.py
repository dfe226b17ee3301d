"""Per-example gradients of embedding tables on both sides of a language model: Phantom Clipping and its heads."""

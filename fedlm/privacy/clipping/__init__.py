"""The clip: what a node is told to clip to, side queries in the same vector, and the exact sum of clipped updates."""

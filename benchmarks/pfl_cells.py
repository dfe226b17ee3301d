"""The models that both sides of the comparison with pfl train; imports neither side.

Legend: V vocabulary, D model width.
"""

from __future__ import annotations

from dataclasses import dataclass

BATCH, LENGTH = 16, 20
SENTENCES = 50  # of LENGTH tokens, for each user: four steps of local training
CLIP_NORM = 0.3
LEARNING_RATE = 0.1


@dataclass(frozen=True)
class Cell:
    """One model, trained alike on both sides: tied embeddings, full softmax, plain SGD.

    Arguments:
        vocabulary: V.
        d_model: D.
        d_ff: Width of the feed-forward layers.
        num_layers: Blocks.
        num_heads: Attention heads of a block.
        rank: Of LoRA on every matrix of every block; 0: all weights train instead.
    """

    vocabulary: int
    d_model: int
    d_ff: int
    num_layers: int
    num_heads: int
    rank: int = 0

    @property
    def what(self) -> str:
        """One line for the table."""
        trains = f"LoRA rank {self.rank}" if self.rank else "all weights"
        return f"vocabulary {self.vocabulary:,}, d {self.d_model}, {self.num_layers} layers, {trains}"


CELLS = {
    "d96-10k": Cell(10_000, 96, 1536, 3, 8),
    "d96-100k": Cell(100_000, 96, 1536, 3, 8),
    "d256-100k": Cell(100_000, 256, 1536, 3, 8),
    "lora-10k": Cell(10_000, 256, 1024, 4, 8, rank=8),
    "lora-50k": Cell(50_257, 256, 1024, 4, 8, rank=8),
}

"""Names of the blocks that a model's embedding tables and its output bias become in an update."""

from __future__ import annotations

INPUT_TABLE, OUTPUT_TABLE, OUTPUT_BIAS = "input_table", "output_table", "output_bias"

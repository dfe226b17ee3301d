"""Example-level differential privacy on one device: DP-SGD with exact per-example clipping (docs/example_dp.md)."""

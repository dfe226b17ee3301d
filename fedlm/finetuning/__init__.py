"""`fedlm finetune`: example-level DP fine-tuning of one model on one machine (docs/example_dp.md)."""

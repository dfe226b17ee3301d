"""Local training of many devices in one batched program, with the updates that each would compute alone."""

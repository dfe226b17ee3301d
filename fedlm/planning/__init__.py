"""What an experiment will cost a device and the privacy budget, before any training."""

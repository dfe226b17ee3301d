"""Re-Attention: attention corrected for the noise of privately trained weights, and the noise levels that it needs."""

"""Noise on integers: Gaussian on a lattice, Skellam from the devices, and their common fixed point."""

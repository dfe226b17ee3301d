"""The virtual fleet: grids (in-process, Ray), recipes and reports."""

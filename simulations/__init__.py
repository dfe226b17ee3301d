"""The virtual fleet: grids (in-process, Ray), recipes, studies and reports."""

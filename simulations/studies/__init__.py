"""Studies: a paper's claim or a comparison, measured by runs of the recipes."""

"""Configs that ship with fedlm, and the studies made with them."""

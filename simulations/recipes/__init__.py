"""Configs that ship with fedlm."""

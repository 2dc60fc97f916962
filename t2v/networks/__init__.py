"""Tensors only: the three networks, from their configs to their outputs."""

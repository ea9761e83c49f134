"""Tensors that stand for the states of a whole window."""

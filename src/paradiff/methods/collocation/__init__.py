"""Evaluations at a few mesh points, interpolated in between: collocation."""

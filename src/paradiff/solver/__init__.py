"""The loop that solves a chain, what it is given and what it returns."""

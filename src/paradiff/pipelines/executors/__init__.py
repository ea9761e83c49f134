"""Ways of running a loop for all states of a window: vectorised, or in lanes."""

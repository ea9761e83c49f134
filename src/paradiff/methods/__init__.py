"""How a chain is solved: the published methods as presets, and a folder for each family of solvers."""

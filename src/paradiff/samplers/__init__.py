"""Where tables come from: published samplers on noise schedules, exponential integrators, diffusers schedulers."""

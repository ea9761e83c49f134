"""The recurrence: a sampler's table of coefficients, its noises, slopes and steps."""

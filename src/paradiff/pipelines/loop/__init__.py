"""A pipeline's denoising loop, driven by a solver: its scheduler, its source, its random state."""

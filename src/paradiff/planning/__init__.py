"""What to choose: parameters from the theorems, and the laws of samplers on Gaussian data."""

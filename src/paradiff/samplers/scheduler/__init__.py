"""The table of any diffusers scheduler, read off its own step."""

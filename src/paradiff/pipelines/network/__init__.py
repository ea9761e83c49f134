"""Where a window enters the networks: rows batched, outputs handed back."""

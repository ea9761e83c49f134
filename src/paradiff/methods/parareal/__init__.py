"""Parareal over blocks of the chain: SRDS."""

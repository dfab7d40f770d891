"""Runs that merge models: what a run file with a ``circuit`` does."""

"""Metrics, each in a folder that is a Space of its own: `evaluate.load` takes its path or the Space's name."""

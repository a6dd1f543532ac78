"""Controlled experiments: one command, one YAML, results as JSON."""

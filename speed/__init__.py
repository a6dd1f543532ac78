"""Measurements of speed and memory: workloads, floors, results."""

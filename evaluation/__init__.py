"""Evaluates checkpoints: benchmark -> prompt -> model -> parsed answer -> metric."""

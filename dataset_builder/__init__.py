"""Builds thought-video datasets: question -> keyframes -> plan -> thought video -> checked, published row."""

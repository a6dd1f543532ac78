"""Where questions about videos come from."""

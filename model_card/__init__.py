"""Cards for the Hub, rendered from what other commands measured."""

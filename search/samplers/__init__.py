"""Where the next trial's params come from."""

"""The ground: words and numbers, no graph."""

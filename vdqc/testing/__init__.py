"""For authors of passes: tiny real architectures, IR text and equivalence checks."""

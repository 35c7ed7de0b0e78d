"""What runs passes, and what passes learn from."""

"""The graph: an aten-level program with its weights, its sites and its stage."""

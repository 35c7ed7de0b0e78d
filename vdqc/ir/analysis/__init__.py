"""Questions about a graph, answered by dataflow alone: pure functions, nothing is edited."""

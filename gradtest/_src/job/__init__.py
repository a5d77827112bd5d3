"""Several processes: their start, their end, and the verdict that they come to."""

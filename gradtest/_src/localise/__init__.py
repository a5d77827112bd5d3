"""Which equation of a wrong derivative is wrong, and which line of source."""

"""The ways to run a function, and whether its gradient is one in all of them."""

"""What a check costs, in time and in memory, beside what it replaces."""

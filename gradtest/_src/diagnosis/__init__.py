"""What kind of mistake a gap is: a table of causes, each named on numbers alone."""

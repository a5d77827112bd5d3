"""Assertions on traced values: conditions inside of the program that is traced."""

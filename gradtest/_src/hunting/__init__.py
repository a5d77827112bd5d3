"""Hunts for the inputs at which a derivative is wrong."""

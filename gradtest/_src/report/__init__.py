"""Findings made readable; nothing here computes."""

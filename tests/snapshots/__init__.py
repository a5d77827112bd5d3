"""Whole reports, stored as text, JSON and HTML, of one failure of each kind."""

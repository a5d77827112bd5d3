"""Data-parallel steps: their gradient on every device against the full batch's."""

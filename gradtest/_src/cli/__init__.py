"""The command line: what it is told, in the terms of the Python API."""

from gradtest._src.cli.program import main as main

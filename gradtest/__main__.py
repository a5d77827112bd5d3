"""`python -m gradtest`: the command line."""

import sys

from gradtest._src.cli import main

if __name__ == "__main__":
    sys.exit(main())

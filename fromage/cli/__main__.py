"""`python -m fromage.cli`, as the command `fromage`."""

import sys

from fromage.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

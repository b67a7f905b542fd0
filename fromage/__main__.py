"""`python -m fromage`: the command line."""

import sys

from fromage.cli.main import main

sys.exit(main())

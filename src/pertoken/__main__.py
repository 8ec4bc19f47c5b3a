"""`python -m pertoken` is the `pertoken` command."""

import sys

from pertoken.cli import main

if __name__ == "__main__":
    sys.exit(main())

"""`python -m pertoken` is the `pertoken` command."""

import sys

from pertoken.cli import main

sys.exit(main())

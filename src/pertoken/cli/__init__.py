"""The `pertoken` command."""

from pertoken.cli.main import main

__all__ = ["main"]

"""`python -m actors` is the `repertory` command."""

from actors.cli import entry

entry()

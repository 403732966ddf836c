"""`python -m actors` is the `repertory` command."""

from actors.cli import main

main()

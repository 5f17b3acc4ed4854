"""``python -m normkit.cli`` is the command line."""

from normkit.cli import main

main()

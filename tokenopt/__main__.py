"""``python -m tokenopt``."""

from tokenopt.cli import main

main()

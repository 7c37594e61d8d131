"""`python -m mezo`."""

from mezo.cli import main

main()

"""`python -m laconic`: the laconic command."""

from laconic.cli import main

main()

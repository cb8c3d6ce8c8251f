"""`python -m laconic.cli`: the laconic command."""

from laconic.cli import main

main()

"""`python -m pdx`: the command, where its script is not on the path."""

from pdx.cli import main

main()

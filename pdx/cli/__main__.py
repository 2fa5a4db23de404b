"""`python -m pdx.cli`, for a checkout whose scripts are not installed."""

from pdx.cli import main

main()

"""`python -m polyvisor`: the command line."""

from polyvisor.cli.main import main

main()

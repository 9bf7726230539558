"""`python -m overtone.cli`: the same as the command `overtone`."""

from overtone.cli import main

main()

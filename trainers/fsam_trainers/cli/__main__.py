"""`python -m fsam_trainers.cli`: the fsam command."""

from fsam_trainers.cli import main

main()

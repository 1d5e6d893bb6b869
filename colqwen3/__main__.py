"""`python -m colqwen3` is the command `colqwen3`."""

from colqwen3.cli import main

main()

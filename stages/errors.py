"""The one error type that a user is meant to see, and the way a stage ends on it."""

import logging
import sys
from collections.abc import Callable


class PipelineError(Exception):
    """A problem that the user can mend: one line naming the file or key, and the mend.

    What it quotes may come from a hostile file: unprintable characters are escaped.
    """

    def __init__(self, message: str) -> None:
        printable = (c if c.isprintable() else repr(c)[1:-1] for c in message)
        super().__init__("".join(printable))


def run(main: Callable[[], None]) -> None:
    """Run a stage's ``main`` with logging on stderr; end a `PipelineError` as one line, status 1."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        main()
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)

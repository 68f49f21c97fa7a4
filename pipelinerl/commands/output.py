"""Text for standard output, which may be a pipe that the reader closes early (`... --help | head`)."""

import os
import sys


def say(text: str) -> None:
    """Print `text`; a reader that has gone is no error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # Python flushes stdout once more at exit: give it something that takes the rest.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

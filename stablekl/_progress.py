"""A line on the terminal for a run that lasts."""

from __future__ import annotations

import sys
import time

__all__ = ["Progress"]

# Seconds before the line first shows, and between its changes.
PATIENCE, PACE = 2.0, 0.1
WIDTH = 24


class Progress:
    """``label [#####-----] note``, rewritten in place on stderr.

    Args:
        label: what is going on.
        shown: True or False, or None for: on a terminal, once the run has lasted two seconds.
    """

    def __init__(self, label: str, shown: bool | None = None) -> None:
        """Nothing is written yet."""
        self._label = label
        self._shown = sys.stderr.isatty() if shown is None else shown
        self._next = time.monotonic() + (PATIENCE if shown is None else 0.0)
        self._width = 0

    def update(self, done: float, note: str = "") -> None:
        """Show the share that is done, from 0 to 1, and a few words."""
        if not self._shown or (time.monotonic() < self._next and not (done >= 1 and self._width)):
            return
        self._next = time.monotonic() + PACE
        full = round(WIDTH * min(max(done, 0.0), 1.0))
        line = f"{self._label} [{'#' * full}{'-' * (WIDTH - full)}] {note}"
        sys.stderr.write("\r" + line.ljust(self._width))
        sys.stderr.flush()
        self._width = len(line)

    def close(self) -> None:
        """End the line, if one was begun."""
        if self._width:
            sys.stderr.write("\n")
            sys.stderr.flush()
            self._width = 0

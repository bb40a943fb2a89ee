"""What a chat's reply looks like in a terminal."""

from __future__ import annotations

import sys

from progress_bar import ProgressBar


class Screen:
    """Shows a reply: answers on standard output, everything else on standard error.

    All is shown as it comes, but several answers come interleaved: they wait for the end.
    """

    def __init__(self, several: bool) -> None:
        self._several = several
        self._waiting: list[tuple[int, str, str]] = []
        self._heading = ""
        self._out = sys.stdout
        self._end = ""  # the last character on the current line
        self._bar = ProgressBar()

    def text(self, choice: int, heading: str, piece: str) -> None:
        if self._several:
            self._waiting.append((choice, f"{heading} {choice + 1}", piece))
        else:
            self._show(heading, piece)

    def progress(self, stage: str, step: int, steps: int) -> None:
        self._end_line()
        self._bar.show(stage, step, steps)

    def close(self) -> None:
        self._bar.close()
        for _, heading, piece in sorted(self._waiting, key=lambda waiting: waiting[0]):
            self._show(heading, piece)
        self._end_line()

    def _show(self, heading: str, piece: str) -> None:
        self._bar.close()
        if heading != self._heading:
            self._end_line()
            self._heading = heading
            self._out = sys.stdout if heading.startswith("answer") else sys.stderr
            if heading != "answer":
                print(f"{heading}:", file=self._out)
        self._out.write(piece)
        self._out.flush()
        self._end = piece[-1]

    def _end_line(self) -> None:
        if self._end not in ("", "\n"):
            print(file=self._out, flush=True)
        self._end = ""

"""LogFollower: what a worker's log says about it, read on from where it was read last."""

import os
import re
from pathlib import Path

#: As worker.main and the engine process format them.
_LINE = re.compile(rb"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (?P<level>[A-Z]+) (?P<name>\S+): (?P<text>.*)")
_TROUBLE = (b"WARNING", b"ERROR", b"CRITICAL")
_READY = b"engine ready: "
#: Of what was written since the last look, so much of the end is read.
_MAX_BYTES = 1 << 20
_MAX_SHOWN = 300


class LogFollower:
    """`is_ready`: the engine has loaded its model; `trouble`: the last warning or error; both since `restart`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.restart()

    def restart(self) -> None:
        """Forget everything up to the log's present end: another process begins to write there."""
        self.is_ready = False
        self.trouble: str | None = None
        self._position = self._path.stat().st_size if self._path.exists() else 0
        self._rest = b""

    def read(self) -> None:
        """Take in what has been written since."""
        try:
            with self._path.open("rb") as file:
                end = file.seek(0, os.SEEK_END)
                file.seek(max(self._position, end - _MAX_BYTES))
                text = self._rest + file.read()
                self._position = file.tell()
        except FileNotFoundError:
            return
        # The last line may be half written.
        *lines, self._rest = text.split(b"\n")
        for line in lines:
            if (match := _LINE.fullmatch(line)) is None:
                continue
            if match["text"].startswith(_READY):
                self.is_ready = True
            if match["level"] in _TROUBLE:
                shown = match["text"].decode("utf-8", "replace")
                self.trouble = shown if len(shown) <= _MAX_SHOWN else shown[:_MAX_SHOWN] + "..."

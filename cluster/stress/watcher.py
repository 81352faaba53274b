"""Progress of the runs as a bar on the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class ProgressWatcher:
    """One bar a run; a run that has ended keeps its bar when `keeps` is set."""

    def __init__(self, console: Console, *, keeps: bool = True) -> None:
        self._console = console
        self._keeps = keeps
        self._bar: Progress | None = None

    def begin(self, name: str, total: int) -> None:
        self.end()
        if not (self._keeps or self._console.is_terminal):
            return
        self._bar = Progress(
            TextColumn("{task.description:<24}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=not self._keeps,
        )
        self._bar.add_task(name, total=total, note="")
        self._bar.start()

    def advance(self, note: str) -> None:
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], advance=1, note=note)

    def end(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

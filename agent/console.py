"""What the commands print through: results on standard output, everything else on standard error."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

ReportBytes = Callable[[int, int], None]


def console() -> Console:
    return Console()


def errors_console() -> Console:
    return Console(stderr=True)


def _bars() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    return Progress(*columns, console=errors_console(), transient=True)


@contextmanager
def progress_bars() -> Iterator[Callable[[str], ReportBytes]]:
    """Bars over bytes on standard error: ask for one by its title, then call it with (done, total)."""
    with _bars() as progress:

        def start(title: str) -> ReportBytes:
            task = progress.add_task(title, total=None)
            return lambda done, total: progress.update(task, completed=done, total=total)

        yield start


@contextmanager
def progress_bar(title: str) -> Iterator[ReportBytes]:
    """One bar; see `progress_bars`."""
    with progress_bars() as start:
        yield start(title)

"""`oneword top`: what a server does, again and again, until Ctrl-C."""

import argparse
import shutil
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

from engine.client import Client, ServerError
from engine.printing import printable
from oneword.load_display import History, Info, Rates, top_lines
from oneword.status import add_server, connect

_OTHER_SCREEN, _BACK = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
_HOME, _REST_OF_LINE, _REST = "\x1b[H", "\x1b[K", "\x1b[J"
_SMALLEST_INTERVAL_S = 0.1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_server(parser)
    parser.add_argument(
        "--interval-s", type=float, default=1.0, help="between two looks (default: %(default)s)"
    )
    parser.add_argument(
        "--once", action="store_true", help="print what was done in one interval, and end"
    )


def run(arguments: argparse.Namespace) -> int:
    """A frame for each interval; a server that goes away is waited for."""
    interval_s = max(arguments.interval_s, _SMALLEST_INTERVAL_S)
    with connect(arguments) as client:
        if arguments.once:
            before = client.server_info()
            time.sleep(interval_s)
            after = client.server_info()
            rates = Rates.between(before.load, after.load)
            history = History(values=[rates.images_per_s or 0.0])
            print("\n".join(top_lines(after, arguments.server, rates, history)))
            return 0
        client.server_info()  # what is not there from the start is an error
        with _screen():
            _follow(client, arguments.server, interval_s)
    return 0


def _follow(client: Client, address: str, interval_s: float) -> None:
    view = View(address)
    try:
        while True:
            _draw(view.frame(client.server_info))
            time.sleep(interval_s)
    except KeyboardInterrupt:
        return


class View:
    """What is shown, from one look to the next."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._last: Info | None = None
        self._history = History()

    def frame(self, ask: Callable[[], Info]) -> list[str]:
        """The lines to show now."""
        try:
            info = ask()
        except ServerError as error:
            self._last = None
            return [f"oneword top  {printable(self._address)}", "", printable(error)]
        rates = Rates(seconds=0.0)
        if self._last is not None:
            rates = Rates.between(self._last.load, info.load)
            self._history.add(rates.images_per_s or 0.0)
        self._last = info
        return top_lines(info, self._address, rates, self._history)


@contextmanager
def _screen() -> Generator[None]:
    """The terminal's other screen, so that what was on it before comes back."""
    if not sys.stdout.isatty():
        yield
        return
    sys.stdout.write(_OTHER_SCREEN)
    try:
        yield
    finally:
        sys.stdout.write(_BACK)
        sys.stdout.flush()


def _draw(lines: list[str]) -> None:
    if not sys.stdout.isatty():
        print("\n".join(lines), flush=True)
        return
    sys.stdout.write(as_frame(lines, *shutil.get_terminal_size()))
    sys.stdout.flush()


def as_frame(lines: list[str], columns: int, rows: int) -> str:
    """Lines cut to a terminal, written over what was there without a flicker."""
    shown = [f"{line[:columns]}{_REST_OF_LINE}" for line in lines[:rows]]
    return _HOME + "\r\n".join(shown) + _REST

"""A wish to stop, heard between two steps: Ctrl-C, `kill`, or the terminal that closes.

The first signal lets the step end; the run is saved and `train` returns. A second one interrupts at once. A signal that
the parent told us to ignore stays ignored: `nohup` does that with SIGHUP, and shells with SIGINT for what they start in
the background.
"""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def stop_on_signal() -> Iterator[Callable[[], int]]:
    """A function that gives the number of the signal that came, 0 if none did; handlers are put back afterwards."""
    asked = 0

    def ask(number: int, frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = number

    try:
        previous = {s: signal.signal(s, ask) for s in SIGNALS if signal.getsignal(s) is not signal.SIG_IGN}
    except ValueError:  # not in the main thread: signals go elsewhere anyway
        previous = {}
    try:
        yield lambda: asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

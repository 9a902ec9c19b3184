"""`diffusion-opt`: one command, thin over the package's functions. `diffusion-opt --help` lists what it can do.

How it ends is told by its exit status, so that `diffusion-opt distill … && next` goes on only with what is finished:

    0          done
    2          refused or failed, with one line that says why
    3          a training run that an alarm ended
    128 + n    stopped by signal n: 130 for Ctrl-C, 143 for `kill`, 129 for a terminal that was closed

Everything is imported inside `main`, because Ctrl-C while libraries load is to end in one line too.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def main(arguments: list[str] | None = None) -> None:
    """Entry point: expected failures end in one line on standard error and exit status 2, Ctrl-C in one and 130."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    with _interruption() as interrupted:
        try:
            from diffusion_opt.cli.commands import run

            run(arguments)
        except (ValueError, OSError, FloatingPointError) as error:
            _end(interrupted, str(error))
        except (KeyboardInterrupt, ImportError) as error:
            if not interrupted() and not isinstance(error, KeyboardInterrupt):
                raise
            _end(lambda: True, "")


def _end(interrupted: Callable[[], bool], message: str) -> None:
    """One line and the exit status. An error after Ctrl-C is its consequence: extension modules turn it into one."""
    print(f"diffusion-opt: {'interrupted' if interrupted() else message}", file=sys.stderr)
    raise SystemExit(128 + signal.SIGINT if interrupted() else 2) from None


@contextmanager
def _interruption() -> Iterator[Callable[[], bool]]:
    """Whether Ctrl-C was pressed; it raises KeyboardInterrupt as ever. Signals that are ignored stay so."""
    pressed = False

    def note(number: int, frame: object) -> None:
        nonlocal pressed
        pressed = True
        raise KeyboardInterrupt

    ours = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT)
    ours = ours and before is not signal.SIG_IGN
    if ours:
        signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        if ours:
            signal.signal(signal.SIGINT, before)

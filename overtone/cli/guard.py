"""The guard: stops the stack when the supervisor is gone without having done so.

It holds the reading end of a pipe whose only writing end is in the supervisor. A byte means that all is in order and
the guard may go; the end of the pipe without one means that the supervisor died. Started as
`python -m overtone.cli.guard DESCRIPTOR HOME RUN_ID`.
"""

import os
import signal
import sys
from pathlib import Path


def main(arguments: list[str]) -> int:
    """Wait for the supervisor's end; 0 when nothing is left running."""
    descriptor, home, run_id = int(arguments[0]), Path(arguments[1]), arguments[2]
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if os.read(descriptor, 1):
        return 0
    from overtone.cli.cleanup import stop_home
    from overtone.cli.state import RunFolder
    from overtone.logging import configure

    configure("guard")
    folder = RunFolder(home)
    # A new `up` or a `down` that was quicker holds the lock and clears up itself.
    if not folder.try_lock():
        return 0
    try:
        state = folder.load()
        if state is not None and state.run_id != run_id:
            return 0
        return 1 if stop_home(home, folder) else 0
    finally:
        folder.unlock()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

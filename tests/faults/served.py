"""The server's process: `oneword serve`, whose model heeds orders (tests/faults/poison.py)."""

import sys
from functools import partial

from engine.worker import remote_model
from engine.worker.process import WorkerCommand
from oneword.cli import main

remote_model.WorkerCommand = partial(WorkerCommand, module="tests.faults.poison")  # pyright: ignore[reportAttributeAccessIssue]

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

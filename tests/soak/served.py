"""The server's process: `oneword serve`, and a thread that tells what the process takes up.

A byte on stdin is answered by a line of JSON on stdout. What is done is remembered for two seconds
in place of ten minutes: else no soak would see how memory goes on after that.
"""

import asyncio
import gc
import json
import os
import sys
import threading
from typing import Any

from benchmarks.live_heap import live_heap_bytes
from engine.serving.executions import Memory
from oneword.cli import main

REMEMBERED = Memory(seconds=2.0, max_bytes=1 << 20)


def _answer_for_ever() -> None:
    while os.read(0, 1):  # not sys.stdin, whose lock a thread must not hold at the end
        for _ in range(3):
            gc.collect()
        found = gc.get_objects()
        tasks = sum(isinstance(one, asyncio.Task) and not one.done() for one in found)
        del found
        print(json.dumps({"heap_bytes": live_heap_bytes(), "tasks": tasks}), flush=True)


if __name__ == "__main__":
    defaults: Any = Memory.__init__.__kwdefaults__
    defaults["seconds"], defaults["max_bytes"] = REMEMBERED.seconds, REMEMBERED.max_bytes
    threading.Thread(target=_answer_for_ever, daemon=True).start()
    sys.exit(main(sys.argv[1:]))

"""A trial that takes its time: ``slow_trial.py FOLDER STEPS SECONDS``, for tests of SLURM.

It appends a line to ``FOLDER/steps`` for every step, and one to ``FOLDER/lives`` for every time it
is begun. At SIGTERM it saves, which here takes a step, and leaves with 75; more of them within a
second are the same request, later ones abort it. Begun again, it goes on behind its last step.
"""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any


def main(folder: Path, steps: int, seconds: float) -> int:
    asked: list[float] = []

    def stop(*_: Any) -> None:
        if asked and time.monotonic() - asked[0] > 1:
            os._exit(99)
        asked.append(time.monotonic())

    signal.signal(signal.SIGTERM, stop)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lives", "a") as file:
        file.write(f"{os.getpid()} {time.time()}\n")
    path = folder / "steps"
    path.touch()
    while (done := len(path.read_text().split())) < steps:
        time.sleep(seconds)
        with open(path, "a") as file:
            file.write(f"{done + 1}\n")
        if asked:
            print(f"saved at step {done + 1} after {len(asked)} SIGTERM", flush=True)
            return 75
    print("finished", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))

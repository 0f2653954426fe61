"""A trial that takes its time: ``slow_trial.py FOLDER LIVES SECONDS``, for tests of SLURM.

It appends a line to ``FOLDER/lives`` for every time it is begun, and one to ``FOLDER/steps`` for
every step, each of so many seconds. In the last of its lives it is finished after two steps; in
those before it goes on until it is stopped. At SIGTERM it saves, which here takes a step, and
leaves with 75; more of them within a second are the same request, later ones abort it. Begun again,
it goes on behind its last step.
"""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any


def main(folder: Path, lives: int, seconds: float) -> int:
    asked: list[float] = []

    def stop(*_: Any) -> None:
        if asked and time.monotonic() - asked[0] > 1:
            os._exit(99)
        asked.append(time.monotonic())

    signal.signal(signal.SIGTERM, stop)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lives", "a") as file:
        file.write("born\n")
    life = len((folder / "lives").read_text().splitlines())
    path = folder / "steps"
    path.touch()
    begin = len(path.read_text().split())
    while (done := len(path.read_text().split())) < begin + 2 or life < lives:
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

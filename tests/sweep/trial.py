"""A small program that behaves as ``moejax train`` does to the runner: ``trial.py WORKDIR NAME``.

Its name says what it does:

    slow*   takes two seconds for five steps, each a line of the file `steps`; then leaves what a
            finished run does
    rude*   slow, and saves only at the second signal
    bad*    says thirty lines and fails; `bad_then_good` only the first time

and all others do the same as slow ones, quickly.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

STEPS = 5


def main(workdir: Path, name: str) -> int:
    """Resumes where its last process ended; saves and exits with 75 at a signal."""
    asked = []
    signal.signal(signal.SIGTERM, lambda *_: (asked.append(1), os.write(1, b"asked\n")))
    (workdir / "pid").write_text(str(os.getpid()))
    print(f"{name} begins", flush=True)
    tried = workdir / "tried"
    if name == "bad" or (name == "bad_then_good" and not tried.exists()):
        tried.touch()
        print("\n\n".join(f"line {i}" for i in range(30)), flush=True)
        print("moejax: diverged", file=sys.stderr)
        return 1
    steps = workdir / "steps"
    steps.touch()
    while (done := len(steps.read_text().split())) < STEPS:
        time.sleep(0.4 if name.startswith(("slow", "rude")) else 0.01)
        if len(asked) > name.startswith("rude"):
            print("saved", flush=True)
            return 75
        with open(steps, "a") as file:
            file.write(f"{done + 1}\n")
    row = {"step": STEPS, "split": "eval"}
    (workdir / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (workdir / "summary.png").touch()
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))

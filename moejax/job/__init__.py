"""The processes of one job: how they join, agree, stop and end together.

JAX joins processes too, but only those that are all present and alike: if one is missing, or ends
alone, the others wait for minutes until JAX aborts them. So the processes first connect here, over
TCP at the coordinator's address, and stay connected until they end:

* `join` returns on every process once all have joined, or ends all of them with one line.
* `Job.exchange` compares a value of every process.
* `Job.ask_to_stop` and `Job.stops_at` turn a request to one process into a step at which all stop.
* A process that fails reports it (`Job.fail`), the death of one is noticed, and the others end
  within seconds: abruptly, since they may be in the middle of a computation that cannot end.

Process 0 has the `Hub` that all are connected to. Messages are lines of JSON.
"""

from moejax.job.member import Job, JobSpec
from moejax.job.membership import (
    current,
    join,
    leave,
    leave_together,
    report,
    report_failure,
    with_process,
)
from moejax.job.rendezvous import resolve_address

__all__ = [
    "Job",
    "JobSpec",
    "current",
    "join",
    "leave",
    "leave_together",
    "report",
    "report_failure",
    "resolve_address",
    "with_process",
]

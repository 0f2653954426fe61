"""The processes of one job: how they find each other, agree, stop and end together.

JAX joins processes too, but only those that are all there and alike: one that is missing, or that
ends alone, leaves the others waiting for minutes, and then JAX aborts them. So they meet here
first, over TCP at the coordinator's address, and stay connected until they end:

* `join` returns on every process when all are there, or ends all of them with one line.
* `Job.exchange` compares what each of them has.
* `Job.ask_to_stop` and `Job.stops_at` make a request to one of them a step at which all stop.
* A process that fails says so (`Job.fail`), one that dies is missed, and the others end within
  seconds: as by a kill, since they may be in the middle of a computation that cannot end.

Process 0 has the `Hub` that all are connected to. Messages are lines of JSON.
"""

from moejax.job.client import Job, Place
from moejax.job.farewell import current, farewell, join, leave, named, tell, telling
from moejax.job.rendezvous import resolved

__all__ = [
    "Job",
    "Place",
    "current",
    "farewell",
    "join",
    "leave",
    "named",
    "resolved",
    "tell",
    "telling",
]

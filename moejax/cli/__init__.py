"""The ``moejax`` command: parses the command line and dispatches to a command.

A command imports its dependencies when it runs.
"""

import errno
import io
import os
import sys
from collections.abc import Sequence

from moejax import job
from moejax.config.flags import Parser, check_flag
from moejax.config.overrides import take_overrides
from moejax.errors import UserError, suggest
from moejax.record import files
from moejax.train.signals import Stopped

FAILED = 1
USER_ERROR = 2
PREEMPTED = 75
INTERRUPTED = 130

TOGETHER = ("train", "eval")
"""The commands that may run in several processes."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit status.

    0 done, 1 a check (doctor) or a trial (sweep) failed or the loss is not finite, 2 the user's
    mistake, 75 preempted after saving (train, sweep), 130 interrupted.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    # A page's or a gate's module beside the user is found, as it is under `python -m`.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        # A name that the terminal's encoding lacks, or that is no text, is no reason to stop.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    with job.leave_together():
        return _exit_status(argv)


def _open_closed_streams() -> None:
    """Replace a stream that was closed (`2>&-`) by one that discards its output.

    Otherwise the next file to be opened, a log or a checkpoint, would get the stream's number and
    the messages that libraries write there; and `print` to a stderr that is None goes to stdout.
    """
    while (opened := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(opened)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))


def _exit_status(argv: list[str]) -> int:
    try:
        return _run(argv)
    except UserError as error:
        problem = " ".join(str(error).splitlines())
        return _leave(argv, USER_ERROR, "error: {}", problem)
    except Stopped as stopped:
        problem = f"was stopped by {stopped} before the first step"
        return _leave(
            argv,
            PREEMPTED,
            "stopped before the first step; run the same command again to start",
            problem,
        )
    except KeyboardInterrupt:
        return _leave(argv, INTERRUPTED, "interrupted", "was interrupted")
    except BrokenPipeError:
        # The reader of stdout (`head`) has left; buffered text must not raise again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        stopped_short = argv[0] == "train" or (argv[0] == "sweep" and "status" not in argv)
        return FAILED if stopped_short else 0
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            problem = f"{str(error.filename)[:60]}... cannot be accessed: {error.strerror}"
            return _leave(argv, USER_ERROR, "error: {}", f"{problem}; name another path")
        if error.errno not in files.FULL:
            raise
        problem = files.cannot_write(error.filename or "a file", error)
        return _leave(argv, USER_ERROR, "error: {}", problem)
    except RuntimeError as error:  # JAX's own type is one, and is not imported for this
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = " ".join(str(error).split())[:200]
        problem = (
            f"a device ran out of memory ({reason}); lower train.batch_size or train.seq_len, "
            "raise train.grad_accum, set model.remat, or split the model over more devices "
            "(mesh.fsdp, mesh.expert)"
        )
        return _leave(argv, USER_ERROR, "error: {}", problem)


def _leave(argv: list[str], status: int, line: str, problem: str) -> int:
    """Print the line and end the job that this process belongs to.

    The status, for a process alone; the others of a job say the problem.
    """
    spec = None
    if argv and argv[0] in TOGETHER and job.current() is None:
        from moejax.job.launch import job_spec_of_command

        spec = job_spec_of_command(argv)
    print(f"moejax: {line.format(job.with_process(problem, spec))}", file=sys.stderr, flush=True)
    if spec:
        job.report(spec, problem, status)
    return job.leave(status, problem)


def _run(argv: list[str]) -> int:
    parser, commands = build_parser()
    if not argv:
        parser.print_help(sys.stderr)
        return USER_ERROR
    if not argv[0].startswith("-") and argv[0] not in commands:
        raise UserError(f"unknown command {argv[0]!r}; {suggest(argv[0], commands)}")
    overrides, rest = take_overrides(argv)
    for word in rest[1:]:
        # Before argparse, which would first ask for the flag that is misspelt here.
        if argv[0] in commands and word.startswith("--") and word != "--":
            check_flag(word, commands[argv[0]])
    try:
        args, unknown = parser.parse_known_args(rest)
    except SystemExit as done:  # --help and --version, after printing
        return int(done.code or 0)
    command = commands[args.command]
    if unknown:
        raise UserError(f"unexpected argument {unknown[0]!r} (see `{command.prog} --help`)")
    if overrides and not args.takes_overrides:
        raise UserError(f"{command.prog} takes no config, so {overrides[0]} has no effect")
    args.overrides = overrides
    return args.run(args)


def build_parser() -> tuple[Parser, dict[str, Parser]]:
    """The parser of the whole command line, and the parser of each command."""
    from moejax import __version__
    from moejax.cli import (
        config,
        convert,
        data,
        doctor,
        eval,
        gates,
        generate,
        inspect,
        profile,
        report,
        scaling,
        sweep,
        train,
    )

    parser = Parser(
        prog="moejax",
        description="Mixture-of-Experts transformers in JAX, for research on gating functions.",
        epilog="A first run:\n  moejax train --config=configs/lm.py --workdir=runs/first\n\n"
        "`moejax COMMAND --help` explains a command.\n"
        "Exit status: 0 done, 1 a value or check failed, 2 a mistake in the command or config,\n"
        "75 preempted after saving.",
    )
    parser.add_argument("--version", action="version", version=f"moejax {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    train.add_command(commands)
    eval.add_command(commands)
    generate.add_command(commands)
    config.add_command(commands)
    profile.add_command(commands)
    inspect.add_command(commands)
    gates.add_command(commands)
    data.add_command(commands)
    convert.add_command(commands)
    sweep.add_command(commands)
    report.add_command(commands)
    scaling.add_command(commands)
    doctor.add_command(commands)
    return parser, dict(commands.choices)


if __name__ == "__main__":
    sys.exit(main())

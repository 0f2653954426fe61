"""The ``moejax`` command: parses the command line and dispatches to a command.

A command imports its dependencies when it runs.
"""

import argparse
import errno
import io
import os
import sys
from collections.abc import Sequence
from typing import Any

from moejax import job
from moejax.config.field import CPU_DEVICES
from moejax.config.flags import OVERRIDES, WORKDIR, Parser, check_flag
from moejax.config.overrides import take_overrides
from moejax.errors import UserError, suggest
from moejax.record import files
from moejax.train.signals import Stopped, stopping

FAILED = 1
USER_ERROR = 2
PREEMPTED = 75
INTERRUPTED = 130

TOGETHER = ("train", "eval")
"""The commands that may run in several processes."""

CONFIG_HELP = (
    "a built-in page (lm, vit, multitask, multimodal), path.py, package.module or the workdir of a "
    "run; :key=value,key=value after a page is its argument"
)


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

    Else the next file to be opened, a log or a checkpoint, would get the stream's number and what
    libraries write there; and `print` to a stderr that is None goes to stdout.
    """
    while (opened := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(opened)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115


def _exit_status(argv: list[str]) -> int:
    try:
        return _run(argv)
    except UserError as error:
        problem = " ".join(str(error).splitlines())
        return _leave(argv, USER_ERROR, "error: {}", problem)
    except Stopped as stopped:
        problem = f"was stopped by {stopped} before the first step"
        return _leave(
            argv, PREEMPTED, "stopped before the first step; the same command begins", problem
        )
    except KeyboardInterrupt:
        return _leave(argv, INTERRUPTED, "interrupted", "was interrupted")
    except BrokenPipeError:
        # The reader of stdout (`head`) has left; what is buffered must not raise again at exit.
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
    from moejax.cli import data, report, scaling, sweep
    from moejax.cli import train as evaluation

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
    _add_train(commands)
    evaluation.add_command(commands)
    _add_config(commands)
    _add_profile(commands)
    _add_gates(commands)
    data.add_command(commands)
    sweep.add_command(commands)
    report.add_command(commands)
    scaling.add_command(commands)
    _add_doctor(commands)
    return parser, dict(commands.choices)


def _add_train(commands: Any) -> None:
    parser = commands.add_parser(
        "train",
        help="train a model, or go on with a run",
        description="Trains the model that a config describes. The same command again in the same "
        "workdir\ngoes on from the last checkpoint; if the run had finished, it does nothing.",
        epilog="Examples:\n"
        "  moejax train --config=configs/lm.py:gate=switch --workdir=runs/switch\n"
        "  moejax train --config=configs/lm.py:size=debug --config.train.steps=20 --workdir=runs/a"
        f"\n\n{OVERRIDES}",
    )
    parser.add_argument("--config", required=True, metavar="SOURCE", help=CONFIG_HELP)
    parser.add_argument(
        "--workdir", required=True, **WORKDIR, help="where checkpoints and metrics are written"
    )
    parser.add_argument(
        "--restart",
        action="store_true",
        help="start again at step 0 although checkpoints of the run were lost",
    )
    parser.set_defaults(run=_train, takes_overrides=True)


def _train(args: argparse.Namespace) -> int:
    with stopping():  # what is imported and read below takes seconds
        from moejax.config import load, validate

        loaded = load(args.config, args.overrides)
        validate(loaded.config)

        from moejax.train import loop

        return loop.run(
            loaded.config, args.workdir, loaded.source, loaded.overrides, restart=args.restart
        )


def _add_config(commands: Any) -> None:
    parser = commands.add_parser(
        "config",
        help="show a resolved config",
        description="Prints every field with value, type and meaning, marks what differs from the "
        "page and\nfrom the defaults, and checks the config. Without a config: the defaults.",
        epilog="Examples:\n"
        "  moejax config\n"
        "  moejax config --config=configs/lm.py:gate=switch --config.train.steps=500 --diff\n"
        "  moejax config --workdir=runs/switch\n\n"
        f"{OVERRIDES}",
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--config", metavar="SOURCE", help=CONFIG_HELP)
    source.add_argument("--workdir", **WORKDIR, help="the config of a run")
    parser.add_argument("--diff", action="store_true", help="only what is not at its default")
    parser.flags += ["--config", "--workdir"]
    parser.set_defaults(run=_config, takes_overrides=True)


def _config(args: argparse.Namespace) -> int:
    from moejax import config as configs
    from moejax.cli.show import config_diff, config_tree
    from moejax.config.overrides import apply_overrides

    source = args.config
    if args.workdir:
        source = os.path.join(args.workdir, "config.json")
    if source:
        loaded = configs.load(source, args.overrides)
    else:
        resolved = configs.default()
        apply_overrides(resolved, args.overrides)
        loaded = configs.Loaded(resolved, configs.default(), "", tuple(args.overrides))
    print(config_diff(loaded) if args.diff else config_tree(loaded))
    mark = configs.validate(loaded.config).mark
    if mark:
        print(f"\nA token may see more than its past: {mark}")
    return 0


def _add_profile(commands: Any) -> None:
    parser = commands.add_parser(
        "profile",
        help="where a training step's time goes",
        description="Trains a few steps under the profiler. Prints a table of where a step's time "
        "goes and\nwrites a trace for Perfetto and TensorBoard.",
        epilog="Example:\n"
        "  moejax profile --config=configs/lm.py:gate=switch --steps=5 --out=runs/profile\n\n"
        f"docs/profile.md says how to read the table.\n\n{OVERRIDES}",
    )
    parser.add_argument("--config", required=True, metavar="SOURCE", help=CONFIG_HELP)
    parser.add_argument("--steps", type=int, default=5, metavar="N", help="traced (default 5)")
    parser.add_argument("--out", required=True, metavar="DIR", help="a new folder for the trace")
    parser.set_defaults(run=_profile, takes_overrides=True)


def _profile(args: argparse.Namespace) -> int:
    from moejax.config import load, validate

    if args.steps < 1:
        raise UserError(f"--steps={args.steps} must be at least 1")
    loaded = load(args.config, args.overrides)
    validate(loaded.config)

    from moejax.train.profile import trace

    return trace.run(loaded.config, args.steps, args.out)


def _add_gates(commands: Any) -> None:
    parser = commands.add_parser(
        "gates",
        help="list the gating functions",
        description="Lists every gate in a line: what a token's output may depend on, and what the"
        "\ngate does. With a name: its equation, cost and paper, the fields below moe.gate and "
        "their\ndefaults.",
        epilog="Examples:\n  moejax gates\n  moejax gates switch",
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="explain this gate")
    parser.set_defaults(run=_gates, takes_overrides=False)


def _gates(args: argparse.Namespace) -> int:
    from moejax.cli.show import gate_page, gates_table
    from moejax.job.launch import use_host_only

    use_host_only()
    text = gate_page(args.name) if args.name else gates_table()
    encoding = sys.stdout.encoding or "utf-8"  # a terminal without Greek letters gets escapes
    print(text.encode(encoding, "backslashreplace").decode(encoding))
    return 0


def _add_doctor(commands: Any) -> None:
    parser = commands.add_parser(
        "doctor",
        help="what this machine can run",
        description="Tries what moejax needs: devices, every collective, a matmul, one MoE layer.",
        epilog="Example:\n  moejax doctor --cpu-devices=8",
    )
    parser.add_argument(
        "--cpu-devices", default=4, type=int, metavar="N", help="virtual CPU devices (default 4)"
    )
    parser.set_defaults(run=_doctor, takes_overrides=False)


def _doctor(args: argparse.Namespace) -> int:
    if not 1 <= args.cpu_devices <= CPU_DEVICES:
        raise UserError(
            f"--cpu-devices={args.cpu_devices} must be at least 1 and at most {CPU_DEVICES}"
        )
    from moejax.cli.doctor import report

    return report(args.cpu_devices)


if __name__ == "__main__":
    sys.exit(main())

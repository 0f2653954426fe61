"""The ``moejax gates`` command."""

import argparse
import sys
from typing import Any


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "gates",
        help="list the gating functions",
        description="Lists every gate in a line: what a token's output may depend on, and what the"
        "\ngate does. With a name, prints its equation, cost and paper, and the fields below "
        "moe.gate\nwith their defaults.",
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

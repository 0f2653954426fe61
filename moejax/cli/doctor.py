"""The ``moejax doctor`` command."""

import argparse
from typing import Any

from moejax.config.field import CPU_DEVICES
from moejax.errors import UserError


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "doctor",
        help="check what this machine can run",
        description="Tests what moejax needs: devices, every collective, a matmul, one MoE layer.",
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
    from moejax.cli.machine import report

    return report(args.cpu_devices)

"""The ``moejax inspect`` command."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moejax.errors import UserError

if TYPE_CHECKING:
    from moejax.inspection.report import Description


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "inspect",
        help="describe the parameters of a model",
        description="Describes the newest checkpoint of a workdir, or a Hugging Face model: "
        "parameters in all\nand per token, by part, types, norms of the routers' rows and "
        "similarity of experts\n(cosines of their weights), by layer. Nothing is loaded whole: "
        "weights are read in blocks.",
        epilog="Examples:\n"
        "  moejax inspect runs/switch\n"
        "  moejax inspect runs/switch --arrays --no-weights\n"
        "  moejax inspect ~/models/OLMoE-1B-7B-0924\n"
        "  moejax inspect runs/switch --json | jq .parameters",
    )
    parser.add_argument("path", metavar="PATH", help="a workdir, or a Hugging Face folder")
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint (default: the newest)")
    parser.add_argument("--arrays", action="store_true", help="list every array with its shape")
    parser.add_argument(
        "--no-weights", action="store_true", help="read no weights: no norms, no similarity"
    )
    parser.add_argument("--json", action="store_true", help="everything, as JSON on a line")
    parser.set_defaults(run=_inspect, takes_overrides=False)


def _inspect(args: argparse.Namespace) -> int:
    from moejax.job.launch import use_host_only

    use_host_only()
    folder = Path(args.path).expanduser()
    if not folder.is_dir():
        raise UserError(f"{args.path} is not a folder; name a workdir or a Hugging Face model's")
    if args.step is not None and args.step < 0:
        raise UserError(f"--step={args.step} must be the number of a checkpoint, 0 or more")
    found = _described(folder, args.step, weights_too=not args.no_weights)
    print(json.dumps(found.json()) if args.json else "\n".join(found.lines(args.arrays)))
    return 0


def _described(folder: Path, step: int | None, weights_too: bool) -> "Description":
    from moejax.inspection.report import describe

    if not is_of_hugging_face(folder):
        from moejax.inspection.workdir import open_workdir

        return describe(open_workdir(folder, step), weights_too)
    from moejax.hf.tensors import TensorFolder
    from moejax.inspection.folder import open_folder

    if step is not None:
        raise UserError(f"--step={step}: {folder} is a Hugging Face model, which has no steps")
    with TensorFolder(folder) as tensors:
        return describe(open_folder(folder, tensors), weights_too)


def is_of_hugging_face(folder: Path) -> bool:
    """True if a folder has a config.json of transformers, or weights and no run."""
    try:
        keys = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        keys = {}
    if isinstance(keys, dict) and ("model_type" in keys or "architectures" in keys):
        return True
    return not keys and any(folder.glob("*.safetensors"))

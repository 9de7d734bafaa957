"""The commands of test.py: which one the flags select, and which flags it accepts."""

from pathlib import Path
from typing import Any

from lib.cli import Parser
from lib.config import load_config
from lib.errors import UserError
from lib.protocols import PAPER, SWITCHES, choose_protocols
from lib.report.names import PARTIAL, settings_path

PROTOCOL_FLAGS = ("protocol", *(name for name, switch in SWITCHES.items() if not switch.config_key))
VIS_FLAGS = ("vis_num", "vis_ids", "vis_maps", "vis_scale", "vis_color", "vis_format")
# The commands of test.py: the flags that each requires, and those that it accepts besides the configuration's.
COMMANDS = {
    "image": (
        ("resume", "image", "sentence", "out"),
        ("vis_color", *(name for name in PROTOCOL_FLAGS if name in SWITCHES and SWITCHES[name].without_target)),
    ),
    "table": (("table", "checkpoints"), ("table_dir", *PROTOCOL_FLAGS)),
    "vis_compare": (("vis_compare", "vis"), (*VIS_FLAGS, *PROTOCOL_FLAGS)),
    "evaluate": (
        ("resume",),
        ("json", "predictions", "shuffle_sentences", "baselines", "vis", *VIS_FLAGS, *PROTOCOL_FLAGS),
    ),
}


def choose_command(args: Any, parser: Parser) -> str:
    """Return the key of ``COMMANDS`` that the flags select.

    Args:
        args: the parsed flags.
        parser: the parser of ``args``.

    Raises:
        UserError: a required flag is missing, a value is not allowed, or flags cannot be combined.
    """
    if args.image or args.sentence or args.out:
        command = "image"
    elif args.table or args.checkpoints:
        command = "table"
    else:
        command = "vis_compare" if args.vis_compare else "evaluate"
    required, accepted = COMMANDS[command]
    for name in required:
        if not getattr(args, name):
            together = "".join(f" --{other}" for other in required)
            raise UserError(f"--{name} is missing. This command needs{together}. See --help.")
    for name in dict.fromkeys(name for groups in COMMANDS.values() for group in groups for name in group):
        if name not in required + accepted and getattr(args, name) != parser.get_default(name):
            selected_by = command if command != "evaluate" else "resume"
            raise UserError(f"--{name} cannot be combined with --{selected_by}.")
    for name in VIS_FLAGS:
        if getattr(args, name) != parser.get_default(name) and not args.vis and command != "image":
            raise UserError(f"--{name} needs --vis DIR, the folder for the images.")
    if args.vis_scale and not args.vis_maps:
        raise UserError("--vis_scale needs --vis_maps.")
    if parse_ids(args.vis_ids) and args.vis_num != parser.get_default("vis_num"):
        raise UserError("--vis_num cannot be combined with --vis_ids.")
    if any(not sentence.strip() for sentence in args.sentence or ()):
        raise UserError("--sentence is blank. Describe the object to segment.")
    if args.vis_num < 1:
        raise UserError(f"--vis_num {args.vis_num}: must be at least 1.")
    _check_outputs(args.predictions, args.json)
    choose_protocols(
        args.protocol or PAPER.name, **{name: getattr(args, name) for name in PROTOCOL_FLAGS if name in SWITCHES}
    )
    if command != "table":  # which chooses datasets in its own way
        load_config(args)
    return command


def parse_ids(text: str | None) -> frozenset[int]:
    """Parse ``--vis-ids 12,345``; None: an empty set. UserError: not a list of sent_ids."""
    if text is None:
        return frozenset()
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() for part in parts):
        raise UserError(f"--vis-ids {text}: not a list of sent_ids, such as 12,345.")
    return frozenset(map(int, parts))


def _check_outputs(predictions: str | None, json: str | None) -> None:
    if predictions and Path(predictions).suffix == PARTIAL:
        complete = predictions.removesuffix(PARTIAL)
        raise UserError(
            f"--predictions {predictions} is a partial file. To continue it, pass --predictions {complete}."
        )
    if predictions and json:
        written = (predictions, f"{predictions}{PARTIAL}", settings_path(predictions))
        if Path(json).resolve() in [Path(path).resolve() for path in written]:
            raise UserError(f"--json {json} is one of the files of --predictions. Choose another file name.")

"""Configuration of train.py and test.py: YAML overrides the defaults, flags override the YAML. Imports no torch."""

import argparse
import reprlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from yacs.config import CfgNode

from lib.cli import Parser, did_you_mean
from lib.errors import MissingFileError, UserError
from lib.files import Kind, protect
from lib.options import OPTIONS, Option
from lib.variants import BERT, MODELS, NO_FILE
from refer.datasets import parse_datasets

BASE_KEY = "_BASE_"
NAME_KEY = "MODEL.NAME"
MAX_LEVELS = max(option.key.count(".") for option in OPTIONS) + 1  # of nested keys


def _make_defaults() -> CfgNode:
    defaults = CfgNode()
    for option in OPTIONS:
        *parents, name = option.key.split(".")
        node = defaults
        for parent in parents:
            node = node.setdefault(parent, CfgNode())
        node[name] = option.default
    return defaults


DEFAULTS = _make_defaults()


class _Switch(argparse.Action):
    """A boolean with the flags ``--x`` and ``--no-x``."""

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, **kwargs)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, not str(option_string).startswith(("--no-", "--no_")))


def get_parser(script: str, description: str, add_arguments: Callable[[Parser], None]) -> Parser:
    """Return the parser of ``train`` or ``test`` with its options and the arguments added by ``add_arguments``.

    test.py also accepts the flags of train.py and ignores them; see :func:`unused_flags`.
    """
    parser = Parser(prog=f"{script}.py", description=description)
    cfg_help = "YAML file with configuration keys; flags override it"
    parser.add_input("--cfg", must_exist=True, metavar="FILE", help=cfg_help)
    add_arguments(parser)
    for option in OPTIONS:
        if option.flags:
            add_flags(parser, option, is_used=script in option.scripts)
    # Old launchers pass this to every process; the rank itself is read from the environment.
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser


def add_flags(parser: Parser, option: Option, *, is_used: bool) -> None:
    """Add the flags of an option, which ``--help`` hides unless they are used."""
    names, text = option.flag_names, option.help.replace("%", "%%")
    kwargs: dict[str, Any] = {"dest": option.key, "default": argparse.SUPPRESS}
    if isinstance(option.default, bool):
        kwargs["action"] = _Switch
        if not any(name.startswith("--no_") for name in names):
            names += (f"--no-{names[-1].removeprefix('--')}",)
    elif option.constant is not None:
        kwargs |= {"action": "store_const", "const": option.constant}
    else:
        kind = type(option.default)
        if kind is list:
            kwargs["action"], kind = "append", option.item
        metavar = None if option.choices else option.metavar or {int: "N", float: "X"}.get(kind, "NAME")
        kwargs |= {"type": kind, "choices": option.choices, "metavar": metavar}
        # Show the default, unless the help text already states one.
        if option.default not in ("", 0, []) and "(default" not in text and "(test.py" not in text:
            text += f" (default: {_defaults_text(option)})"
    if not is_used:  # accepted, hidden from --help, and returned by unused_flags
        kwargs["dest"], text = f"unused {names[0]}", argparse.SUPPRESS
    if is_used and option.path == "output":
        parser.add_output(*names, kind=Kind.FOLDER, help=text, **kwargs)
    elif is_used and option.path:
        parser.add_input(*names, must_exist=bool(option.hint), hint=option.hint, help=text, **kwargs)
    else:
        parser.add_argument(*names, help=text, **kwargs)


def _defaults_text(option: Option) -> str:
    """Return the default of an option, and those of the networks that have another one."""
    different: dict[str, list[str]] = {}
    for model in MODELS:
        if option.applies_to(model) and option.default_of(model) != option.default:
            different.setdefault(str(option.default_of(model)), []).append(model)
    return "; ".join([str(option.default), *(f"{', '.join(names)}: {value}" for value, names in different.items())])


def unused_flags(args: argparse.Namespace) -> list[str]:
    """Return the flags on the command line that only the other script uses."""
    return [name.removeprefix("unused ") for name in vars(args) if name.startswith("unused ")]


def load_config(args: argparse.Namespace, base: dict[str, Any] | None = None) -> tuple[CfgNode, dict[str, str]]:
    """Combine the network's defaults, ``base``, the YAML file and the flags; later ones override earlier ones.

    Args:
        args: parsed by the parser of :func:`get_parser`.
        base: values by dotted key, such as the saved configuration of a resumed run.

    Returns:
        the checked configuration, and {key: YAML file or flag that set it}.

    Raises:
        UserError: an unknown key, a value of another type or outside its range, or conflicting settings.
    """
    cfg, given = DEFAULTS.clone(), {}
    base, from_file = base or {}, read_config_file(args.cfg) if args.cfg else {}
    candidates = (vars(args).get(NAME_KEY), from_file.get(NAME_KEY, (None,))[0], base.get(NAME_KEY))
    name = next((name for name in candidates if name is not None), DEFAULTS.MODEL.NAME)
    if name in list(MODELS):  # checked below
        for key, value in MODELS[name].defaults.items():
            _set(cfg, key, value, f"defaults of {name}")
    for key, value in base.items():
        _set(cfg, key, value, "saved configuration")
    for key, (value, path) in from_file.items():
        _set(cfg, key, value, path)
        given[key] = path
    for option in OPTIONS:
        if option.key in vars(args):
            value = getattr(args, option.key)
            given[option.key] = option.flag_names[0 if value is True else -1]  # --alignment or --no_alignment
            _set(cfg, option.key, value, given[option.key])
    for option in OPTIONS:
        source = given.get(option.key, "saved configuration")
        option.check(lookup(cfg, option.key), source if source in option.flag_names else f"{source}: {option.key}")
    _check_conflicts(cfg, given)
    pairs = parse_datasets(cfg.DATA.ROOT, cfg.DATA.NAME, cfg.DATA.SPLIT_BY)
    cfg.DATA.NAME, cfg.DATA.SPLIT_BY = (",".join(names) for names in zip(*pairs, strict=True))
    return cfg, given


def _set(cfg: CfgNode, key: str, value: Any, source: str) -> None:
    """Set a dotted key. Raise a UserError if there is no such key or the value has another type."""
    known = {option.key: option for option in OPTIONS}
    if key not in known:
        raise UserError(f"{source}: unknown key {key}.{did_you_mean(key, list(known))}")
    *parents, name = key.split(".")
    lookup(cfg, ".".join(parents))[name] = _coerce(value, known[key], f"{source}: {key}")


def _coerce(value: Any, option: Option, name: str) -> Any:
    expected = type(option.default)
    if expected is float and not isinstance(value, bool):  # YAML reads 1 as an integer and 3e-5 as text
        try:
            return float(value)
        except (TypeError, ValueError, OverflowError):
            pass
    if expected is str and isinstance(value, str) and "\0" in value:
        raise UserError(f"{name} contains a NUL character.")
    if type(value) is not expected or (expected is list and not all(type(item) is option.item for item in value)):
        kind = f"list of {option.item.__name__}" if expected is list else expected.__name__
        raise UserError(f"{name} must be of type {kind}, not {_shortened(value)}.")
    return value


def _shortened(value: Any) -> str:
    """Return ``repr(value)``, shortened: aliases in a YAML file can make it infinitely long."""
    text = reprlib.repr(value)
    return text if len(text) <= 100 else f"{text[:100]}…"


def _check_conflicts(cfg: CfgNode, given: dict[str, str]) -> None:
    """Raise a UserError that names two settings, and where they were set, if they exclude each other."""
    name, model = cfg.MODEL.NAME, MODELS[cfg.MODEL.NAME]
    for option in OPTIONS:
        # Keys without a flag are sizes, which a file that is shared by several networks may contain.
        is_set = option.key in given and option.flags and lookup(cfg, option.key) != option.default_of(name)
        if is_set and not option.applies_to(name):
            raise UserError(
                f"{_setting(option.key, given)} does not apply to {model.title} (--model {name}), only to "
                f"{', '.join(option.models)}. Drop it."
            )
    if cfg.PRETRAINED.FROM_SCRATCH and cfg.PRETRAINED.INIT_FROM:
        _raise_conflict("PRETRAINED.FROM_SCRATCH", "PRETRAINED.INIT_FROM", given, remedy="--no-from_scratch")
    if cfg.TRAIN.TRAIN_TEMPERATURE and not cfg.TRAIN.ALIGNMENT:  # only the alignment losses depend on the temperatures
        _raise_conflict("TRAIN.TRAIN_TEMPERATURE", "TRAIN.ALIGNMENT", given, remedy="--no-train_temperature")
    if given.get("TRAIN.EPOCHS") == "--epochs":
        if given.get("TRAIN.STEPS") == "--steps":
            raise UserError("--epochs conflicts with --steps: both set the length of the training. Drop one of them.")
        cfg.TRAIN.STEPS = 0  # otherwise TRAIN.STEPS of the YAML file or of the resumed run would override --epochs


def _raise_conflict(first: str, second: str, given: dict[str, str], *, remedy: str) -> None:
    source = given.get(first, "the saved configuration")
    if source.startswith("--"):
        raise UserError(f"{source} conflicts with {_setting(second, given)}. Drop one of them.")
    raise UserError(
        f"{source} sets {first}, which conflicts with {_setting(second, given)}. Pass {remedy} or drop one of them."
    )


def _setting(key: str, given: dict[str, str]) -> str:
    """Return the name of a setting for messages: the flag that set it, or the key and its file."""
    source = given.get(key, "the saved configuration")
    return source if source.startswith("--") else f"{key} of {source}"


def lookup(cfg: CfgNode, key: str) -> Any:
    """Return the value of a dotted key."""
    for part in filter(None, key.split(".")):
        cfg = cfg[part]
    return cfg


def flatten(tree: dict, prefix: str = "") -> dict[str, Any]:
    """Return nested keys as dotted ones: {"A": {"B": 1}} → {"A.B": 1}.

    Deeper levels than those of the options are values, because aliases in a YAML file can nest a dict in itself.
    """
    flat = {}
    for name, value in tree.items():
        if isinstance(value, dict) and prefix.count(".") + 1 < MAX_LEVELS:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def read_config_file(path: str, including: tuple[Path, ...] = ()) -> dict[str, tuple[Any, str]]:
    """Read a YAML file and return {dotted key: (value, path of the file that sets it)}.

    ``_BASE_`` names another YAML file, relative to this one, that provides the keys that this file does not set.

    Args:
        path: of the YAML file.
        including: the files that include this one through ``_BASE_``, directly or indirectly.

    Raises:
        MissingFileError, UserError: the file is missing, not YAML, or includes itself.
    """
    if Path(path).resolve() in including:
        raise UserError(f"--cfg {path}: the file includes itself through {BASE_KEY}.")
    tree = read_yaml(path, f"--cfg {path}")
    if not isinstance(tree, dict):
        raise UserError(f"--cfg {path} contains no configuration keys.")
    base = tree.pop(BASE_KEY, None)
    keys = {key: (value, str(path)) for key, value in flatten(tree).items()}
    if base is None:
        return keys
    if not isinstance(base, str):
        raise UserError(f"--cfg {path}: {BASE_KEY} must be a file name, not {_shortened(base)}.")
    return read_config_file(str(Path(path).parent / base), (*including, Path(path).resolve())) | keys


def read_yaml(path: str | Path, source: str, kind: str = "valid YAML") -> Any:
    """Read a YAML file and return its content.

    Args:
        path: of the file.
        source: the file in messages, such as ``--cfg FILE``.
        kind: what the file should be, in the message about an invalid one.

    Raises:
        MissingFileError, UserError: the file cannot be read, or is not YAML.
    """
    try:
        with open(path, encoding="utf-8") as file:
            protect(path)
            return yaml.safe_load(file)
    except OSError as error:
        raise MissingFileError(f"{source}: {error.strerror}.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: encoding, dates, very long integers
        raise UserError(f"{source} is not {kind}: {' '.join(str(error).split())}") from error


def datasets_of(cfg: CfgNode) -> list[tuple[str, str]]:
    """Return (dataset, splitBy) of each configured dataset. Training validates on the first one."""
    return list(zip(cfg.DATA.NAME.split(","), cfg.DATA.SPLIT_BY.split(","), strict=True))


def divide_batch(cfg: CfgNode, given: dict[str, str], world_size: int) -> int:
    """Return the number of forward passes per process and optimizer step, and set ``TRAIN.GLOBAL_BATCH``.

    Raises:
        UserError: the global batch is not divisible by the samples of one forward pass of all processes.
    """
    train, per_pass = cfg.TRAIN, world_size * cfg.BATCH_SIZE
    if train.ACCUM_STEPS:
        total = per_pass * train.ACCUM_STEPS
        if train.GLOBAL_BATCH not in (0, total) and "TRAIN.GLOBAL_BATCH" in given:
            first, second = _setting("TRAIN.GLOBAL_BATCH", given), _setting("TRAIN.ACCUM_STEPS", given)
            raise UserError(
                f"{first} is {train.GLOBAL_BATCH}, but {second} {train.ACCUM_STEPS} × batch size {cfg.BATCH_SIZE} × "
                f"{world_size} process(es) = {total}. Set only one of the two."
            )
        train.GLOBAL_BATCH, train.ACCUM_STEPS = total, 0
    train.GLOBAL_BATCH = train.GLOBAL_BATCH or per_pass
    if train.GLOBAL_BATCH % per_pass:
        raise UserError(
            f"A global batch of {train.GLOBAL_BATCH} is not divisible by {world_size} process(es) × batch size "
            f"{cfg.BATCH_SIZE}. Change --batch-size or --global_batch."
        )
    return train.GLOBAL_BATCH // per_pass


def model_keywords(cfg: CfgNode, window_size: int) -> dict[str, Any]:
    """Return the configured keyword arguments of the network's build function."""
    model = cfg.MODEL
    keywords = {
        "swin_type": model.SWIN_TYPE,
        "window_size": window_size or None,
        "drop_path_rate": model.DROP_PATH_RATE,
        "text_dropout": model.TEXT_DROPOUT,
        "fusion": model.FUSION,
        "mha": model.MHA,
        "fusion_drop": model.FUSION_DROP,
        "embed_dim": model.EMBED_DIM or None,
        "depths": tuple(model.DEPTHS) or None,
        "num_heads": tuple(model.NUM_HEADS) or None,
        "text_dim": model.TEXT_DIM,
        "text_layers": model.TEXT_LAYERS,
        "text_heads": model.TEXT_HEADS,
        "vocab_size": model.VOCAB_SIZE,
        "align_dim": model.ALIGN_DIM,
    }
    applicable = {option.key for option in OPTIONS if option.applies_to(model.NAME)}
    return {name: value for name, value in keywords.items() if f"MODEL.{name.upper()}" in applicable}


def tokenizer_name(cfg: CfgNode, vocab_size: int) -> str:
    """Return the name or path of the configured tokenizer.

    The default is the tokenizer of ``--ck_bert`` if the language encoder starts from it, else BERT's. For RefShapes, it
    is the vocabulary of RefShapes if the language encoder starts from random weights or its vocabulary size is not
    BERT's.
    """
    pretrained = cfg.PRETRAINED
    if pretrained.TOKENIZER:
        return pretrained.TOKENIZER
    from_scratch = pretrained.FROM_SCRATCH or pretrained.BERT == NO_FILE
    if not (from_scratch or pretrained.INIT_FROM or pretrained.BERT == BERT):
        encoder = Path(pretrained.BERT)
        if not encoder.exists():
            return pretrained.BERT  # a name on the Hub
        vocabulary = (encoder if encoder.is_dir() else encoder.parent) / "vocab.txt"
        if vocabulary.is_file():
            return str(vocabulary)
    if cfg.DATA.NAME == "refshapes" and (from_scratch or vocab_size != DEFAULTS.MODEL.VOCAB_SIZE):
        return str(Path(cfg.DATA.ROOT, "refshapes", "vocab.txt"))
    return BERT


def options_table() -> str:
    """Return the Markdown text of docs/options.md."""
    intro = (
        "All options of train.py and test.py. A YAML file (`--cfg`) overrides the defaults; flags override the YAML. "
        "A flag `--no-...` sets a boolean to false. This page is generated from lib/options.py by `make docs`."
    )
    rows = ["| key | flags | default | meaning | scripts | may change on resume |", "|---|---|---|---|---|---|"]
    for option in OPTIONS:
        flags = " ".join(f"`{flag}`" for flag in option.flag_names) or "YAML only"
        choices = f" ({', '.join(option.choices)})" if option.choices else ""
        scripts, resume = ", ".join(option.scripts), "yes" if option.may_change_on_resume else ""
        default = f"`{option.default!r}`{_defaults_text(option).removeprefix(str(option.default))}"
        cells = (f"`{option.key}`", flags, default, f"{option.help}{choices}", scripts, resume)
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(["# Options", "", intro, "", *rows, ""])

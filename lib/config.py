"""Configuration: yacs defaults, then ``--cfg file.yaml``, then flags. Only this and main() functions see argparse."""

import argparse
import difflib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import yaml
from yacs.config import CfgNode

from lib.errors import MissingFileError, UserError
from lib.variants import BERT, BERT_VOCAB_SIZE, FUSIONS, IMG_SIZE, MAX_TOKENS, SWIN_VARIANTS
from refer.datasets import settle_split_systems

SMALLEST = 32  # a picture of at most this side leaves the last stage one position
MOST_TOKENS = 512  # positions of BERT
BASE_KEY = "_BASE_"

# In DATA, MODEL and PRETRAINED an empty value means: the published one, or what the checkpoint says.
# fmt: off
DEFAULTS = CfgNode({
    "DATA": {
        "ROOT": "./refer/data", "NAME": "refcoco", "SPLIT_BY": "", "SPLIT": "val",
        "IMG_SIZE": IMG_SIZE, "MAX_TOKENS": MAX_TOKENS,
    },
    "MODEL": {
        "SWIN_TYPE": "base", "WINDOW_SIZE": 0, "DROP_PATH_RATE": 0.3, "TEXT_DROPOUT": 0.1, "FUSION": "cross",
        "EMBED_DIM": 0, "DEPTHS": [], "NUM_HEADS": [], "TEXT_DIM": 768, "TEXT_LAYERS": 6, "TEXT_HEADS": 12,
        "VOCAB_SIZE": BERT_VOCAB_SIZE, "ALIGN_DIM": 256,
    },
    "PRETRAINED": {
        "SWIN": "", "BERT": BERT, "TOKENIZER": "", "FROM_SCRATCH": False, "INIT_FROM": "",
        "DDP_TRAINED": False,
    },
    "TRAIN": {
        "EPOCHS": 40, "STEPS": 0, "LR": 3e-5, "WEIGHT_DECAY": 1e-2, "AMSGRAD": False, "WARMUP_STEPS": 0,
        "CLIP_GRAD": 0.0, "ALIGNMENT": True, "TRAIN_TEMPERATURE": False, "EMA": 0.0,
        "ACCUM_STEPS": 0, "GLOBAL_BATCH": 0, "GLOBAL_NORM": False,
        "AMP": "off", "TF32": False, "COMPILE": False, "GRAD_CHECKPOINT": False,
        "SAVE_STEPS": 0, "SAVE_MINUTES": 30.0, "KEEP": 2,
    },
    "OUTPUT_DIR": "./checkpoints", "LOG_DIR": "./models", "MODEL_ID": "", "PRINT_FREQ": 10,
    "BATCH_SIZE": 6, "WORKERS": 2, "PIN_MEM": False, "SEED": 0, "DEVICE": "auto",
})
# fmt: on


class Flag(NamedTuple):
    """A command-line flag that sets a configuration key; ``value`` is what it sets where it takes no argument."""

    names: tuple[str, ...]
    key: str
    help: str
    scripts: tuple[str, ...] = ("train", "test")
    choices: tuple[str, ...] | None = None
    value: Any = None
    metavar: str | None = None


# fmt: off
TRAIN_ONLY, TEST_ONLY = ("train",), ("test",)
FLAGS = (
    Flag(("--dataset",), "DATA.NAME", "refcoco, refcoco+, refcocog, refshapes or your own; several (a,b,c): train on "
         "their union without the pictures of any evaluation split, validate on the first's", TRAIN_ONLY),
    Flag(("--dataset",), "DATA.NAME", "refcoco, refcoco+, refcocog, refshapes or your own", TEST_ONLY),
    Flag(("--splitBy",), "DATA.SPLIT_BY", "split system; must be given for refcocog: umd or google (default: unc, of "
         "your own the only one); of several datasets one each (a,b,c; default: the paper's)", TRAIN_ONLY),
    Flag(("--splitBy",), "DATA.SPLIT_BY", "split system; must be given for refcocog: umd or google (default: unc, of "
         "your own the only one)", TEST_ONLY),
    Flag(("--split",), "DATA.SPLIT", "split to validate on", TRAIN_ONLY),
    Flag(("--split",), "DATA.SPLIT", "split(s) to evaluate: one, several (val,testA,testB) or all", TEST_ONLY),
    Flag(("--refer_data_root",), "DATA.ROOT", "folder of the REFER layout"),
    Flag(("--img_size",), "DATA.IMG_SIZE", "side of the square that pictures are resized to (test.py: as trained)"),
    Flag(("--max_tokens",), "DATA.MAX_TOKENS", "token ids kept of a sentence (test.py: as trained)"),
    Flag(("--swin_type",), "MODEL.SWIN_TYPE", "size of the Swin encoder (test.py: read from the checkpoint)",
         choices=tuple(SWIN_VARIANTS)),
    Flag(("--window12",), "MODEL.WINDOW_SIZE", "Swin window of 12, whatever the type's pretrained file has", value=12),
    Flag(("--fusion",), "MODEL.FUSION", "where language and vision meet: the paper's ablations", TRAIN_ONLY,
         choices=tuple(FUSIONS)),
    Flag(("--pretrained_swin_weights",), "PRETRAINED.SWIN", "ImageNet Swin file (default: by type, in ./pretrained)",
         TRAIN_ONLY, metavar="FILE"),
    Flag(("--ck_bert",), "PRETRAINED.BERT", "BERT weights: a file, a folder or a hub name", TRAIN_ONLY, metavar="BERT"),
    Flag(("--bert_tokenizer",), "PRETRAINED.TOKENIZER",
         "a vocab.txt, a folder holding one, or a hub name (default: bert-base-uncased; refshapes: its own)",
         metavar="BERT"),
    Flag(("--from_scratch",), "PRETRAINED.FROM_SCRATCH", "start from random weights instead of ImageNet and BERT files",
         TRAIN_ONLY, value=True),
    Flag(("--init_from",), "PRETRAINED.INIT_FROM", "start from a checkpoint's weights, with a new optimizer",
         TRAIN_ONLY, metavar="FILE"),
    Flag(("--ddp_trained_weights",), "PRETRAINED.DDP_TRAINED",
         "insist that the checkpoint's keys begin with module. (stripping them needs no flag)", value=True),
    Flag(("--epochs",), "TRAIN.EPOCHS", "passes over the training split", TRAIN_ONLY),
    Flag(("--steps",), "TRAIN.STEPS", "optimizer steps of the whole training, instead of --epochs", TRAIN_ONLY),
    Flag(("-b", "--batch-size"), "BATCH_SIZE", "samples per process and forward pass"),
    Flag(("--accum-steps",), "TRAIN.ACCUM_STEPS", "forward passes per process and optimizer step", TRAIN_ONLY),
    Flag(("--global_batch",), "TRAIN.GLOBAL_BATCH",
         "samples per optimizer step of all processes, reached by accumulating (published: 12)", TRAIN_ONLY),
    Flag(("--global_norm",), "TRAIN.GLOBAL_NORM",
         "one normaliser of the cross-entropy for the whole global batch (published: one per forward pass)",
         TRAIN_ONLY, value=True),
    Flag(("--lr",), "TRAIN.LR", "initial learning rate", TRAIN_ONLY),
    Flag(("--wd", "--weight-decay"), "TRAIN.WEIGHT_DECAY", "weight decay", TRAIN_ONLY, metavar="WD"),
    Flag(("--amsgrad",), "TRAIN.AMSGRAD", "AMSGrad variant of AdamW", TRAIN_ONLY, value=True),
    Flag(("--warmup_steps",), "TRAIN.WARMUP_STEPS", "steps of linear warm-up (published: 0)", TRAIN_ONLY),
    Flag(("--clip_grad",), "TRAIN.CLIP_GRAD", "largest gradient norm, 0: no clipping (published: 0)", TRAIN_ONLY),
    Flag(("--no_alignment",), "TRAIN.ALIGNMENT", "train without the alignment losses", TRAIN_ONLY, value=False),
    Flag(("--train_temperature",), "TRAIN.TRAIN_TEMPERATURE",
         "train the temperatures too, as the paper says (published code: fixed)", TRAIN_ONLY, value=True),
    Flag(("--ema",), "TRAIN.EMA", "decay of a moving average of the weights, which is then validated and kept as best; "
         "0: none (published: 0)", TRAIN_ONLY),
    Flag(("--amp",), "TRAIN.AMP", "mixed precision (published: off)", TRAIN_ONLY, choices=("off", "bf16", "fp16")),
    Flag(("--tf32",), "TRAIN.TF32", "float32 products and convolutions by TF32, on GPUs that have it (published: not)",
         TRAIN_ONLY, value=True),
    Flag(("--compile",), "TRAIN.COMPILE", "compile the encoders' blocks (the first steps take minutes)",
         TRAIN_ONLY, value=True),
    Flag(("--grad_checkpoint",), "TRAIN.GRAD_CHECKPOINT",
         "compute the encoders' activations again for backward instead of keeping them: less memory, slower",
         TRAIN_ONLY, value=True),
    Flag(("--save_steps",), "TRAIN.SAVE_STEPS", "a checkpoint every so many steps too, 0: not by steps", TRAIN_ONLY),
    Flag(("--save_minutes",), "TRAIN.SAVE_MINUTES", "a checkpoint every so many minutes too, 0: not by the clock",
         TRAIN_ONLY),
    Flag(("--keep",), "TRAIN.KEEP", "how many of the newest resumable checkpoints stay", TRAIN_ONLY),
    Flag(("--output-dir",), "OUTPUT_DIR", "checkpoints go to <output-dir>/<model_id>/", TRAIN_ONLY),
    Flag(("--log_dir",), "LOG_DIR", "logs go to <log_dir>/<model_id>/", TRAIN_ONLY),
    Flag(("--model_id",), "MODEL_ID", "name of the run (default: <dataset>_<splitBy>_<swin_type>_<time>)", TRAIN_ONLY),
    Flag(("--print-freq",), "PRINT_FREQ", "steps between log lines", TRAIN_ONLY),
    Flag(("-j", "--workers"), "WORKERS", "data-loading processes per process"),
    Flag(("--pin_mem",), "PIN_MEM", "page-locked memory for faster transfers to a GPU", value=True),
    Flag(("--seed",), "SEED", "of everything random"),
    Flag(("--device",), "DEVICE", "auto, cpu, cuda or cuda:N"),
)
# fmt: on

POSITIVE_KEYS = (
    "DATA.IMG_SIZE", "DATA.MAX_TOKENS", "TRAIN.EPOCHS", "BATCH_SIZE", "TRAIN.LR", "PRINT_FREQ", "TRAIN.KEEP",
    "MODEL.TEXT_DIM", "MODEL.TEXT_LAYERS", "MODEL.TEXT_HEADS", "MODEL.VOCAB_SIZE", "MODEL.ALIGN_DIM",
)  # fmt: skip
NON_NEGATIVE_KEYS = (
    "TRAIN.STEPS", "TRAIN.WEIGHT_DECAY", "TRAIN.WARMUP_STEPS", "TRAIN.CLIP_GRAD", "TRAIN.EMA", "TRAIN.ACCUM_STEPS",
    "TRAIN.GLOBAL_BATCH", "TRAIN.SAVE_STEPS", "TRAIN.SAVE_MINUTES", "WORKERS", "SEED", "MODEL.WINDOW_SIZE",
    "MODEL.EMBED_DIM", "MODEL.DROP_PATH_RATE", "MODEL.TEXT_DROPOUT",
)  # fmt: skip


class Parser(argparse.ArgumentParser):
    """argparse that takes no abbreviations, and for a typo names the right flag in one line."""

    def __init__(self, **how: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **how)

    def option_names(self) -> list[str]:
        return [name for action in self._actions for name in action.option_strings]

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:  # type: ignore[override]
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(f"unknown flag {unknown[0]}" + did_you_mean(unknown[0].split("=")[0], self.option_names()))
        return parsed

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def did_you_mean(wrong: str, right: Sequence[str]) -> str:
    """``; did you mean …?`` for the closest of the right names, or nothing."""
    same = {name.lower().replace("-", "_").lstrip("_"): name for name in right}
    close = difflib.get_close_matches(wrong.lower().replace("-", "_").lstrip("_"), same, n=1, cutoff=0.6)
    return f"; did you mean {same[close[0]]}?" if close else ""


def get_parser(script: str, description: str, add_more: Callable[[Parser], None]) -> Parser:
    """The parser of ``train`` or ``test``: the shared flags of that script and, by ``add_more``, its own."""
    parser = Parser(prog=f"{script}.py", description=description)
    parser.add_argument("--cfg", metavar="FILE", help="yaml with configuration keys; flags go before it")
    add_more(parser)
    for flag in FLAGS:
        if script in flag.scripts:
            default = lookup(DEFAULTS, flag.key)
            how: dict[str, Any] = {"dest": flag.key, "default": argparse.SUPPRESS, "help": flag.help.replace("%", "%%")}
            if flag.value is not None:
                how |= {"action": "store_const", "const": flag.value}
            else:
                shown = (
                    ""
                    if default in ("", 0) or "(default" in flag.help or "(test.py" in flag.help
                    else f" (default: {default})"
                )
                how |= {"type": type(default), "choices": flag.choices, "help": how["help"] + shown}
                how["metavar"] = flag.metavar or (
                    None if flag.choices else flag.names[-1].lstrip("-").upper().replace("-", "_")
                )
            parser.add_argument(*flag.names, **how)
        elif not any(script in other.scripts for other in FLAGS if other.names == flag.names):
            takes = {"action": "store_const", "const": True} if flag.value is not None else {}
            parser.add_argument(
                *flag.names, dest=f"unused {flag.names[-1]}", default=argparse.SUPPRESS, help=argparse.SUPPRESS, **takes
            )
    # Old launchers pass this to every process; the rank itself is read from the environment.
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser


def lookup(cfg: CfgNode, key: str) -> Any:
    """The value of a dotted key."""
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def flatten(tree: dict, prefix: str = "") -> dict[str, Any]:
    """{"A": {"B": 1}} → {"A.B": 1}."""
    flat = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def read_config_file(path: str, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The dotted keys of a yaml file, as they are written there.

    Its ``_BASE_``, if it has one, names the file (relative to its own folder) whose keys hold where it has none.

    Args:
        path: of the yaml file.
        above: the files that have this one as their base.

    Raises:
        MissingFileError, UserError: no such file; not yaml; a file is its own base.
    """
    if Path(path).resolve() in above:
        raise UserError(f"--cfg {path}: by {BASE_KEY} it is its own base")
    try:
        with open(path, encoding="utf-8") as file:
            tree = yaml.safe_load(file)
    except OSError as error:
        raise MissingFileError(f"--cfg {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--cfg {path} is not valid yaml: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise UserError(f"--cfg {path} holds no configuration keys")
    base = tree.pop(BASE_KEY, None)
    if base is None:
        return flatten(tree)
    if not isinstance(base, str):
        raise UserError(f"--cfg {path}: {BASE_KEY} must be a file's name, not {base!r}")
    return read_config_file(str(Path(path).parent / base), (*above, Path(path).resolve())) | flatten(tree)


def apply(cfg: CfgNode, keys: dict[str, Any], source: str) -> None:
    """Set dotted keys, each of the type its default has.

    Raises:
        UserError: a key that doesn't exist, with the one that was meant; a value of another type.
    """
    known = flatten(DEFAULTS)
    for key, value in keys.items():
        if key not in known:
            raise UserError(f"{source}: unknown key {key}{did_you_mean(key, list(known))}")
        *parents, name = key.split(".")
        node = lookup(cfg, ".".join(parents)) if parents else cfg
        node[name] = _coerced(value, lookup(DEFAULTS, key), f"{source}: {key}")


def _coerced(value: Any, default: Any, where: str) -> Any:
    wanted = type(default)
    if wanted is float and not isinstance(value, bool):  # yaml reads 1 as an integer and 3e-5 as text
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    fits = type(value) is wanted and (wanted is not list or all(type(item) is int for item in value))
    if not fits:
        raise UserError(
            f"{where} must be of type {'list of int' if wanted is list else wanted.__name__}, not {value!r}"
        )
    return value


def resolve(args: argparse.Namespace, base: dict[str, Any] | None = None) -> tuple[CfgNode, set[str]]:
    """Defaults, then ``base`` (dotted keys, such as a resumed run's), then the yaml, then the flags.

    Returns:
        the checked configuration and the dotted keys that the yaml or a flag set.

    Raises:
        UserError: a value of the wrong type or outside its range.
    """
    cfg = DEFAULTS.clone()
    apply(cfg, base or {}, "saved configuration")
    from_file = read_config_file(args.cfg) if args.cfg else {}
    apply(cfg, from_file, args.cfg)
    known = flatten(DEFAULTS)
    flags = {key: value for key, value in vars(args).items() if key in known}
    apply(cfg, flags, "flags")
    if "TRAIN.EPOCHS" in flags:
        if "TRAIN.STEPS" in flags:
            raise UserError("--epochs and --steps both say how long to train: give one of them")
        cfg.TRAIN.STEPS = 0  # else the flag would do nothing beside a file's or a resumed run's steps
    _check_ranges(cfg)
    pairs = settle_split_systems(cfg.DATA.ROOT, cfg.DATA.NAME, cfg.DATA.SPLIT_BY)
    cfg.DATA.NAME, cfg.DATA.SPLIT_BY = (",".join(names) for names in zip(*pairs, strict=True))
    return cfg, set(from_file) | set(flags)


def datasets_of(cfg: CfgNode) -> list[tuple[str, str]]:
    """(dataset, splitBy) of each dataset of a resolved configuration; the first is the one to validate on."""
    return list(zip(cfg.DATA.NAME.split(","), cfg.DATA.SPLIT_BY.split(","), strict=True))


def _check_ranges(cfg: CfgNode) -> None:
    flag_of = {flag.key: flag.names[-1] for flag in FLAGS}
    for flag in FLAGS:
        if flag.choices and lookup(cfg, flag.key) not in flag.choices:
            raise UserError(f"{flag.key} {lookup(cfg, flag.key)!r}: choose one of {', '.join(flag.choices)}")
    if cfg.TRAIN.TRAIN_TEMPERATURE and not cfg.TRAIN.ALIGNMENT:
        raise UserError(
            "--train_temperature with --no_alignment: only the alignment losses train temperatures; drop one"
        )
    if cfg.DATA.IMG_SIZE <= SMALLEST:
        raise UserError(f"--img_size {cfg.DATA.IMG_SIZE}: must be above {SMALLEST}")
    if cfg.DATA.MAX_TOKENS > MOST_TOKENS:
        raise UserError(f"--max_tokens {cfg.DATA.MAX_TOKENS}: BERT has positions for {MOST_TOKENS}")
    for key in ("MODEL.DROP_PATH_RATE", "MODEL.TEXT_DROPOUT", "TRAIN.EMA"):
        if lookup(cfg, key) >= 1:
            raise UserError(f"{flag_of.get(key, key)} {lookup(cfg, key)}: must be below 1")
    for key in (*POSITIVE_KEYS, *NON_NEGATIVE_KEYS):
        value, name = lookup(cfg, key), flag_of.get(key, key)
        if not value >= 0 or value == float("inf") or (key in POSITIVE_KEYS and value == 0):
            raise UserError(f"{name} {value}: must be {'above' if key in POSITIVE_KEYS else 'at least'} 0")


def divide_batch(cfg: CfgNode, given: set[str], world_size: int) -> int:
    """Forward passes per process and optimizer step; afterwards ``TRAIN.GLOBAL_BATCH`` says what a step's samples are.

    Raises:
        UserError: the global batch can't be divided so.
    """
    train, per_pass = cfg.TRAIN, world_size * cfg.BATCH_SIZE
    if train.ACCUM_STEPS:
        total = per_pass * train.ACCUM_STEPS
        if train.GLOBAL_BATCH not in (0, total) and "TRAIN.GLOBAL_BATCH" in given:
            raise UserError(
                f"--global_batch {train.GLOBAL_BATCH}, but {world_size} process(es) × --batch-size {cfg.BATCH_SIZE} × "
                f"--accum-steps {train.ACCUM_STEPS} are {total}: leave one of them out"
            )
        train.GLOBAL_BATCH, train.ACCUM_STEPS = total, 0
    train.GLOBAL_BATCH = train.GLOBAL_BATCH or per_pass
    if train.GLOBAL_BATCH % per_pass:
        raise UserError(
            f"a global batch of {train.GLOBAL_BATCH} can't be divided among {world_size} process(es) with --batch-size "
            f"{cfg.BATCH_SIZE}: change --batch-size or --global_batch"
        )
    return train.GLOBAL_BATCH // per_pass


def unused_flags(args: argparse.Namespace) -> list[str]:
    """Flags that were given but belong to the other script."""
    return [name.removeprefix("unused ") for name in vars(args) if name.startswith("unused ")]


def model_keywords(cfg: CfgNode, window_size: int) -> dict[str, Any]:
    """The keywords of build_crossvlt that a configuration means."""
    model = cfg.MODEL
    return {
        "swin_type": model.SWIN_TYPE,
        "window_size": window_size or None,
        "drop_path_rate": model.DROP_PATH_RATE,
        "text_dropout": model.TEXT_DROPOUT,
        "fusion": model.FUSION,
        "embed_dim": model.EMBED_DIM or None,
        "depths": tuple(model.DEPTHS) or None,
        "num_heads": tuple(model.NUM_HEADS) or None,
        "text_dim": model.TEXT_DIM,
        "text_layers": model.TEXT_LAYERS,
        "text_heads": model.TEXT_HEADS,
        "vocab_size": model.VOCAB_SIZE,
        "align_dim": model.ALIGN_DIM,
    }


def tokenizer_name(cfg: CfgNode, vocab_size: int) -> str:
    """The tokenizer a configuration means: as given, else BERT's — or RefShapes' own, on RefShapes with a model whose
    word embeddings aren't BERT's."""
    if cfg.PRETRAINED.TOKENIZER:
        return cfg.PRETRAINED.TOKENIZER
    if cfg.DATA.NAME == "refshapes" and (cfg.PRETRAINED.FROM_SCRATCH or vocab_size != DEFAULTS.MODEL.VOCAB_SIZE):
        return str(Path(cfg.DATA.ROOT, "refshapes", "vocab.txt"))
    return BERT

"""What is in a dataset's splits: counts, sentence lengths, object sizes, holes in masks, and whether splits leak.

    python -m refer.stats --dataset refcoco                          # every split system of it that is there
    python -m refer.stats --dataset refcocog --splitBy umd --out stats.png --json stats.json
    python -m refer.stats --dataset refcoco,refcoco+,refcocog        # pictures that the sets share, too

Annotation files are enough; no picture is opened.
"""

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path

from lib.cli import run_command
from lib.errors import MissingFileError, UserError
from lib.files import atomic_write, check_writable, write_text
from refer.datasets import check_dataset, split_systems
from refer.refer import REFER
from refer.stats.figure import DPI, draw
from refer.stats.statistics import shared_images, statistics_of
from refer.stats.tables import report, sharing, tables
from utils import LOGGER, set_up_logging


def choose_sets(data_root: str | Path, datasets: str, split_by: str = "") -> list[tuple[str, str]]:
    """(dataset, splitBy) of what the flags name.

    Args:
        data_root: folder of the REFER layout.
        datasets: one or several, with commas.
        split_by: one for all of them, or as many as there are, or several for one dataset; empty: all that are there.

    Raises:
        UserError: no such dataset or split system; numbers that don't fit.
    """
    names, systems = ([one.strip() for one in text.split(",") if one.strip()] for text in (datasets, split_by))
    if not names:
        raise UserError(f"--dataset {datasets!r} names no dataset")
    if not systems:
        pairs = []
        for name in names:
            known = split_systems(data_root, name)
            there = [one for one in known if Path(data_root, name, f"refs({one}).p").is_file()]
            pairs += [(name, one) for one in there or known[:1]]  # REFER says what is missing
    elif len(names) == 1 or len(systems) == 1:
        pairs = [(name, one) for name in names for one in systems]
    elif len(names) == len(systems):
        pairs = list(zip(names, systems, strict=True))
    else:
        raise UserError(f"--splitBy names {len(systems)} split systems for {len(names)} datasets: give one for each")
    for name, one in pairs:
        check_dataset(data_root, name, one)
    return list(dict.fromkeys(pairs))


def get_parser() -> "Parser":  # noqa: F821
    from lib.cli import Parser
    from lib.config import DEFAULTS

    parser = Parser(prog="python -m refer.stats", description=__doc__)
    add = parser.add_argument
    add(
        "--dataset",
        default=DEFAULTS.DATA.NAME,
        metavar="NAMES",
        help="one or several with commas: refcoco, refcoco+, refcocog, refshapes or your own (%(default)s)",
    )
    add("--splitBy", default="", metavar="NAMES", help="split system(s) (default: all that are there)")
    add("--refer_data_root", default=DEFAULTS.DATA.ROOT, metavar="DIR", help="folder of the REFER layout (%(default)s)")
    add("--max_tokens", type=int, default=DEFAULTS.DATA.MAX_TOKENS, help="token ids kept of a sentence (%(default)s)")
    add(
        "--bert_tokenizer",
        default="",
        metavar="BERT",
        help="a vocab.txt, a folder holding one, or a hub name (default: bert-base-uncased; refshapes: its own)",
    )
    add(
        "--out",
        metavar="PNG",
        help="the distributions as a picture (default: a name that tells the sets, in models/stats/)",
    )
    add("--json", metavar="FILE", help="write everything shown as JSON")
    return parser


def main() -> None:
    from bert.tokenization import encode, fingerprint, load_tokenizer
    from lib.config import DEFAULTS
    from lib.variants import BERT

    args = get_parser().parse_args(sys.argv[1:])
    set_up_logging()
    if args.max_tokens <= 0:
        raise UserError(f"--max_tokens {args.max_tokens}: must be above 0")
    sets = choose_sets(args.refer_data_root, args.dataset, args.splitBy)
    out = Path(args.out or Path(DEFAULTS.LOG_DIR, "stats", _file_name(sets)))
    inputs = [Path(args.refer_data_root, dataset) for dataset, _ in sets]
    check_writable(out, suffix=".png", inputs=inputs)
    if args.json:
        check_writable(args.json, inputs=inputs)

    def vocabulary_of(dataset: str) -> str:
        own = Path(args.refer_data_root, "refshapes", "vocab.txt")
        return args.bert_tokenizer or (str(own) if dataset == "refshapes" and own.is_file() else BERT)

    @functools.cache
    def tokenizer_of(vocabulary: str) -> "BertTokenizer | None":  # noqa: F821
        try:
            return load_tokenizer(vocabulary)
        except MissingFileError as error:
            if args.bert_tokenizer:
                raise
            LOGGER.warning(f"sentence lengths in words only: {error}")
            return None

    def counter(tokenizer: "BertTokenizer") -> Callable[[list[str]], list[int]]:  # noqa: F821
        return lambda sentences: list(map(len, encode(tokenizer, sentences)))

    tokenizers = {dataset: tokenizer_of(vocabulary_of(dataset)) for dataset, _ in sets}
    objects: dict[str, dict] = {dataset: {} for dataset in tokenizers}
    found = []
    for dataset, split_by in sets:
        refer = REFER(args.refer_data_root, dataset, split_by)
        tokenizer = tokenizers[dataset]
        count_tokens = None if tokenizer is None else counter(tokenizer)
        found.append(statistics_of(refer, count_tokens, max_tokens=args.max_tokens, known=objects[dataset]))
        print(f"{dataset} ({split_by}), {refer.refs_path}\n{tables(found[-1])}\n")
    splits = [one for several in found for one in several]
    shared = shared_images(splits)
    print(sharing(splits, shared))
    if args.json:
        named = {name: one and fingerprint(one) for name, one in tokenizers.items()}
        write_text(args.json, json.dumps(report(splits, shared, named), indent=1, ensure_ascii=False) + "\n")
        print(args.json)
    try:
        figure = draw(found)
    except UserError as error:
        LOGGER.warning(f"no picture: {error}")
    else:
        with atomic_write(out) as aside:
            figure.savefig(aside, format="png", dpi=DPI)
        print(out)
    undrawable = list(dict.fromkeys(reason for one in splits for reason in one.undrawable))
    if undrawable:
        raise UserError(f"{len(undrawable)} objects can't be drawn and are left out, the first: {undrawable[0]}")


def _file_name(sets: list[tuple[str, str]]) -> str:
    names = dict.fromkeys(dataset for dataset, _ in sets)
    return "_".join(names if len(sets) > 1 else sets[0]) + ".png"


if __name__ == "__main__":
    run_command(main)

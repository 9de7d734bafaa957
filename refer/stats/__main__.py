"""Print and draw what the splits of a dataset contain, and which images they share.

    python -m refer.stats --dataset refcoco                          # every installed split system
    python -m refer.stats --dataset refcocog --splitBy umd --out stats.png --json stats.json
    python -m refer.stats --dataset refcoco,refcoco+,refcocog        # also finds images that datasets share

The output contains counts, sentence lengths, object sizes, holes in masks and leaks between splits. Image files are not
needed.
"""

import functools
import json
import sys
from pathlib import Path
from typing import Any

from lib.cli import Parser, run_command
from lib.errors import MissingFileError, UserError
from lib.files import Kind, check_writable, protect, write_text
from lib.variants import BERT, MAX_TOKENS
from refer.datasets import ROOT, select_datasets

FIGURE_FOLDER = Path("models", "stats")


def get_parser() -> Parser:
    parser = Parser(prog="python -m refer.stats", description=__doc__)
    add = parser.add_argument
    add("--dataset", default="refcoco", metavar="NAMES", help="datasets, separated by commas (%(default)s)")
    add("--splitBy", default="", metavar="NAMES", help="split systems, separated by commas (default: all installed)")
    parser.add_input("--refer_data_root", default=str(ROOT), metavar="DIR", help="folder of the datasets (%(default)s)")
    add("--max_tokens", type=int, default=MAX_TOKENS, help="length at which sentences are cut (%(default)s)")
    parser.add_input(
        "--bert_tokenizer",
        default="",
        metavar="BERT",
        help="a vocab.txt, a folder or a Hub name (default: bert-base-uncased; refshapes: its own)",
    )
    out_help = f"output file of the figure (default: {FIGURE_FOLDER}/<datasets>.png)"
    parser.add_output("--out", kind=Kind.PNG, metavar="PNG", help=out_help)
    parser.add_output("--json", kind=Kind.JSON_OBJECT, metavar="FILE", help="also write all numbers as JSON")
    return parser


def main() -> None:
    args = get_parser().parse_args(sys.argv[1:])
    if args.max_tokens <= 0:
        raise UserError(f"--max_tokens {args.max_tokens}: must be above 0.")
    pairs = select_datasets(args.refer_data_root, args.dataset, args.splitBy)

    from bert.tokenization import fingerprint
    from lib.charts import save_png
    from refer.refer import REFER
    from refer.stats.figure import DPI, draw_statistics
    from refer.stats.statistics import shared_images, statistics_of
    from refer.stats.tables import json_report, sharing_table, split_table
    from utils import LOGGER, set_up_logging

    set_up_logging()
    names = list(dict.fromkeys(dataset for dataset, _ in pairs))
    out = Path(args.out or FIGURE_FOLDER / ("_".join(names if len(pairs) > 1 else pairs[0]) + ".png"))
    protect(*(Path(args.refer_data_root, name) for name in names))
    check_writable(out, Kind.PNG)
    if args.json:
        check_writable(args.json, Kind.JSON_OBJECT)

    tokenizers = load_tokenizers(names, args.refer_data_root, args.bert_tokenizer)
    datasets, known_objects = [], {name: {} for name in names}
    for name, split_by in pairs:
        refer, tokenizer = REFER(args.refer_data_root, name, split_by), tokenizers[name]
        count_tokens = None if tokenizer is None else functools.partial(token_counts, tokenizer)
        splits = statistics_of(refer, count_tokens, max_tokens=args.max_tokens, known_objects=known_objects[name])
        datasets.append(splits)
        print(f"{splits[0].title}, {refer.refs_path}\n{split_table(splits)}\n")
    splits = [split for dataset in datasets for split in dataset]
    shared = shared_images(splits)
    print(sharing_table(splits, shared))
    if args.json:
        report = json_report(
            splits, shared, {name: tokenizer and fingerprint(tokenizer) for name, tokenizer in tokenizers.items()}
        )
        write_text(args.json, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
        print(args.json)
    try:
        figure = draw_statistics(datasets)
    except UserError as error:
        LOGGER.warning(f"No figure: {error}")
    else:
        save_png(figure, out, dpi=DPI)
        print(out)
    errors = list(dict.fromkeys(error for split in splits for error in split.errors.values()))
    if errors:
        raise UserError(f"{len(errors)} objects have invalid masks and were left out. The first: {errors[0]}")


def load_tokenizers(names: list[str], data_root: str, bert_tokenizer: str) -> dict[str, Any]:
    """Return the tokenizer of each dataset: that of --bert_tokenizer, by default refshapes' own or BERT's.

    A default whose vocabulary is not installed is None, with a warning. MissingFileError: --bert_tokenizer is missing.
    """
    from bert.tokenization import load_tokenizer
    from utils import LOGGER

    refshapes = str(Path(data_root, "refshapes", "vocab.txt"))
    vocabularies = {name: bert_tokenizer or (refshapes if name == "refshapes" else BERT) for name in names}
    loaded = {}
    for vocabulary in dict.fromkeys(vocabularies.values()):
        try:
            loaded[vocabulary] = load_tokenizer(vocabulary)
        except MissingFileError as error:
            if bert_tokenizer:
                raise
            LOGGER.warning(f"Sentence lengths are counted in words only: {error}")
            loaded[vocabulary] = None
    return {name: loaded[vocabulary] for name, vocabulary in vocabularies.items()}


def token_counts(tokenizer: Any, sentences: list[str]) -> list[int]:
    """Return the number of tokens of each sentence, with [CLS] and [SEP]."""
    from bert.tokenization import encode

    return [len(ids) for ids in encode(tokenizer, sentences)]


if __name__ == "__main__":
    run_command(main)

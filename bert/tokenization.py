"""Tokenize sentences with BERT's uncased WordPiece tokenizer, as published."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from transformers import BertTokenizer

from bert.files import find_beside, resolve_bert_file
from lib.errors import UserError
from lib.files import protect
from lib.variants import BERT, BERT_VOCAB_SIZE

SENTENCES_PER_CALL = 8192  # limits the memory of the tokenizer's results
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# Settings of the tokenizer and their values for bert-base-uncased.
SETTINGS = {"do_lower_case": True, "strip_accents": None, "tokenize_chinese_chars": True}
REFSHAPES_FINGERPRINT = "180 tokens, sha256 b9f8db069c258310"


def load_tokenizer(name: str) -> BertTokenizer:
    """Load the tokenizer of a vocabulary, with the settings of the tokenizer_config.json beside it if there is one.

    Args:
        name: a vocab.txt, a folder that contains one, or a name on the Hugging Face Hub (:func:`resolve_bert_file`).

    Raises:
        MissingFileError: the file does not exist.
        UserError: the file is not a BERT vocabulary.
    """
    path = resolve_bert_file(name, ("vocab.txt",), flag="--bert_tokenizer")
    settings = find_beside(path, name, "tokenizer_config.json")
    return read_vocabulary(path, _read_settings(settings) if settings else SETTINGS)


def _read_settings(path: Path) -> dict[str, bool | None]:
    """Return those entries of a tokenizer_config.json that change how sentences are divided into tokens."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        settings = {name: config.get(name, default) for name, default in SETTINGS.items()}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is corrupt: {' '.join(str(error).split())}.") from error
    protect(path)
    return settings


def read_vocabulary(path: str | Path, settings: dict[str, bool | None] = SETTINGS) -> BertTokenizer:
    """Read a vocab.txt: one token per line, whose line number is its id. [PAD] must be first, as padding ids are 0.

    Raises:
        UserError: the file is not a BERT vocabulary.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a BERT vocabulary: it is not a UTF-8 text file.") from error
    protect(path)
    return _build_tokenizer(text.rstrip("\n"), settings, path)


def save_form(tokenizer: BertTokenizer) -> dict[str, Any]:
    """Return what checkpoints contain of a tokenizer: its tokens, one per line, and its settings."""
    return {"tokens": "\n".join(_tokens(tokenizer)), **_settings(tokenizer)}


def restore_tokenizer(saved: Any, path: str | Path, trained_with: str | None) -> BertTokenizer:
    """Return the tokenizer that a checkpoint contains.

    Args:
        saved: from :func:`save_form`.
        path: of the checkpoint, for error messages.
        trained_with: the :func:`fingerprint` in the checkpoint.

    Raises:
        UserError: the entry is corrupt.
    """
    if not isinstance(saved, dict) or not isinstance(saved.get("tokens"), str):
        raise UserError(f"{path} is corrupt: its entry tokenizer contains no tokens.")
    tokenizer = _build_tokenizer(saved["tokens"], {name: saved.get(name, SETTINGS[name]) for name in SETTINGS}, path)
    if fingerprint(tokenizer) != trained_with:
        raise UserError(f"{path} is corrupt: its tokenizer does not match its entry vocabulary.")
    return tokenizer


def _build_tokenizer(text: str, settings: dict[str, bool | None], path: str | Path) -> BertTokenizer:
    """Return the tokenizer with these tokens, one per line. UserError: they are not a BERT vocabulary."""
    for name, value in settings.items():
        if type(value) is not bool and (value is not None or SETTINGS[name] is not None):
            raise UserError(f"{path}: the tokenizer has {name} {value!r}, which must be true or false.")
    tokens = text.split("\n")
    missing = [token for token in SPECIAL_TOKENS if token not in tokens]
    if missing:
        raise UserError(f"{path} is not a BERT vocabulary: {', '.join(missing)} is missing.")
    if tokens[0] != "[PAD]":
        raise UserError(f"{path} is not a BERT vocabulary: the first token is not [PAD].")
    if len(set(tokens)) != len(tokens):
        duplicate = next(token for i, token in enumerate(tokens) if token in tokens[:i])
        raise UserError(f"{path} is not a BERT vocabulary: {duplicate!r} occurs twice.")
    return BertTokenizer(vocab={token: i for i, token in enumerate(tokens)}, **settings)


def build_vocabulary(sentences: Iterable[str], max_tokens: int = BERT_VOCAB_SIZE) -> list[str]:
    """Return a WordPiece vocabulary of sentences, for models that are trained from scratch.

    It contains the special tokens, the characters of the sentences, also as continuations (``##a``), and their words:
    the most frequent ones, if they do not fit. Words are lower-cased and split as :func:`read_vocabulary` does.

    Args:
        sentences: any number of sentences.
        max_tokens: largest number of entries.
    """
    tokenizer = BertTokenizer(vocab={token: i for i, token in enumerate(SPECIAL_TOKENS)}, do_lower_case=True)
    normalizer, splitter = tokenizer.backend_tokenizer.normalizer, tokenizer.backend_tokenizer.pre_tokenizer
    words: Counter[str] = Counter()
    for sentence, count in Counter(sentences).items():
        for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(sentence)):
            words[word] += count
    characters = sorted({character for word in words for character in word})
    pieces = [piece for character in characters for piece in (character, f"##{character}")]
    frequent = sorted(words, key=lambda word: (-words[word], word))
    return list(dict.fromkeys((*SPECIAL_TOKENS, *pieces, *frequent)))[:max_tokens]


def fingerprint(tokenizer: BertTokenizer) -> str:
    """Return a string that identifies vocabulary and settings. Checkpoints contain it: embeddings depend on the ids."""
    tokens = _tokens(tokenizer)
    sha256 = hashlib.sha256("\n".join(tokens).encode()).hexdigest()
    unusual = [f"{name} {value}" for name, value in _settings(tokenizer).items() if value != SETTINGS[name]]
    return ", ".join([f"{len(tokens)} tokens", f"sha256 {sha256[:16]}", *unusual])


def _tokens(tokenizer: BertTokenizer) -> list[str]:
    """Return the tokens in the order of their ids."""
    vocabulary = tokenizer.get_vocab()
    return sorted(vocabulary, key=vocabulary.__getitem__)


def _settings(tokenizer: BertTokenizer) -> dict[str, bool | None]:
    return {name: getattr(tokenizer, name) for name in SETTINGS}


def check_vocabulary(tokenizer: BertTokenizer, vocab_size: int, trained_with: str | None) -> None:
    """Check that a tokenizer has the vocabulary of a model.

    Args:
        tokenizer: the tokenizer to check.
        vocab_size: number of the model's word embeddings.
        trained_with: :func:`fingerprint` of the vocabulary that the model was trained with; None: unknown.

    Raises:
        UserError: the tokenizer has another vocabulary, or more entries than the model.
    """
    if trained_with is not None and trained_with != fingerprint(tokenizer):
        size = int(trained_with.split()[0])
        description, remedy = f"{size} entries", "the vocab.txt of the training"
        if trained_with == REFSHAPES_FINGERPRINT:
            description, remedy = f"{size} entries, RefShapes", "refer/data/refshapes/vocab.txt"
        elif size == BERT_VOCAB_SIZE:
            remedy = BERT
        raise UserError(
            f"This checkpoint was trained with another vocabulary ({description}). Pass --bert_tokenizer {remedy}."
        )
    if len(tokenizer) > vocab_size:
        raise UserError(
            f"The vocabulary of --bert_tokenizer has {len(tokenizer)} entries, the model only {vocab_size} word "
            "embeddings (MODEL.VOCAB_SIZE). Pass the vocabulary that fits the model."
        )


def encode(tokenizer: BertTokenizer, sentences: list[str]) -> Iterator[list[int]]:
    """Yield all token ids of each sentence, [CLS] and [SEP] included."""
    for start in range(0, len(sentences), SENTENCES_PER_CALL):
        # Calling the tokenizer itself takes four times as long, because it converts every output to a list.
        for encoding in tokenizer.backend_tokenizer.encode_batch_fast(sentences[start : start + SENTENCES_PER_CALL]):
            yield encoding.ids


def tokenize(tokenizer: BertTokenizer, sentences: list[str], max_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokenize S sentences as published.

    [CLS] and [SEP] are added, the first ``max_tokens`` ids are kept (a long sentence loses its [SEP]), and shorter
    sentences are padded with 0.

    Returns:
        input_ids [S, max_tokens], int32, and attention_mask [S, max_tokens], uint8: 1 on tokens and 0 on padding.
    """
    row_of = {sentence: row for row, sentence in enumerate(dict.fromkeys(sentences))}  # many sentences are repeated
    input_ids = np.zeros((len(row_of), max_tokens), dtype=np.int32)
    lengths = np.zeros(len(row_of), dtype=np.int64)
    for row, ids in enumerate(encode(tokenizer, list(row_of))):
        kept = ids[:max_tokens]
        input_ids[row, : len(kept)], lengths[row] = kept, len(kept)
    attention_mask = (np.arange(max_tokens) < lengths[:, None]).astype(np.uint8)
    rows = [row_of[sentence] for sentence in sentences]
    return input_ids[rows], attention_mask[rows]

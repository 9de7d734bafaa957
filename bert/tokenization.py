"""Tokenize sentences with BERT's uncased WordPiece tokenizer, as published."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from transformers import BertTokenizer

from bert.files import resolve_bert_file
from lib.errors import UserError
from lib.files import protect
from lib.variants import BERT, BERT_VOCAB_SIZE

SENTENCES_PER_CALL = 8192  # limits the memory of the tokenizer's results
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
REFSHAPES_FINGERPRINT = "180 tokens, sha256 b9f8db069c258310"


def load_tokenizer(name: str) -> BertTokenizer:
    """Load the tokenizer of a vocabulary.

    Args:
        name: a vocab.txt, a folder that contains one, or a name on the Hugging Face Hub (:func:`resolve_bert_file`).

    Raises:
        MissingFileError: the file does not exist.
        UserError: the file is not a BERT vocabulary.
    """
    return read_vocabulary(resolve_bert_file(name, ("vocab.txt",), flag="--bert_tokenizer"))


def read_vocabulary(path: str | Path) -> BertTokenizer:
    """Read a vocab.txt: one token per line, whose line number is its id. [PAD] must be first, as padding ids are 0.

    Raises:
        UserError: the file is not a BERT vocabulary.
    """
    try:
        tokens = Path(path).read_text(encoding="utf-8").rstrip("\n").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a BERT vocabulary: it is not a UTF-8 text file.") from error
    protect(path)
    missing = [token for token in SPECIAL_TOKENS if token not in tokens]
    if missing:
        raise UserError(f"{path} is not a BERT vocabulary: {', '.join(missing)} is missing.")
    if tokens[0] != "[PAD]":
        raise UserError(f"{path} is not a BERT vocabulary: the first token is not [PAD].")
    if len(set(tokens)) != len(tokens):
        duplicate = next(token for i, token in enumerate(tokens) if token in tokens[:i])
        raise UserError(f"{path} is not a BERT vocabulary: {duplicate!r} occurs twice.")
    return BertTokenizer(vocab={token: i for i, token in enumerate(tokens)}, do_lower_case=True)


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
    """Return a string that identifies a vocabulary. Checkpoints contain it, since word embeddings depend on the ids."""
    vocabulary = tokenizer.get_vocab()
    text = "\n".join(sorted(vocabulary, key=vocabulary.__getitem__))
    return f"{len(vocabulary)} tokens, sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]}"


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

"""Sentences to token ids with BERT's WordPiece tokenizer (transformers'), exactly as published."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from transformers import BertTokenizer

from bert.files import find_bert_file
from lib.errors import UserError

AT_ONCE = 8192  # sentences: what the tokenizer says of each takes memory
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def load_tokenizer(name: str) -> BertTokenizer:
    """The uncased WordPiece tokenizer of a vocabulary.

    Args:
        name: a vocab.txt, a folder holding one, or a name on the Hugging Face hub (see :func:`find_bert_file`).

    Raises:
        MissingFileError: it is nowhere.
        UserError: the file is not a BERT vocabulary.
    """
    return read_vocabulary(find_bert_file(name, ("vocab.txt",), flag="--bert_tokenizer"))


def read_vocabulary(path: str | Path) -> BertTokenizer:
    """The tokenizer of a vocab.txt: a token per line, its number the id; [PAD] is first, as ids are padded with 0."""
    try:
        tokens = Path(path).read_text(encoding="utf-8").rstrip("\n").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a text file of tokens (UTF-8)") from error
    lacking = [token for token in SPECIAL_TOKENS if token not in tokens]
    if lacking or tokens[0] != "[PAD]":
        raise UserError(
            f"{path} is not a BERT vocabulary: " + (f"no {', '.join(lacking)}" if lacking else "[PAD] isn't first")
        )
    if len(set(tokens)) != len(tokens):
        twice = next(token for i, token in enumerate(tokens) if token in tokens[:i])
        raise UserError(f"{path} is not a BERT vocabulary: {twice!r} is in it twice")
    return BertTokenizer(vocab={token: i for i, token in enumerate(tokens)}, do_lower_case=True)


def fingerprint(tokenizer: BertTokenizer) -> str:
    """What tells one vocabulary from another; saved with a model, whose word embeddings are those of its vocabulary."""
    vocabulary = tokenizer.get_vocab()
    text = "\n".join(sorted(vocabulary, key=vocabulary.__getitem__))
    return f"{len(vocabulary)} tokens, sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def check_vocabulary(tokenizer: BertTokenizer, vocab_size: int, trained_with: str | None) -> None:
    """The tokenizer must be the one whose ids the model's word embedding knows.

    Args:
        tokenizer: to be used.
        vocab_size: rows of the word embedding.
        trained_with: :func:`fingerprint` of the tokenizer that the model was trained with, where that is known.

    Raises:
        UserError: it is another, or has too many tokens.
    """
    if len(tokenizer) > vocab_size:
        raise UserError(
            f"--bert_tokenizer has {len(tokenizer)} tokens, the model only {vocab_size} word embeddings "
            "(MODEL.VOCAB_SIZE)"
        )
    if trained_with not in (None, fingerprint(tokenizer)):
        raise UserError(
            f"--bert_tokenizer is another one ({fingerprint(tokenizer)}) than the model was trained with "
            f"({trained_with})"
        )


def encode(tokenizer: BertTokenizer, sentences: list[str]) -> Iterator[list[int]]:
    """The ids of each sentence, however many, with [CLS] and [SEP]."""
    for first in range(0, len(sentences), AT_ONCE):
        # What the tokenizer calls too, without its lists of lists, which take four times as long as the tokenizing.
        for encoding in tokenizer.backend_tokenizer.encode_batch_fast(sentences[first : first + AT_ONCE]):
            yield encoding.ids


def tokenize(tokenizer: BertTokenizer, sentences: list[str], max_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask of sentences, all at once.

    [CLS] and [SEP] are added, then the first ``max_tokens`` ids are kept — a long sentence loses its [SEP] —, then ids
    are padded with 0.

    Returns:
        input_ids [S, max_tokens] int32 and attention_mask [S, max_tokens] uint8.
    """
    row_of = {sentence: row for row, sentence in enumerate(dict.fromkeys(sentences))}  # many are said more than once
    input_ids = np.zeros((len(row_of), max_tokens), dtype=np.int32)
    lengths = np.zeros(len(row_of), dtype=np.int64)
    for row, ids in enumerate(encode(tokenizer, list(row_of))):
        kept = ids[:max_tokens]
        input_ids[row, : len(kept)], lengths[row] = kept, len(kept)
    attention_mask = (np.arange(max_tokens) < lengths[:, None]).astype(np.uint8)
    rows = [row_of[sentence] for sentence in sentences]
    return input_ids[rows], attention_mask[rows]

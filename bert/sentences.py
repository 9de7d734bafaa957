"""Check sentences that people type."""

import logging

from transformers import BertTokenizer

from lib.errors import UserError

LOG = logging.getLogger("crossvlt")
MAX_SHOWN = 60  # characters of a sentence in a message
MAX_WORDS = 5  # unknown words in a message


def check_sentence(tokenizer: BertTokenizer, sentence: str, max_tokens: int) -> None:
    """Warn if the model reads only a part of a sentence: it is too long, or has words outside the vocabulary.

    Args:
        tokenizer: of the model.
        sentence: of any length.
        max_tokens: number of token ids that the model reads, [CLS] and [SEP] included.

    Raises:
        UserError: the sentence is blank, or not valid Unicode.
        TypeError: it is not a string.
    """
    if not isinstance(sentence, str):
        raise TypeError(f"A sentence must be a string, not an object of class {type(sentence)}.")
    try:
        sentence.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"The sentence {_shortened(sentence)} is not valid Unicode: {error.reason}.") from error
    encoding = tokenizer.backend_tokenizer.encode(sentence)
    if all(encoding.special_tokens_mask):
        raise UserError(f"The sentence {_shortened(sentence)} contains no words. Describe the object to segment.")
    if len(encoding.ids) > max_tokens:
        kept = sentence[: encoding.offsets[max_tokens - 1][1]]
        LOG.warning(
            "The sentence %s has %d tokens. The model reads only the first %d, up to %r.",
            _shortened(sentence), len(encoding.ids), max_tokens, kept[-20:],
        )  # fmt: skip
    spans = zip(encoding.ids[:max_tokens], encoding.offsets, strict=False)
    unknown = list(dict.fromkeys(sentence[a:b] for id, (a, b) in spans if id == tokenizer.unk_token_id))
    if unknown:
        words = ", ".join(_shortened(word) for word in unknown[:MAX_WORDS]) + (", …" if unknown[MAX_WORDS:] else "")
        LOG.warning("The sentence %s contains words outside the model's vocabulary: %s", _shortened(sentence), words)


def _shortened(text: str) -> str:
    return repr(text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…")

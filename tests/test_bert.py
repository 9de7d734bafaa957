"""Tokenization as published, and the places where BERT's files are looked up."""

import threading

import numpy as np
import pytest

from bert import files, tokenization
from bert.files import resolve_bert_file
from bert.tokenization import (
    SPECIAL_TOKENS,
    build_vocabulary,
    check_vocabulary,
    fingerprint,
    load_tokenizer,
    read_vocabulary,
    tokenize,
)
from data.refshapes.language import vocabulary as refshapes_vocabulary
from lib.errors import MissingFileError, UserError

TOKENS = [*SPECIAL_TOKENS, "the", "dog", "cafe", "left", "##most", ",", "'", "s", "2", "##nd"]


@pytest.fixture
def vocabulary(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(TOKENS) + "\n", encoding="utf-8")
    return path


def test_token_ids_equal_a_manual_tokenization(vocabulary):
    tokenizer = read_vocabulary(vocabulary)
    sentences = ["The Dog's leftmost Café, 2nd", "", "zebra dog", "the " * 30]
    ids, mask = tokenize(tokenizer, sentences, 10)
    words = [[TOKENS[i] for i in row] for row in ids]
    assert words[0] == ["[CLS]", "the", "dog", "'", "s", "left", "##most", "cafe", ",", "2"]  # truncated: no [SEP]
    assert words[1] == ["[CLS]", "[SEP]"] + ["[PAD]"] * 8
    assert words[2] == ["[CLS]", "[UNK]", "dog", "[SEP]"] + ["[PAD]"] * 6
    assert words[3] == ["[CLS]"] + ["the"] * 9
    assert mask.sum(1).tolist() == [10, 2, 4, 10]
    assert np.array_equal(mask, np.arange(10) < mask.sum(1)[:, None])
    assert tokenize(tokenizer, [], 10)[0].shape == (0, 10)


def test_token_ids_equal_those_of_the_tokenizer(vocabulary, monkeypatch):
    tokenizer = read_vocabulary(vocabulary)
    monkeypatch.setattr(tokenization, "SENTENCES_PER_CALL", 3)
    # repeated, truncated and empty sentences, accents, control characters, CJK, names of special tokens
    sentences = ["the dog", "dog's", "the dog", "the " * 30, "", " ", "CAFÉ\u0000\t2nd", "左の dog", "[SEP] [MASK] the",
                 "the\u200bdog", "dog", "the dog"]  # fmt: skip
    ids, mask = tokenize(tokenizer, sentences, 8)
    for row, sentence in enumerate(sentences):
        expected = tokenizer(sentence)["input_ids"][:8]
        assert ids[row].tolist() == expected + [0] * (8 - len(expected))
        assert mask[row].tolist() == [1] * len(expected) + [0] * (8 - len(expected))


def test_a_vocabulary_is_found_by_file_and_folder(vocabulary):
    for name in (vocabulary, vocabulary.parent):
        assert len(load_tokenizer(str(name))) == len(TOKENS)


def test_another_vocabulary_is_rejected(vocabulary, tmp_path):
    tokenizer = read_vocabulary(vocabulary)
    check_vocabulary(tokenizer, len(TOKENS), fingerprint(tokenizer))
    check_vocabulary(tokenizer, len(TOKENS) + 5, None)  # released files have no fingerprint
    (tmp_path / "other.txt").write_text("\n".join(TOKENS[:-2] + TOKENS[:-3:-1]))
    with pytest.raises(
        UserError, match=r"trained with another vocabulary \(15 entries\)\. Pass --bert_tokenizer the vocab"
    ):
        check_vocabulary(read_vocabulary(tmp_path / "other.txt"), len(TOKENS), fingerprint(tokenizer))
    with pytest.raises(UserError, match="has 15 entries, the model only 9 word embeddings"):
        check_vocabulary(tokenizer, 9, None)
    with pytest.raises(UserError, match=r"\(30522 entries\)\. Pass --bert_tokenizer bert-base-uncased\."):
        check_vocabulary(tokenizer, 30522, "30522 tokens, sha256 0123456789abcdef")


def test_the_vocabulary_of_refshapes_is_recognized(vocabulary, tmp_path):
    (tmp_path / "refshapes.txt").write_text("\n".join(refshapes_vocabulary()))
    refshapes = fingerprint(read_vocabulary(tmp_path / "refshapes.txt"))
    with pytest.raises(UserError) as caught:
        check_vocabulary(read_vocabulary(vocabulary), 180, refshapes)
    assert str(caught.value) == (
        "This checkpoint was trained with another vocabulary (180 entries, RefShapes). "
        "Pass --bert_tokenizer refer/data/refshapes/vocab.txt."
    )


def test_hub_names_are_looked_up_in_pretrained_first(vocabulary, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files, "HUB_TIMEOUT", 0.3)
    (tmp_path / "pretrained" / "my-bert").mkdir(parents=True)
    (tmp_path / "pretrained" / "bert-base-uncased").mkdir()
    in_folder = tmp_path / "pretrained" / "bert-base-uncased" / "vocab.txt"
    in_pretrained = tmp_path / "pretrained" / "vocab.txt"
    for path in (in_pretrained, in_folder):  # if both exist, the file in the model's folder is preferred
        path.write_text(vocabulary.read_text())
        found = resolve_bert_file("bert-base-uncased", ("vocab.txt",), flag="--bert_tokenizer")
        assert found.resolve() == path
    with pytest.raises(MissingFileError):  # ./pretrained itself is searched for bert-base-uncased only
        resolve_bert_file("my-bert", ("vocab.txt",), flag="--bert_tokenizer")
    (tmp_path / "pretrained" / "my-bert" / "vocab.txt").write_text(vocabulary.read_text())
    found = resolve_bert_file("my-bert", ("vocab.txt",), flag="--bert_tokenizer")
    assert found.parent.name == "my-bert"


@pytest.fixture
def hub_requests(monkeypatch):
    """The URLs that are requested from the hub."""
    requests = []
    monkeypatch.setattr(files, "get_hf_file_metadata", lambda url, timeout: requests.append(url))
    return requests


def test_the_local_cache_is_preferred_to_the_hub(vocabulary, tmp_path, monkeypatch, hub_requests):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files, "try_to_load_from_cache", lambda name, filename: str(vocabulary))
    assert resolve_bert_file("my-bert", ("vocab.txt",), flag="--bert_tokenizer") == vocabulary
    assert hub_requests == []


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/vocab.txt", "vocab.txt", "a/b/c", "no such"])
def test_wrong_paths_are_not_looked_up_on_the_hub(name, hub_requests):
    with pytest.raises(MissingFileError, match="no such file or folder"):
        resolve_bert_file(name, ("vocab.txt",), flag="--bert_tokenizer")
    assert hub_requests == []


def test_a_hub_that_does_not_answer_is_reported(tmp_path, monkeypatch):
    answer = threading.Event()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files, "HUB_TIMEOUT", 0.3)
    monkeypatch.setattr(files, "get_hf_file_metadata", lambda *args, **kwargs: answer.wait(60) or answer.set())
    with pytest.raises(
        MissingFileError, match=r"--ck_bert my-bert: .*Download a\.bin or b\.bin .*into pretrained/my-bert/"
    ):
        resolve_bert_file("my-bert", ("a.bin", "b.bin"), flag="--ck_bert")
    assert not answer.is_set()  # the request was not waited for
    answer.set()
    assert not list(tmp_path.iterdir())


def test_the_first_file_that_the_hub_has_is_downloaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def metadata(url, timeout):
        if "b.bin" not in url:
            raise OSError("404")

    monkeypatch.setattr(files, "get_hf_file_metadata", metadata)
    monkeypatch.setattr(files, "hf_hub_download", lambda name, filename: tmp_path / name / filename)
    found = resolve_bert_file("org/my-bert", ("a.bin", "b.bin"), flag="--ck_bert")
    assert found == tmp_path / "org/my-bert/b.bin"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"the\ndog\n", r"vocab\.txt is not a BERT vocabulary: \[PAD\], \[UNK\], .*\[MASK\] is missing"),
        ("\n".join(TOKENS[::-1]).encode(), r"the first token is not \[PAD\]"),
        ("\n".join([*TOKENS, "dog"]).encode(), "'dog' occurs twice"),
        (b"\xff\xfe\x00", "not a UTF-8 text file"),
    ],
)
def test_other_files_are_not_accepted_as_vocabulary(tmp_path, content, message):
    (tmp_path / "vocab.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_tokenizer(str(tmp_path))


def test_a_folder_without_a_vocabulary_is_reported(tmp_path):
    with pytest.raises(MissingFileError, match=r"the folder contains no vocab\.txt"):
        load_tokenizer(str(tmp_path))


def test_a_vocabulary_is_built_from_sentences(tmp_path):
    sentences = ["The dog", "the CAFÉ's golden dog, left", "", "左边的狗 🐶\t\0", "[SEP] a-b"]
    tokens = build_vocabulary(sentences)
    assert tokens[: len(SPECIAL_TOKENS)] == list(SPECIAL_TOKENS)
    assert {"the", "cafe", "狗", "🐶", "c", "##c"} < set(tokens)
    assert len(set(tokens)) == len(tokens)
    (tmp_path / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    tokenizer = read_vocabulary(tmp_path / "vocab.txt")
    ids, _ = tokenize(tokenizer, [*sentences, "gold"], 20)  # an unknown word of known letters is spelled
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.convert_ids_to_tokens(ids[-1][1:5].tolist()) == ["g", "##o", "##l", "##d"]
    characters = len(build_vocabulary(["a b c"]))
    assert build_vocabulary(["a b c", *["abc"] * 2, *["cab"] * 3], characters + 1)[-1] == "cab"
    assert len(build_vocabulary(sentences, 7)) == 7
    assert build_vocabulary([]) == list(SPECIAL_TOKENS)

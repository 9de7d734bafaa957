"""Tokenization as published, and where BERT's files are found."""

import threading

import numpy as np
import pytest

from bert import files, tokenization
from bert.tokenization import check_vocabulary, fingerprint, load_tokenizer, read_vocabulary, tokenize
from lib.errors import MissingFileError, UserError

TOKENS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "the",
    "dog",
    "cafe",
    "left",
    "##most",
    ",",
    "'",
    "s",
    "2",
    "##nd",
]


@pytest.fixture
def vocabulary(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(TOKENS) + "\n", encoding="utf-8")
    return path


def test_ids_by_hand(vocabulary):
    tokenizer = read_vocabulary(vocabulary)
    sentences = ["The Dog's leftmost Café, 2nd", "", "zebra dog", "the " * 30]
    ids, mask = tokenize(tokenizer, sentences, 10)
    words = [[TOKENS[i] for i in row] for row in ids]
    assert words[0] == ["[CLS]", "the", "dog", "'", "s", "left", "##most", "cafe", ",", "2"]  # cut: no [SEP]
    assert words[1] == ["[CLS]", "[SEP]"] + ["[PAD]"] * 8
    assert words[2] == ["[CLS]", "[UNK]", "dog", "[SEP]"] + ["[PAD]"] * 6
    assert words[3] == ["[CLS]"] + ["the"] * 9
    assert mask.sum(1).tolist() == [10, 2, 4, 10]
    assert np.array_equal(mask, np.arange(10) < mask.sum(1)[:, None])
    assert tokenize(tokenizer, [], 10)[0].shape == (0, 10)


def test_ids_are_those_of_the_tokenizer_called_on_each_sentence(vocabulary, monkeypatch):
    tokenizer = read_vocabulary(vocabulary)
    monkeypatch.setattr(tokenization, "AT_ONCE", 3)
    # said twice, cut, of nothing, of accents, control characters, CJK, the names of special tokens
    sentences = ["the dog", "dog's", "the dog", "the " * 30, "", " ", "CAFÉ\u0000\t2nd", "左の dog", "[SEP] [MASK] the",
                 "the\u200bdog", "dog", "the dog"]  # fmt: skip
    ids, mask = tokenize(tokenizer, sentences, 8)
    for row, sentence in enumerate(sentences):
        wanted = tokenizer(sentence)["input_ids"][:8]
        assert ids[row].tolist() == wanted + [0] * (8 - len(wanted))
        assert mask[row].tolist() == [1] * len(wanted) + [0] * (8 - len(wanted))


def test_vocabulary_is_found_by_file_and_folder(vocabulary):
    for name in (vocabulary, vocabulary.parent):
        assert len(load_tokenizer(str(name))) == len(TOKENS)


def test_another_vocabulary_is_noticed(vocabulary, tmp_path):
    tokenizer = read_vocabulary(vocabulary)
    check_vocabulary(tokenizer, len(TOKENS), fingerprint(tokenizer))
    check_vocabulary(tokenizer, len(TOKENS) + 5, None)  # a released file doesn't say
    (tmp_path / "other.txt").write_text("\n".join(TOKENS[:-2] + TOKENS[:-3:-1]))
    with pytest.raises(UserError, match=r"another one .* than the model was trained with"):
        check_vocabulary(read_vocabulary(tmp_path / "other.txt"), len(TOKENS), fingerprint(tokenizer))
    with pytest.raises(UserError, match=f"has {len(TOKENS)} tokens, the model only 9"):
        check_vocabulary(tokenizer, 9, None)


def test_hub_names_look_in_pretrained_first(vocabulary, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pretrained" / "my-bert").mkdir(parents=True)
    (tmp_path / "pretrained" / "bert-base-uncased").mkdir()
    inside = tmp_path / "pretrained" / "bert-base-uncased" / "vocab.txt"
    beside = tmp_path / "pretrained" / "vocab.txt"
    for place in (beside, inside):  # the folder of that name goes before
        place.write_text(vocabulary.read_text())
        found = files.find_bert_file("bert-base-uncased", ("vocab.txt",), flag="--bert_tokenizer")
        assert found.resolve() == place
    with pytest.raises(MissingFileError):  # another BERT is not what lies in ./pretrained itself
        files.find_bert_file("my-bert", ("vocab.txt",), flag="--bert_tokenizer")
    (tmp_path / "pretrained" / "my-bert" / "vocab.txt").write_text(vocabulary.read_text())
    found = files.find_bert_file("my-bert", ("vocab.txt",), flag="--bert_tokenizer")
    assert found.parent.name == "my-bert"


def test_local_cache_comes_before_the_hub(vocabulary, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files, "try_to_load_from_cache", lambda name, filename: str(vocabulary))
    monkeypatch.setattr(files, "_fetch", lambda *a: pytest.fail("asked the hub"))
    assert files.find_bert_file("my-bert", ("vocab.txt",), flag="--bert_tokenizer") == vocabulary


def test_a_silent_hub_is_given_up(tmp_path, monkeypatch):
    answer = threading.Event()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files, "HUB_TIMEOUT", 0.3)
    monkeypatch.setattr(files, "get_hf_file_metadata", lambda *a, **k: answer.wait(60) or answer.set())
    with pytest.raises(MissingFileError, match=r"--ck_bert my-bert: .*put a\.bin or b\.bin .*into pretrained/my-bert/"):
        files.find_bert_file("my-bert", ("a.bin", "b.bin"), flag="--ck_bert")
    assert not answer.is_set()  # it is not waited for
    answer.set()
    assert not list(tmp_path.iterdir())


def test_the_hub_is_asked_for_what_it_has(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def metadata(url, timeout):
        if "b.bin" not in url:
            raise OSError("404")

    monkeypatch.setattr(files, "get_hf_file_metadata", metadata)
    monkeypatch.setattr(files, "hf_hub_download", lambda name, filename: tmp_path / name / filename)
    found = files.find_bert_file("org/my-bert", ("a.bin", "b.bin"), flag="--ck_bert")
    assert found == tmp_path / "org/my-bert/b.bin"


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/vocab.txt", "vocab.txt", "a/b/c", "no such"])
def test_wrong_paths_are_not_taken_for_hub_names(name, monkeypatch):
    monkeypatch.setattr(files, "_fetch", lambda *a: pytest.fail("asked the hub"))
    with pytest.raises(MissingFileError, match="no such file or folder"):
        files.find_bert_file(name, ("vocab.txt",), flag="--bert_tokenizer")


def test_what_is_no_vocabulary(tmp_path):
    (tmp_path / "vocab.txt").write_text("the\ndog\n")
    with pytest.raises(UserError, match=r"vocab\.txt is not a BERT vocabulary: no \[PAD\]"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "vocab.txt").write_text("\n".join(TOKENS[::-1]))
    with pytest.raises(UserError, match=r"\[PAD\] isn't first"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "vocab.txt").write_text("\n".join([*TOKENS, "dog"]))
    with pytest.raises(UserError, match="'dog' is in it twice"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "vocab.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not a text file"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "vocab.txt").unlink()
    with pytest.raises(MissingFileError, match=r"holds no vocab\.txt"):
        load_tokenizer(str(tmp_path))

"""Checkpoints contain vocabulary and preprocessing, so that nothing else is needed to use them."""

import pytest
import torch
from commands import run_in_process

import lib.checkpoint
from bert.tokenization import fingerprint, read_vocabulary, restore_tokenizer, save_form
from data.transforms import IMAGENET_MEAN, IMAGENET_STD
from lib.report.results import read_results


@pytest.fixture
def moved(trained, tmp_path):
    """Return a function that writes best.pth or last.pth as on another machine, with changed entries.

    The vocabulary file and the dataset of the training do not exist there.
    """

    def write(name="best.pth", without=(), **changes):
        content = torch.load(trained[0] / "checkpoints" / "run" / name, weights_only=True)
        content["config"] |= {"PRETRAINED.TOKENIZER": "elsewhere/vocab.txt", "DATA.ROOT": "elsewhere"}
        content = {key: value for key, value in (content | changes).items() if key not in without}
        torch.save(content, tmp_path / "moved.pth")
        return tmp_path / "moved.pth"

    return write


@pytest.fixture
def evaluate(run_here, refshapes_root, tmp_path, monkeypatch):
    """Return a function that evaluates a checkpoint and returns the finished command and the results."""
    monkeypatch.chdir(tmp_path)  # without the files of the checkout

    def run(path, *flags):
        (tmp_path / "out.jsonl").unlink(missing_ok=True)
        command = ["test.py", "--resume", path, "--dataset", "refshapes", "--refer_data_root", refshapes_root]
        command += ["--threshold", 0.15, "-j", 0, "--device", "cpu", "--predictions", "out.jsonl", *flags]
        done = run_here(*command)
        return done, read_results("out.jsonl")[1] if done.status == 0 else []

    return run


def test_a_checkpoint_is_used_on_another_machine(moved, evaluate, refshapes_root):
    flags = ["--bert_tokenizer", refshapes_root / "refshapes" / "vocab.txt"]
    _, expected = evaluate(moved(), *flags)
    assert len({line["intersection"] for line in expected}) > 3
    _, found = evaluate(moved())
    assert found == expected
    older = moved(without=("tokenizer", "preprocessing"))
    assert evaluate(older, *flags)[1] == expected


def test_a_run_is_resumed_on_another_machine(moved, trained, run_here, refshapes_root, tmp_path):
    """The weights are the same with the vocabulary in the file and with the file of the training."""
    flags = ["-b", 8, "--steps", 29, "--refer_data_root", refshapes_root]
    flags += ["--output-dir", tmp_path / "checkpoints", "--log_dir", tmp_path / "models"]

    def resume(path, name, *more):
        run_here("train.py", "--resume", path, "--model_id", name, *flags, *more, check=True)
        return torch.load(tmp_path / "checkpoints" / name / "last.pth", weights_only=True)["model"]

    found = resume(moved("last.pth"), "new")
    older = moved("last.pth", without=("tokenizer", "preprocessing"))
    expected = resume(older, "old", "--bert_tokenizer", refshapes_root / "refshapes/vocab.txt")
    assert all(torch.equal(value, expected[key]) for key, value in found.items())


def test_a_new_run_takes_the_vocabulary_of_its_initial_weights(moved, small_config, run_here, tmp_path):
    flags = ["--cfg", small_config, "--no-from_scratch", "--init_from", moved(), "--steps", 1, "--model_id", "next"]
    flags += ["--output-dir", tmp_path / "checkpoints", "--log_dir", tmp_path / "models"]
    run_here("train.py", *flags, check=True)
    first, second = (torch.load(path, weights_only=True) for path in (moved(), tmp_path / "checkpoints/next/last.pth"))
    assert first["tokenizer"] == second["tokenizer"]
    assert first["vocabulary"] == second["vocabulary"]


def test_what_a_checkpoint_contains(moved, refshapes_root, monkeypatch, capsys):
    content = torch.load(moved(), weights_only=True)
    tokens = (refshapes_root / "refshapes" / "vocab.txt").read_text().rstrip("\n")
    settings = {"do_lower_case": True, "strip_accents": None, "tokenize_chinese_chars": True}
    assert content["tokenizer"] == {"tokens": tokens, **settings}
    assert content["preprocessing"] == {
        "img_size": 64, "max_tokens": 21, "resize": "bilinear", "mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)
    }  # fmt: skip
    described = run_in_process(lib.checkpoint.main, ["lib.checkpoint", moved()], monkeypatch, capsys).out
    assert "64×64 pixels, at most 21 tokens; vocabulary in the file: 180 tokens" in described


def test_a_restored_tokenizer_is_the_same(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "Café", "cafe", "##s", "狗", "\u2028"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    for settings in ({}, {"do_lower_case": False, "strip_accents": False, "tokenize_chinese_chars": False}):
        original = (
            read_vocabulary(tmp_path / "vocab.txt", settings) if settings else read_vocabulary(tmp_path / "vocab.txt")
        )
        restored = restore_tokenizer(save_form(original), "x.pth", fingerprint(original))
        for sentence in ("Cafés 狗狗", "CAFÉ cafe", "a\u2028b"):
            assert restored(sentence).input_ids == original(sentence).input_ids
        assert save_form(restored) == save_form(original)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": "x"}, "is corrupt: its entry tokenizer contains no tokens."),
        ({"tokenizer": {"tokens": "a\nb"}}, "is not a BERT vocabulary: [PAD]"),
        ({"vocabulary": "180 tokens, sha256 0000000000000000"}, "its tokenizer does not match its entry vocabulary."),
        ({"preprocessing": {"img_size": 64}}, "is corrupt: its entry preprocessing is incomplete."),
        (
            {"preprocessing": {"img_size": 64, "max_tokens": 21, "resize": "bicubic"}},
            "was trained with another preprocessing: resize 'bicubic' instead of 'bilinear'.",
        ),
    ],
)
def test_corrupt_entries_are_reported(moved, evaluate, changes, message):
    done, _ = evaluate(moved(**changes))
    assert done.status == 2
    assert message in done.err

"""python -m data.convert: its output, its mistakes, and training and evaluation on its result."""

import json
import shlex
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from own_data import rows_by_id, rows_by_mask, run_main, table, write
from PIL import Image

from refer.refer import REFER

FLAGS = ["--name", "mine", "--sentences", "sentences.csv", "--images", "photos", "--refer_data_root", "data",
         "--val-share", "0.2", "--test-share", "0.2"]  # fmt: skip


def test_the_output_of_the_command(source, monkeypatch, capsys):
    write(source / "sentences.csv", table(rows_by_id()))
    flags = [*FLAGS, "--instances", "coco.json", "--splitBy", "own", "--samples", 3]
    status, out, err = run_main(monkeypatch, capsys, *flags)
    assert (status, err.count("warning")) == (0, 0)
    counts = {line.split()[0]: line.split()[1:] for line in out.splitlines()[:4]}
    assert counts.pop("split") == ["refs", "expressions", "images"]
    assert np.sum([list(map(int, numbers)) for numbers in counts.values()], axis=0).tolist() == [20, 30, 10]
    assert "Contact sheet: data/mine/samples.png." in out
    with Image.open("data/mine/samples.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB")).reshape(-1, 3)
    assert len(np.unique(pixels, axis=0)) > 1000
    in_target_color = (np.abs(pixels.astype(int) - (0, 158, 115)).max(axis=1) < 25).sum()
    assert in_target_color > 2000, "masks; the titles alone have 675 pixels of this color"
    dataset = "--dataset mine --splitBy own --refer_data_root data"
    assert [line.strip() for line in out.splitlines() if line.startswith("    python")] == [
        f"python -m refer.stats {dataset}",
        f"python train.py {dataset} --model_id mine",
        f"python test.py {dataset} --split all --resume ./checkpoints/mine/best.pth",
        f"python train.py --cfg configs/try.yaml --bert_tokenizer data/mine/vocab.txt {dataset} --model_id mine_try",
        f"python test.py {dataset} --split all --resume ./checkpoints/mine_try/best.pth",
    ]


def test_the_contact_sheet_can_be_elsewhere_or_left_out(source, monkeypatch, capsys):
    write(source / "sentences.csv", table(rows_by_mask()))
    flags = [*FLAGS, "--masks", "masks", "--force"]
    status, out, _ = run_main(monkeypatch, capsys, *flags, "--contact-sheet", "sheets/own.png", "--samples", "2")
    assert status == 0
    assert "sheets/own.png" in out
    assert not (source / "data/mine/samples.png").exists()
    with Image.open("sheets/own.png") as sheet:
        assert sheet.size[0] > 300
    status, out, _ = run_main(monkeypatch, capsys, *flags, "--samples", "0")
    assert status == 0
    assert "Contact sheet" not in out


FILES = ["--name", "x", "--sentences", "s.csv", "--images", "photos"]
MISTAKES = [
    (["--nane", "x"], "Unknown flag --nane. Did you mean --name?"),
    (["--name", "x"], "--sentences is missing. See --help."),
    (["--val-share", "x"], "argument --val-share: invalid float value: 'x'"),
    ([*FILES, "--samples", "-1"], "--samples -1: must be from 0 to 60."),
    (
        [*FILES, "--val-share", "0.6", "--test-share", "0.4"],
        "--val-share 0.6 and --test-share 0.4: must be from 0 to 1",
    ),
    ([*FILES, "--val-share", "nan"], "--val-share nan and "),
    ([*FILES, "--masks", "masks", "--contact-sheet", "coco.json"], "Cannot write coco.json: the name must end in .png"),
    ([*FILES, "--masks", "masks", "--contact-sheet", "masks/1/0.png"], "Cannot write masks/1/0.png: it is one of the"),
    ([*FILES, "--contact-sheet", "refer/data/x/a.png"], "--contact-sheet refer/data/x/a.png: choose a file outside of"),
    ([*FILES, "--contact-sheet", "a.png", "--samples", "0"], "--contact-sheet cannot be combined with --samples 0."),
    (FILES, "Pass the objects with either --instances FILE or --masks DIR."),
    ([*FILES, "--masks", "masks", "--instances", "coco.json"], "Pass the objects with either --instances FILE or"),
    ([*FILES, "--masks", "nowhere"], "--masks nowhere: no such file or folder."),
    ([*FILES, "--masks", "masks", "--images", "nowhere"], "--images nowhere: no such file or folder."),
    ([*FILES, "--masks", "masks", "--sentences", "nowhere.csv"], "--sentences nowhere.csv: no such file"),
    (
        [*FILES, "--masks", "masks", "--sentences", "coco.json"],
        "--sentences coco.json: the name must end in .csv, .tsv",
    ),
    ([*FILES, "--instances", "nowhere.json"], "--instances nowhere.json: no such file"),
    ([*FILES, "--masks", "masks", "--name", "refcoco"], "--name refcoco: this is a published dataset."),
    ([*FILES, "--masks", "masks", "--name", "images"], "--name images: this folder is reserved for the COCO images."),
    ([*FILES, "--masks", "masks", "--name", "a/b"], "--name 'a/b': use letters"),
    ([*FILES, "--masks", "masks", "--name", ".hidden"], "--name '.hidden': use letters"),
    ([*FILES, "--masks", "masks", "--name", "a,b"], "--name 'a,b': use letters"),
    ([*FILES, "--masks", "masks", "--splitBy", "a/b"], "--splitBy 'a/b': use letters"),
]


@pytest.mark.parametrize(("flags", "message"), MISTAKES, ids=[" ".join(flags)[-50:] for flags, _ in MISTAKES])
def test_mistakes_are_reported_in_one_line(source, monkeypatch, capsys, flags, message):
    write(source / "s.csv", table(rows_by_id()))
    status, _, err = run_main(monkeypatch, capsys, *flags)
    assert status == 2
    assert err.startswith(f"error: {message}")
    assert len(err.splitlines()) == 1


def test_help_imports_neither_torch_nor_pillow():
    code = "import sys; from data.convert import __main__; __main__.get_parser(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "PIL"} & set(done.stdout.split())


def test_the_last_commands_train_and_evaluate_without_downloads(source, monkeypatch, capsys, run_here):
    """The words of the sentences are the vocabulary, so that nothing is needed besides the dataset."""
    rows = rows_by_mask()
    rows[-1]["sentence"] = "Das Äpfelchen, 左边的狗 🐶"
    write(source / "sentences.csv", table(rows))
    _, out, _ = run_main(monkeypatch, capsys, *FLAGS, "--masks", "masks", "--samples", "0")
    train, test = (shlex.split(line)[1:] for line in out.splitlines()[-2:])
    train[train.index("--cfg") + 1] = str(ROOT / "configs" / "try.yaml")
    run_here(*train, check=True)
    logged = [json.loads(line) for line in (source / "models/mine_try/metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in logged if line["kind"] == "train"]
    assert len(losses) == 6
    assert np.isfinite(losses).all()
    done = run_here(*test, check=True)
    refer = REFER("data", "mine", "unc")
    for split in ("val", "test"):
        count = sum(len(ref["sentences"]) for ref in refer.loadRefs(refer.getRefIds(split=split)))
        row = [line for line in done.out.splitlines() if line.split()[:1] == [split]][-1]
        assert row.split()[-1] == str(count)


def test_a_dataset_without_training_images_suggests_no_training(source, monkeypatch, capsys):
    write(source / "sentences.csv", table([row | {"split": "val"} for row in rows_by_mask()]))
    _, out, _ = run_main(monkeypatch, capsys, *FLAGS, "--masks", "masks", "--samples", "0")
    dataset = "--dataset mine --refer_data_root data"
    assert out.splitlines()[-3:] == [
        "Next:",
        f"    python -m refer.stats {dataset}",
        f"    python test.py {dataset} --split all --resume ./checkpoints/best_refcoco.pth",
    ]

"""test.py as a user runs it, end to end on a model trained for seconds."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import PROCESS_ENVIRONMENT, ROOT
from PIL import Image

import lib.evaluation
import lib.loading
from bert.tokenization import load_tokenizer, tokenize
from data.transforms import preprocess_image
from lib.checkpoint import read_checkpoint, rebuild
from lib.inference import PreparedModel
from lib.metrics import METRIC_NAMES, compute_metrics
from lib.report import figures
from lib.report.published import PUBLISHED
from lib.report.results import read_results
from refer.masks import decode_mask
from refer.refer import REFER
from utils import Distributed


@pytest.fixture
def data(refshapes_root):
    return ["--dataset", "refshapes", "--refer_data_root", str(refshapes_root), "-j", "0", "--device", "cpu"]


@pytest.fixture
def best(trained):
    return trained[0] / "checkpoints" / "run" / "best.pth"


def test_results_do_not_depend_on_the_number_of_processes(best, data, run_script, run_here, tmp_path):
    files = {}
    for processes in (1, 2, 3):
        out, report = tmp_path / f"{processes}.jsonl", tmp_path / f"{processes}.json"
        flags = ["test.py", *data, "--resume", best, "-b", 4, "--protocol", "paper,original", "--threshold", 0.15]
        flags += ["--predictions", out, "--json", report]
        single = processes == 1
        text = run_here(*flags, check=True).out if single else run_script(*flags, processes=processes).stdout
        files[processes] = out.read_bytes(), report.read_bytes(), text.replace(f"/{processes}.", "/out.")
    header, lines = read_results(out)
    number = header["splits"]["val"]
    assert number % 2
    assert number % 3
    assert len({(line["sent_id"], line["protocol"]) for line in lines}) == len(lines) == 2 * number
    assert len({(line["intersection"], line["union"]) for line in lines}) > number / 2  # the masks are not all alike
    assert files[1] == files[2] == files[3]


def test_all_outputs_of_an_evaluation(best, data, run_here, tmp_path):
    done = run_here(
        "test.py", *data, "--split", "all", "--resume", best, "--json", tmp_path / "out.json",
        "--predictions", tmp_path / "out.jsonl", "--vis", tmp_path / "vis", "--vis-num", 3, "--vis_maps",
        "--baselines", "--lr", "0.1", "--protocol", "paper,original", check=True,
    )  # fmt: skip
    assert "not used in evaluation: --lr" in done.err
    report = json.loads((tmp_path / "out.json").read_text())
    names = ["paper", "original"]
    assert [(row["split"], row["protocol"]) for row in report] == [
        (split, name) for split in ("val", "testA", "testB") for name in names
    ]
    header, predictions = read_results(tmp_path / "out.jsonl")
    assert header["complete"] is True
    assert [protocol["name"] for protocol in header["protocols"]] == names
    assert header["checkpoint_sha256"] == subprocess.check_output(["sha256sum", best], text=True).split()[0]
    for row in report:
        key = (row["split"], row["protocol"])
        lines = [line for line in predictions if (line["split"], line["protocol"]) == key]
        assert (row["dataset"], row["split_by"], row["num_expressions"]) == ("refshapes", "unc", len(lines))
        assert row["metrics"] == compute_metrics([(line["intersection"], line["union"]) for line in lines])
        assert set(row["metrics"]) == set(METRIC_NAMES) == set(row["interval_95"])
        assert row["settings"]["img_size"] == 64  # as trained, though the flag's default is 480
        assert row["settings"]["protocol"]["eval_size"] == ("resized" if row["protocol"] == "paper" else "original")
        assert 0 < row["baselines"]["all foreground"]["mIoU"] < row["baselines"]["best object"]["mIoU"] < 100
        assert f"{row['metrics']['oIoU']:.2f}" in done.out
        images = sorted((tmp_path / "vis").glob(f"{row['split']}_*.png"))
        assert len(images) == 4
        for image in images:
            assert np.asarray(Image.open(image)).std() > 10
    assert len(predictions) == sum(row["num_expressions"] for row in report)
    sizes = {tuple(line["mask"]["size"]) for line in predictions if line["protocol"] == "paper"}
    assert sizes == {(64, 64)}
    assert decode_mask(predictions[0]["mask"]).sum() >= predictions[0]["intersection"]
    images = REFER(data[3], "refshapes").Imgs
    assert all(line["file_name"] == images[line["image_id"]]["file_name"] for line in predictions)


def test_switches_become_part_of_the_protocol_name(best, data, run_here, tmp_path):
    run_here(
        "test.py", *data, "--resume", best, "--json", tmp_path / "out.json", "--shuffle_sentences",
        "--gt_mask", "union", "--threshold", "0.9", "--max_tokens", "5", check=True,
    )  # fmt: skip
    (row,) = json.loads((tmp_path / "out.json").read_text())
    assert row["protocol"] == "paper+gt_mask=union+threshold=0.9+max_tokens=5"
    assert row["settings"]["shuffle_sentences"] is True
    assert row["settings"]["protocol"] == {
        "name": row["protocol"], "gt_mask": "union", "eval_size": "resized", "threshold": 0.9, "max_tokens": 5,
        "text": "raw", "sentences": "all", "precision": ">=",
    }  # fmt: skip


@pytest.fixture
def interrupt_after(monkeypatch):
    """Return a function that makes the n-th computation of masks send Ctrl-C. It returns the list of calls."""

    def run(count):
        calls, logits_to_masks = [], lib.evaluation.logits_to_masks

        def interrupted(*args):
            calls.append(None)
            if len(calls) == count:
                os.kill(os.getpid(), signal.SIGINT)
            return logits_to_masks(*args)

        monkeypatch.setattr(lib.evaluation, "logits_to_masks", interrupted)
        return calls

    return run


def test_an_interrupted_evaluation_continues(best, data, run_here, tmp_path, interrupt_after):
    flags = ["test.py", *data, "--split", "val,testA", "--resume", best, "-b", 1]
    run_here(*flags, "--predictions", tmp_path / "whole.jsonl", check=True)
    interrupt_after(5)
    stopped = run_here(*flags, "--predictions", tmp_path / "a.jsonl")
    assert stopped.status == 75
    assert "Stopped while evaluating split val." in stopped.err
    assert "a.jsonl.partial holds the results so far. Run the same command again to continue." in stopped.err
    assert not (tmp_path / "a.jsonl").exists()
    header, lines = read_results(tmp_path / "a.jsonl.partial")
    assert header["complete"] is False
    assert 0 < len(lines) < header["splits"]["val"]
    done = run_here(*flags, "--predictions", tmp_path / "a.jsonl", check=True)
    count, total = len(lines), header["splits"]["val"]
    assert f"val: continuing, {count} of {total} expressions are evaluated, {total - count} remain" in done.err
    assert "testA: continuing" not in done.err
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not (tmp_path / "a.jsonl.partial").exists()


def test_an_interrupted_evaluation_without_a_file_keeps_nothing(best, data, run_here, interrupt_after):
    interrupt_after(2)
    stopped = run_here("test.py", *data, "--resume", best, "-b", 1)
    assert (stopped.status, stopped.err.splitlines()[-1]) == (130, "interrupted")


def test_a_second_evaluation_of_the_same_file_is_refused(best, data, run_here, tmp_path):
    flags = ["test.py", *data, "--split", "all", "--resume", best, "-b", 1, "--predictions"]
    run_here(*flags, tmp_path / "expected.jsonl", check=True)
    command = [sys.executable, *map(str, [*flags, tmp_path / "a.jsonl"])]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, env=PROCESS_ENVIRONMENT) as first:
        while not (tmp_path / "a.jsonl.partial").exists():
            assert first.poll() is None, first.stderr.read()
            time.sleep(0.01)
        first.send_signal(signal.SIGSTOP)
        second = run_here(*flags, tmp_path / "a.jsonl")
        first.send_signal(signal.SIGCONT)
        _, errors = first.communicate()
    assert first.returncode == 0, errors
    assert second.status == 2
    assert f"a.jsonl: another evaluation is writing it (process {first.pid} on " in second.err
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "expected.jsonl").read_bytes()
    assert sorted(path.name for path in tmp_path.glob("*a.jsonl*")) == ["a.jsonl", "a.jsonl.settings.json"]


def test_tf32_is_stated_in_every_output(best, data, run_here, tmp_path, monkeypatch):
    monkeypatch.setattr(lib.loading, "float32_precision", lambda device: "TF32")  # as on a GPU with --tf32
    flags = ["test.py", *data, "--resume", best, "--predictions", tmp_path / "a.jsonl", "--json", tmp_path / "a.json"]
    done = run_here(*flags, "--tf32", check=True)
    assert "best.pth, 64 px, TF32, paper protocol" in done.out
    assert "not used in evaluation" not in done.err
    assert json.loads((tmp_path / "a.json").read_text())[0]["settings"]["precision"] == "TF32"
    assert read_results(tmp_path / "a.jsonl")[0]["precision"] == "TF32"
    monkeypatch.undo()
    other = run_here(*flags)
    assert other.status == 2
    assert "a.jsonl was written with other settings (precision: TF32, now float32)" in other.err


@pytest.mark.parametrize("is_main", [True, False])
def test_maps_are_computed_only_on_the_process_that_draws(best, data, run_here, tmp_path, monkeypatch, is_main):
    calls, compute_maps = [], figures.compute_maps
    monkeypatch.setattr(Distributed, "is_main", is_main)
    monkeypatch.setattr(figures, "compute_maps", lambda *args: calls.append(None) or compute_maps(*args))
    for model in ("--resume", "--vis_compare"):
        flags = [model, best, "--vis", tmp_path / "vis", "--vis_maps", "--vis_num", 1]
        run_here("test.py", *data, *flags, check=True)
    assert len(calls) == (2 if is_main else 0)


def test_vis_compare_draws_models_side_by_side(best, trained, data, run_here, tmp_path):
    other = trained[0] / "checkpoints" / "run" / "last.pth"
    done = run_here(
        "test.py", *data, "--split", "val,testB", "--vis_compare", f"{best},{other}", "--vis", tmp_path, "--vis-num", 2,
        check=True,
    )  # fmt: skip
    assert done.out.split() == [str(tmp_path / "val_sheet.png"), str(tmp_path / "testB_sheet.png")]
    assert len(list(tmp_path.glob("val_*_ref*_sent*.png"))) == 2
    one_model = tmp_path / "one"
    run_here("test.py", *data, "--vis_compare", best, "--vis", one_model, "--vis-num", 2, check=True)
    two_sheet, one_sheet = (Image.open(folder / "val_sheet.png") for folder in (tmp_path, one_model))
    assert two_sheet.width * two_sheet.height > one_sheet.width * one_sheet.height


def test_chosen_expressions_are_drawn_in_the_chosen_format_and_color(best, data, refshapes_root, run_here, tmp_path):
    pytest.importorskip("matplotlib")
    refer = REFER(refshapes_root, "refshapes")
    refs = refer.loadRefs(refer.getRefIds(split="testA"))
    first, last = refs[0]["sent_ids"][0], refs[-1]["sent_ids"][-1]
    flags = ["test.py", *data, "--split", "val,testA", "--vis-ids", f"{last},{first}", "--vis-color", "#0000ff"]
    for model, folder in (("--resume", "a"), ("--vis_compare", "b")):
        done = run_here(*flags, model, best, "--vis", tmp_path / folder, "--vis-format", "svg", check=True)
        assert done.out.splitlines()[-1] == str(tmp_path / folder / "testA_sheet.svg")
        names = sorted(path.name for path in (tmp_path / folder).iterdir())
        assert [name.split("_")[-1] for name in names] == [f"sent{first}.svg", f"sent{last}.svg", "sheet.svg"]
        assert "fill: #0000ff" in (tmp_path / folder / names[0]).read_text()
    wrong = run_here(*flags, "--resume", best, "--vis", tmp_path / "c", "--vis-ids", "1000000")
    assert "--vis-ids 1000000: no sentence of val, testA has this sent_id" in wrong.err
    scaled = ["--vis", tmp_path / "d", "--vis-num", 1, "--vis_maps", "--vis-scale", "-0.5", "0.5"]
    run_here("test.py", *data, "--resume", best, *scaled, check=True)
    assert len(list((tmp_path / "d").glob("*.png"))) == 2


def test_segmenting_an_image_file(best, refshapes_root, run_here, tmp_path):
    Image.effect_noise((123, 77), 80).convert("RGB").save(tmp_path / "own.jpg")
    flags = ["test.py", "--image", tmp_path / "own.jpg", "--sentence", "the red circle", "--resume", best]
    flags += ["--bert_tokenizer", refshapes_root / "refshapes"]
    done = run_here(*flags, "--out", tmp_path / "own.png", check=True)
    overlay, mask = Image.open(tmp_path / "own.png"), np.asarray(Image.open(tmp_path / "own_mask.png"))
    assert overlay.size == (123, 77)
    assert mask.shape == (77, 123)
    assert set(np.unique(mask)) <= {0, 255}
    share = f"{(mask > 0).mean():.1%}"
    files = f"Overlay: {tmp_path}/own.png. Mask: {tmp_path}/own_mask.png."
    assert done.out == f"Mask covers {share} of the image. {files}\n"
    colored = [*flags, "--out", tmp_path / "all.png", "--threshold", "1e-6", "--vis-color", "blue"]
    run_here(*colored, check=True)
    assert np.asarray(Image.open(tmp_path / "all_mask.png")).all()
    assert Image.open(tmp_path / "all.png").getpixel((0, 0)) == (0, 0, 255)  # the outline


def test_several_sentences_about_an_image_file(best, refshapes_root, run_here, tmp_path, monkeypatch):
    image = Image.effect_noise((123, 77), 80).convert("RGB")
    image.save(tmp_path / "own.png")
    sentences = ["the red circle", "blue", "the large square at the top"]
    ids, mask = map(torch.from_numpy, tokenize(load_tokenizer(str(refshapes_root / "refshapes")), sentences, 21))
    model, pixels = rebuild(read_checkpoint(best)).eval(), preprocess_image(image, 64)[None].expand(3, -1, -1, -1)
    threshold = model(pixels, ids.long(), mask.long()).mask_logits.softmax(1)[:, 1].median().item()
    encoded, encode_images = [], PreparedModel.encode_images
    monkeypatch.setattr(PreparedModel, "encode_images", lambda *args: encoded.append(1) or encode_images(*args))
    flags = ["test.py", "--image", tmp_path / "own.png", "--resume", best, "-b", 2, "--threshold", threshold]
    flags += ["--bert_tokenizer", refshapes_root / "refshapes"]
    alone = []
    for sentence in sentences:
        run_here(*flags, "--sentence", sentence, "--out", tmp_path / "one.png", check=True)
        alone.append([np.asarray(Image.open(tmp_path / name)) for name in ("one.png", "one_mask.png")])
    encoded.clear()
    repeated = [part for sentence in sentences for part in ("--sentence", sentence)]
    done = run_here(*flags, *repeated, "--out", tmp_path / "all.png", check=True)
    assert len(encoded) == 1
    assert [line.split(":")[0] for line in done.out.splitlines()] == sentences
    assert len(list(tmp_path.glob("all*"))) == 2 * len(sentences)
    for number, (overlay, mask) in enumerate(alone, 1):
        drawn, predicted = (np.asarray(Image.open(tmp_path / f"all_{number}{end}")) for end in (".png", "_mask.png"))
        assert (predicted != mask).mean() < 1e-3  # batches of another size may round differently
        assert (drawn != overlay).mean() < 1e-2
    assert len({mask.tobytes() for _, mask in alone}) == len(sentences)


def test_a_missing_vocabulary_is_named(best, run_here, tmp_path):
    content = torch.load(best, weights_only=True)
    content["config"]["PRETRAINED.TOKENIZER"] = "elsewhere/vocab.txt"
    del content["tokenizer"]  # as in files of older versions
    torch.save(content, tmp_path / "moved.pth")
    Image.new("RGB", (40, 40)).save(tmp_path / "a.jpg")
    flags = ["--resume", tmp_path / "moved.pth", "--image", tmp_path / "a.jpg", "--sentence", "x"]
    done = run_here("test.py", *flags, "--out", tmp_path / "out.png")
    assert done.status == 2
    assert "was trained with the vocabulary elsewhere/vocab.txt (200 entries), which does not exist here" in done.err


@pytest.fixture
def coco_layout(refshapes_root, tmp_path):
    """The generated dataset under two of the paper's names; an image of testB is missing."""
    root, source = tmp_path / "data", refshapes_root / "refshapes"
    (root / "images/mscoco/images").mkdir(parents=True)
    shutil.copytree(source / "images", root / "images/mscoco/images/train2014")
    for name in ("refcoco", "refcocog"):
        (root / name).mkdir()
        shutil.copy(source / "instances.json", root / name)
        shutil.copy(source / "refs(unc).p", root / name / ("refs(umd).p" if name == "refcocog" else "refs(unc).p"))
    refer = REFER(root, "refcoco")
    refer.get_image_path(refer.loadRefs(refer.getRefIds(split="testB"))[0]["image_id"]).unlink()
    return root


def test_a_damaged_image_with_several_processes(best, coco_layout, refshapes_root, run_script, run_here, tmp_path):
    """The row is reported as not measured, as with one process; the results so far are kept."""
    sets = tmp_path / "sets.yaml"
    refer = REFER(coco_layout, "refcoco")
    image = refer.get_image_path(refer.loadRefs(refer.getRefIds(split="val"))[-1]["image_id"])
    image.write_bytes(image.read_bytes()[:60])
    sets.write_text(f"refcoco: {best}\n")
    flags = ["test.py", "--table", "--checkpoints", sets, "--refer_data_root", coco_layout, "-j", 1, "--device", "cpu"]
    flags += ["--bert_tokenizer", refshapes_root / "refshapes", "--dataset", "refcoco", "--split", "val,testA"]
    tables = []
    for processes in (1, 2):
        given = [*flags, "--table_dir", tmp_path / f"{processes}"]
        text = run_here(*given, check=True).out if processes == 1 else run_script(*given, processes=2).stdout
        assert f"RefCOCO val: Cannot decode image {image}" in text
        tables.append((tmp_path / f"{processes}" / "table.json").read_text())
    assert tables[0] == tables[1]
    assert [entry["ours"] is None for entry in json.loads(tables[0])] == [True, False]
    assert len(read_results(tmp_path / "2" / "refcoco_unc_val.jsonl.partial")[1]) > 0


def test_the_paper_table(best, coco_layout, refshapes_root, run_here, tmp_path, interrupt_after):
    sets = tmp_path / "sets.yaml"
    sets.write_text(f"refcoco: {best}\nrefcocog: {best}\nrefcoco+: {best}\n")
    flags = ["test.py", "--table", "--checkpoints", sets, "--refer_data_root", coco_layout, "-j", 0, "--device", "cpu"]
    flags += ["--bert_tokenizer", refshapes_root / "refshapes", "--table_dir", tmp_path / "table"]
    calls = interrupt_after(4)
    assert run_here(*flags).status == 75
    done = run_here(*flags, check=True)
    num_calls = len(calls)
    entries = json.loads((tmp_path / "table" / "table.json").read_text(encoding="utf-8"))
    assert [entry["title"] for entry in entries] == [row.title for row in PUBLISHED]
    assert [entry["ours"] is not None for entry in entries] == [True, True] + [False] * 4 + [True, False]
    assert "1 of the 3 images of split testB are missing" in entries[2]["not_measured"]
    assert "refs(unc).p is missing" in entries[3]["not_measured"]
    assert entries[0]["difference"]["oIoU"] == entries[0]["ours"]["oIoU"] - 73.44
    assert f"{entries[1]['ours']['mIoU']:.2f}" in done.out
    assert "71.54†" in done.out
    assert f"‡ RefCOCO val has {entries[0]['num_expressions']} expressions here, but 10834 as published" in done.out
    again = run_here(*flags, check=True)
    assert len(calls) == num_calls  # complete rows are not evaluated again
    assert again.err.count("already complete") == 3
    assert again.out == done.out
    header, lines = read_results(tmp_path / "table" / "refcoco_unc_val.jsonl")
    assert (header["dataset"], len(lines)) == ("refcoco", entries[0]["num_expressions"])
    selected = run_here(*flags, "--dataset", "refcoco", "--split", "testA,testB", check=True)
    assert [line.split()[1] for line in selected.out.splitlines() if " ours " in line] == ["testA‡", "testB"]
    assert run_here(*flags, "--dataset", "refcocog", check=True).out.count(" ours ") == 2
    assert run_here(*flags, "--dataset", "refcoco+").status == 2
    image = REFER(coco_layout, "refcoco").get_image_path(lines[0]["image_id"])
    image.write_bytes(image.read_bytes()[:60])
    (tmp_path / "table" / "refcoco_unc_val.jsonl").unlink()
    damaged = run_here(*flags, "--dataset", "refcoco", check=True)
    assert f"RefCOCO val: Cannot decode image {image}" in damaged.out
    assert " ours " in damaged.out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--resume is missing"),
        (["--resume", "nowhere.pth"], "--resume nowhere.pth: no such file or folder."),
        (["--resume", "{best}", "--swin_type", "base"], "was trained with swin_type tiny, not base. Drop --swin_type"),
        (["--resume", "{best}", "--window12"], "was trained with window_size 4, not 12. Drop --window12"),
        (["--resume", "{best}", "--ddp_trained_weights"], "do not begin with 'module.'"),
        (["--resume", "{best}", "DATA", "--refer_data_root", "{tmp}", "--bert_tokenizer", "{data}/refshapes"],
         "refs(unc).p is missing"),
        (["--resume", "{best}", "DATA", "--split", "val,tset"], "No split 'tset'"),
        (["--resume", "{best}", "DATA", "--json", "{tmp}/corrupt.pth/x.json"], "Cannot write"),
        (["--resume", "{best}", "DATA", "--predictions", "{tmp}"], "it is a folder"),
        (["--resume", "{best}", "DATA", "--bert_tokenizer", "{tmp}/other"], "vocabulary (180 entries, RefShapes)"),
        (["--resume", "{best}", "DATA", "--bert_tokenizer", "{tmp}/big"], "vocabulary (180 entries, RefShapes)"),
        (["--resume", "{best}", "DATA", "--bert_tokenizer", "{tmp}/none"], "no such file or folder"),
        (["--resume", "{best}", "DATA", "--protocol", "papr"],
         "--protocol papr: choose from paper, original, lavt. Did you mean paper?"),
        (["--resume", "{best}", "DATA", "--threshold", "2"], "--threshold 2.0: must be between 0 and 1"),
        (["--resume", "{best}", "DATA", "--eval_size", "480"], "invalid choice: '480'"),
        (["--resume", "{best}", "DATA", "--predictions", "{tmp}/a.jsonl.partial"],
         "is a partial file. To continue it, pass --predictions {tmp}/a.jsonl"),
        (["--resume", "{best}", "DATA", "--predictions", "{tmp}/a", "--json", "{tmp}/./a"],
         "is one of the files of --predictions. Choose another file name"),
        (["--resume", "{best}", "DATA", "--vis_maps"], "--vis_maps needs --vis DIR"),
        (["--resume", "{best}", "DATA", "--checkpoints", "{checkpoints}"],
         "--table is missing. This command needs --table --checkpoints."),
        (["--table", "--checkpoints", "{checkpoints}", "--resume", "{best}"],
         "--resume cannot be combined with --table"),
        (["--table", "--checkpoints", "{checkpoints}"], "no best_<dataset>.pth for any of refcoco"),
        (["--vis_compare", "{best}", "DATA"], "--vis is missing. This command needs --vis_compare --vis."),
        (["--vis_compare", " ,", "DATA", "--vis", "{tmp}/vis"], "contains no checkpoint"),
        (["--vis_compare", "{best}", "DATA", "--vis", "{tmp}/vis", "--protocol",
          "paper,original"], "draws under one protocol"),
        (["--resume", "{best}", "DATA", "--vis-color", "red"], "--vis_color needs --vis DIR"),
        (["--resume", "{best}", "DATA", "--vis", "{tmp}/vis", "--vis-ids", "1,a"], "--vis-ids 1,a: not a list of"),
        (["--resume", "{best}", "DATA", "--vis", "{tmp}/vis", "--vis-ids", "1", "--vis-num", "3"],
         "--vis_num cannot be combined with --vis_ids"),
        (["--resume", "{best}", "DATA", "--vis", "{tmp}/vis", "--vis-scale", "0", "1"], "--vis_scale needs --vis_maps"),
        (["--resume", "{best}", "DATA", "--vis", "{tmp}/vis", "--vis-color", "redd"], "--vis-color redd: not a color"),
        (["--resume", "{best}", "DATA", "--vis-num", "3"], "--vis_num needs --vis DIR"),
        (["--table", "--checkpoints", "{best}", "--dataset", "refcocog", "--splitBy", "google"], "is not a YAML file"),
        (["--vis_compare", "{best},{tmp}/corrupt.pth", "DATA", "--vis", "{tmp}/vis"], "corrupt.pth is corrupt or not"),
        (["--resume", "{best}", "DATA", "--image", "{tmp}/a.png"],
         "--sentence is missing. This command needs --resume --image --sentence --out."),
        (["--resume", "{best}", "--image", "{tmp}/a.png", "--sentence", "a", "--sentence", " ", "--out", "o.png"],
         "--sentence is blank"),
        (["--resume", "{best}", "DATA", "--image", "no.jpg", "--sentence", "a", "--out", "o.png"],
         "--image no.jpg: no such file"),
        (["--resume", "{best}", "DATA", "--image", "{tmp}/corrupt.pth", "--sentence", "a", "--out", "o.png"],
         "Cannot decode image {tmp}/corrupt.pth"),
        (["--resume", "{best}", "DATA", "--image", "{tmp}/corrupt.pth", "--sentence", "a", "--out", "o.jpg"],
         "Cannot write o.jpg: the name must end in .png"),
        (["--resume", "{best}", "DATA", "--image", "{tmp}/a.png", "--sentence", "a", "--out", "{tmp}/a.png"],
         "Cannot write {tmp}/a.png: it is one of the input files"),
        (["--resume", "{best}", "DATA", "--image", "{tmp}/a.png", "--sentence", "a", "--out", "o.png", "--json", "x"],
         "--json cannot be combined with --image"),
    ],
)  # fmt: skip
def test_a_mistake_is_reported_in_one_line(error_line, tmp_path, flags, message):
    data = ["--dataset", "refshapes", "--refer_data_root", "{data}", "-j", "0"]
    given = [part for flag in flags for part in (data if flag == "DATA" else [flag])]
    assert message.replace("{tmp}", str(tmp_path)) in error_line("test.py", *given)


def test_a_missing_image_is_reported_before_the_evaluation(best, data, refshapes_root, run_here, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(refshapes_root / "refshapes", root / "refshapes")
    refer = REFER(root, "refshapes")
    refer.get_image_path(refer.loadRefs(refer.getRefIds(split="testB"))[0]["image_id"]).unlink()
    done = run_here("test.py", *data, "--refer_data_root", root, "--split", "all", "--resume", best)
    assert done.status == 2
    assert "error: 1 of the" in done.err

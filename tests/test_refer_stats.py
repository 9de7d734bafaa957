"""python -m refer.stats: numbers known by hand, leaks, what is printed, written and drawn.

The set: pictures of 20 x 30 pixels (H x W); a token is a word, [CLS] and [SEP] come to them.
"""

import json
import pickle
import re
import sys

import numpy as np
import pytest
from commands import run_in_process
from matplotlib.colors import to_hex
from PIL import Image

from lib.errors import MissingFileError, UserError
from refer import stats
from refer.refer import REFER
from refer.stats.figure import COLORS, draw
from refer.stats.statistics import shared_images, statistics_of
from refer.stats.tables import sharing, tables

H, W = 20, 30
SQUARE = [2, 2, 12, 2, 12, 12, 2, 12]  # 10 x 10 pixels
SHIFTED = [8, 8, 18, 8, 18, 18, 8, 18]  # overlaps SQUARE in 4 x 4 of them
SMALL = [20, 2, 25, 2, 25, 7, 20, 7]  # 5 x 5, apart from both
RLE = {"size": [H, W], "counts": [0, 60, H * W - 60]}
LONG = " ".join(["dog"] * 20)  # 22 tokens
JUST = " ".join(["dog"] * 19)  # 21

# ann_id, image_id, split, sentences
REFS = [
    (102, 1, "val", ["a cat", "DOG"]),
    (101, 1, "train", ["dog", "the red dog", LONG]),
    (103, 2, "val", [LONG]),
    (103, 2, "val", [JUST]),  # another ref to the same object
    (104, 3, "testA", [" the  dog "]),
]
SEGMENTATIONS = {101: [SQUARE], 102: [SQUARE, SHIFTED], 103: [SMALL, SQUARE], 104: RLE}
AREAS = {101: 100, 102: 200, 103: 126.0, 104: None}  # of 100, 184, 125 and 60 pixels


def make_set(root, refs=REFS, dataset="refcoco", split_by="unc", segmentations=SEGMENTATIONS, areas=AREAS):
    """Write a set; ids of refs and sentences count up."""
    folder = root / dataset
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for number, (ann_id, image_id, split, texts) in enumerate(refs):
        sentences = [{"sent_id": 100 * number + i, "raw": text, "sent": "x"} for i, text in enumerate(texts)]
        records.append(
            {"ref_id": number, "ann_id": ann_id, "image_id": image_id, "split": split, "sentences": sentences}
        )
    (folder / f"refs({split_by}).p").write_bytes(pickle.dumps(records, protocol=2))
    pairs = dict.fromkeys((ann_id, image_id) for ann_id, image_id, _, _ in refs)
    annotations = [
        {"id": ann, "image_id": image, "category_id": ann % 2, "segmentation": segmentations[ann], "area": areas[ann]}
        for ann, image in pairs
    ]
    images = [{"id": one, "width": W, "height": H, "file_name": f"{one}.jpg"} for one in {image for _, image in pairs}]
    categories = [{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}]
    text = json.dumps({"images": images, "annotations": annotations, "categories": categories})
    (folder / "instances.json").write_text(text)
    return REFER(root, dataset, split_by)


def count_words(sentences):
    return [len(sentence.split()) + 2 for sentence in sentences]


def measured(refer, count_tokens=count_words, **how):
    return statistics_of(refer, count_tokens, **how)


@pytest.fixture
def vocabulary(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "red", "dog", "a", "cat"]) + "\n")
    return path


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """``run("--flag", …)`` in a folder of its own: exit status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*flags):
        return run_in_process(stats.main, ["stats", *flags], monkeypatch, capsys)

    return call


def cells(output, split):
    """The cells of a split's rows, in the order they are printed."""
    lines = [line.split() for line in output.splitlines() if re.match(rf"{split} +\d", line)]
    return [[cell for cell in line[1:] if cell != "%"] for line in lines]


def test_numbers_known_by_hand(tmp_path):
    train, val, test_a = measured(make_set(tmp_path))
    assert [one.split for one in (train, val, test_a)] == ["train", "val", "testA"]
    row = val.summary()
    assert {name: row[name] for name in ("refs", "expressions", "images", "categories", "objects")} == {
        "refs": 3, "expressions": 4, "images": 2, "categories": 2, "objects": 2,
    }  # fmt: skip
    assert row["expressions_per_ref"]["mean"] == pytest.approx(4 / 3)
    assert row["words"] == {"mean": 10.5, "minimum": 1, "p5": 1, "median": 2, "p95": 20, "maximum": 20}
    assert row["tokens"] == {"mean": 12.5, "minimum": 3, "p5": 3, "median": 4, "p95": 22, "maximum": 22}
    assert row["cut"] == {"count": 1, "percent": 25}  # 21 tokens are kept, 22 are not
    assert row["ambiguous"] == {"count": 1, "percent": 25}  # "DOG" is train's "dog", too
    assert row["size_percent"]["minimum"] == pytest.approx(100 * 125 / 600)
    assert row["size_percent"]["maximum"] == pytest.approx(100 * 184 / 600)
    assert row["several_parts"] == {"count": 2, "percent": 100}
    assert row["overlap"] == {"count": 1, "percent": 50, "pixels_lost_percent": pytest.approx(100 * 16 / 184)}
    assert row["stored_area_off"] == {"count": 1, "percent": 50}  # 200 of 184; 126 of 125 is within 1 %
    assert row["empty_masks"] == 0
    assert row["undrawable"] == {"count": 0, "first": None}
    assert train.summary()["ambiguous"] == {"count": 1, "percent": pytest.approx(100 / 3)}
    row = test_a.summary()
    assert row["size_percent"]["median"] == 10
    assert row["several_parts"]["count"] == 0
    assert row["overlap"] == {"count": 0, "percent": 0, "pixels_lost_percent": None}
    assert row["stored_area_off"] == {"count": 0, "percent": None}  # it has none
    assert row["ambiguous"]["count"] == 0  # a sentence of another picture is no rival


@pytest.mark.parametrize(("stored", "off"), [(101, 0), (101.1, 1), (99, 0), (98.9, 1), ("100", None), (None, None)])
def test_a_stored_area_may_differ_by_one_percent(tmp_path, stored, off):
    (train,) = measured(make_set(tmp_path, REFS[1:2], areas={101: stored}))
    assert train.summary()["stored_area_off"] == {"count": off or 0, "percent": None if off is None else 100 * off}


def test_masks_that_are_empty_and_parts_that_are_equal(tmp_path):
    empty = {"size": [H, W], "counts": [H * W]}
    segmentations = SEGMENTATIONS | {101: empty, 102: [SQUARE, SQUARE]}
    splits = measured(make_set(tmp_path, segmentations=segmentations, areas=AREAS | {101: 0}))
    train, val = splits[0].summary(), splits[1].summary()
    assert train["empty_masks"] == 1
    assert train["size_percent"]["maximum"] == 0
    assert train["stored_area_off"]["count"] == 0
    assert val["overlap"] == {"count": 1, "percent": 50, "pixels_lost_percent": 100}
    assert "  train: 1 masks without a pixel" in tables(splits).splitlines()
    draw([splits]).draw_without_rendering()


def test_the_cut_is_where_it_is_asked_for(tmp_path):
    refer = make_set(tmp_path)
    assert [measured(refer, max_tokens=kept)[1].cut for kept in (2, 3, 20, 21, 22)] == [4, 3, 2, 1, 0]
    splits = measured(refer, max_tokens=20)
    assert "cut at 20" in tables(splits)
    assert statistics_of(refer)[1].cut is None


def test_splits_are_those_of_the_file_in_the_usual_order(tmp_path):
    names = ["odd", "test", "testB", "testAB", "val", "train", "testA"]
    refs = [(101, 1, name, ["dog"]) for name in names]
    splits = measured(make_set(tmp_path, refs))
    assert [one.split for one in splits] == ["train", "val", "testA", "testB", "test", "odd", "testAB"]
    assert [one.summary()["refs"] for one in splits] == [1] * 7


def test_a_leak_is_told_with_what_it_concerns(tmp_path):
    splits = measured(make_set(tmp_path))
    shared = shared_images(splits)
    assert [(pair.first.split, pair.second.split, pair.images, pair.expressions) for pair in shared] == [
        ("train", "val", 1, (3, 2))
    ]
    assert sharing(splits, shared).splitlines() == [
        "images in both   (1)   (2)   (3)",
        "(1) train          1     1     0",
        "(2) val            1     2     0",
        "(3) testA          0     0     1",
        "leak: 1 of 2 val images (2 of 4 expressions, 50.0 %) are in train too",
    ]


def test_no_leak_is_told_too(tmp_path):
    splits = measured(make_set(tmp_path, [REFS[1], *REFS[2:]]))
    assert shared_images(splits) == []
    assert sharing(splits, []) == "no image is in two splits (by file and COCO's number)"
    splits = measured(make_set(tmp_path, [(101, 1, "testA", ["dog"]), (102, 1, "testB", ["a"]), REFS[2]]))
    assert [pair.is_leak for pair in shared_images(splits)] == [False]
    assert sharing(splits, shared_images(splits)).endswith("\nno image of train is in another split")


def test_ids_differ_but_the_picture_is_one(tmp_path):
    """Two records of an image with one file name are the same picture."""
    refer = make_set(tmp_path)
    refer.Imgs[3]["file_name"] = refer.Imgs[1]["file_name"]
    assert {(a.first.split, a.second.split) for a in shared_images(measured(refer))} == {
        ("train", "val"), ("train", "testA"), ("val", "testA"),
    }  # fmt: skip


def test_datasets_share_pictures_of_one_folder_only(tmp_path):
    first = measured(make_set(tmp_path, [REFS[1], REFS[4]]))
    second = measured(make_set(tmp_path, [(101, 3, "train", ["dog"]), REFS[2]], "refcocog", "umd"))
    (tmp_path / "mine" / "images").mkdir(parents=True)
    third = measured(make_set(tmp_path, [REFS[4]], "mine"))
    splits = [*first, *second, *third]
    lines = sharing(splits, shared_images(splits)).splitlines()
    assert [line for line in lines if line.startswith("leak")] == [
        "leak: 1 of 1 refcoco (unc) testA images (1 of 1 expressions, 100.0 %) are in refcocog (umd) train too"
    ]
    assert lines[4].split() == ["(4)", "refcocog", "(umd)", "val", "0", "0", "0", "1", "0"]


def test_a_set_s_own_leaks_come_first_and_a_wide_matrix_is_left_out(tmp_path):
    make_set(tmp_path)
    splits = []
    for number in range(5):
        splits += measured(make_set(tmp_path, dataset=f"dataset{number}"))
    lines = sharing(splits, shared_images(splits)).splitlines()
    assert lines[0] == f"of 15 splits, {len(shared_images(splits))} pairs have images in common (each is in --json)"
    own = [re.search(r"(dataset\d).* in (dataset\d)", line) for line in lines[1:]]
    assert [found[1] == found[2] for found in own] == [True] * 5 + [False] * 20


def test_no_mask_is_drawn_twice(tmp_path, monkeypatch):
    refer, other = make_set(tmp_path), make_set(tmp_path, split_by="google")
    drawn = []
    whole = REFER.getMask
    monkeypatch.setattr(
        REFER,
        "getMask",
        lambda self, ref, mode="paper": (drawn.append((ref["ann_id"], mode)), whole(self, ref, mode))[1],
    )
    known = {}
    first = measured(refer, known=known)
    second = measured(other, known=known)
    assert sorted(drawn) == [
        (101, "union"), (102, "paper"), (102, "union"), (103, "paper"), (103, "union"), (104, "union"),
    ]  # fmt: skip
    assert [one.summary()["overlap"] for one in first] == [one.summary()["overlap"] for one in second]


def test_json_is_what_the_table_shows(tmp_path, run, vocabulary):
    make_set(tmp_path)
    status, out, _ = run("--refer_data_root", ".", "--bert_tokenizer", vocabulary, "--json", "a/stats.json")
    assert status == 0
    assert out.startswith("refcoco (unc), refcoco/refs(unc).p\n")
    assert out.splitlines()[-2:] == ["a/stats.json", "models/stats/refcoco_unc.png"]
    told = json.loads((tmp_path / "a/stats.json").read_text())
    assert told["max_tokens"] == 21
    assert told["tokenizers"]["refcoco"].startswith("10 tokens, sha256 ")
    assert told["shared_images"] == [
        {"splits": ["train", "val"], "images": 1, "expressions": [3, 2], "leak": True}
    ]  # fmt: skip
    assert [row["split"] for row in told["splits"]] == ["train", "val", "testA"]
    for row in told["splits"]:
        sentences, objects = cells(out, row["split"])
        words, tokens, sizes, cut = row["words"], row["tokens"], row["size_percent"], row["cut"]
        lost, off = row["overlap"]["pixels_lost_percent"], row["stored_area_off"]
        assert sentences == [
            f"{row['refs']}", f"{row['expressions']}", f"{row['expressions_per_ref']['mean']:.2f}", f"{row['images']}",
            f"{row['ambiguous']['percent']:.2f}",
            f"{words['mean']:.1f}", f"{words['p95']:.0f}", f"{words['maximum']:.0f}",
            f"{tokens['mean']:.1f}", f"{tokens['median']:.0f}", f"{tokens['p95']:.0f}", f"{tokens['maximum']:.0f}",
            f"{cut['count']}", f"{cut['percent']:.2f}",
        ]  # fmt: skip
        assert objects == [
            f"{row['objects']}", f"{row['categories']}", *(f"{sizes[k]:.2f}" for k in ("p5", "median", "mean", "p95")),
            f"{row['several_parts']['percent']:.1f}", f"{row['overlap']['count']}", f"{row['overlap']['percent']:.2f}",
            "–" if lost is None else f"{lost:.2f}", f"{off['count']}",
            "–" if off["percent"] is None else f"{off['percent']:.2f}",
        ]  # fmt: skip
    (val,) = (row for row in told["splits"] if row["split"] == "val")
    assert val == measured(make_set(tmp_path))[1].summary()


def test_the_widest_table_fits_a_terminal(tmp_path):
    """Counts of RefCOCO's size, everything at its widest."""
    (train,) = measured(make_set(tmp_path, REFS[1:2]))
    wide = train.summary() | {"refs": 42404, "expressions": 120624, "images": 16994, "objects": 42404}
    wide |= {"cut": {"count": 12062, "percent": 10.0}, "ambiguous": {"count": 120624, "percent": 100.0}}
    wide |= {name: train.summary()[name] | {"maximum": 120, "p95": 100} for name in ("words", "tokens")}
    wide |= {"overlap": {"count": 42404, "percent": 100.0, "pixels_lost_percent": 100.0}}
    wide |= {name: {"count": 42404, "percent": 100.0} for name in ("stored_area_off", "several_parts")}
    object.__setattr__(train, "summary", lambda: wide)
    assert max(map(len, tables([train]).splitlines())) <= 120


def test_the_picture_is_written_and_not_blank(tmp_path, run, vocabulary):
    make_set(tmp_path)
    assert run("--refer_data_root", ".", "--bert_tokenizer", vocabulary, "--out", "b/stats.png")[0] == 0
    with Image.open(tmp_path / "b/stats.png") as picture:
        assert (picture.format, picture.size) == ("PNG", (1600, 1088))
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    for split in ("train", "val", "testA"):
        rgb = [int(COLORS[split][i : i + 2], 16) for i in (1, 3, 5)]
        assert (pixels == rgb).all(1).sum() > 1000, split
    assert not (tmp_path / "models").exists()


def panels(figure):
    return {axes.get_title(loc="left"): axes for axes in figure.axes}


def test_the_picture_shows_the_numbers(tmp_path):
    splits = measured(make_set(tmp_path))
    shown = panels(draw([splits]))
    assert list(shown) == ["Sentence lengths", "Object sizes", "Expressions per ref", "Parts"]
    lengths = shown["Sentence lengths"]
    lines = {line.get_label(): line for line in lengths.lines}
    val = lines["val: 25.00 % cut"]
    assert to_hex(val.get_color()) == COLORS["val"]
    values = dict(zip(val.get_xdata().tolist(), val.get_ydata().tolist(), strict=True))
    assert {x: y for x, y in values.items() if y} == {3: 25, 4: 25, 21: 25, 22: 25}
    assert {"train: 33.33 % cut", "testA: 0.00 % cut"} < set(lines)
    assert [line.get_xdata()[0] for line in lengths.lines if line.get_linestyle() == "--"] == [21.5]
    assert [text.get_text() for text in lengths.texts] == ["cut at 21"]
    sizes = shown["Object sizes"]
    assert sizes.get_xscale() == "log"
    for patch in sizes.patches:
        assert patch.get_data().values.sum() == pytest.approx(100)
    heights = [[bar.get_height() for bar in group] for group in shown["Expressions per ref"].containers]
    assert heights == [[0, 0, 100], [pytest.approx(200 / 3), pytest.approx(100 / 3), 0], [100, 0, 0]]
    heights = [[bar.get_height() for bar in group] for group in shown["Parts"].containers]
    assert heights == [[100, 0], [0, 100], [100, 0]]
    texts = [text.get_text() for text in shown["Parts"].get_legend().get_texts()]
    assert texts == ["train: 0.00 % overlap", "val: 50.00 % overlap", "testA: 0.00 % overlap"]


def test_many_parts_share_the_last_bars_and_every_set_has_its_row(tmp_path):
    many = [[x, 0, x + 1, 0, x + 1, 1, x, 1] for x in range(0, 24, 2)]
    first = measured(make_set(tmp_path, segmentations=SEGMENTATIONS | {101: many}))
    second = measured(make_set(tmp_path, dataset="$own$"), count_tokens=None)
    figure = draw([first, second])
    assert len(figure.axes) == 8
    assert [label.get_text() for label in figure.axes[3].get_xticklabels()] == [*"1234567", "8+"]
    assert figure.axes[3].containers[0][7].get_height() == 100
    assert figure.axes[4].get_xlabel() == "words"
    assert len(figure.axes[4].texts) == 0  # no cut
    assert not figure.subfigs[1]._suptitle.get_parse_math()  # a $ is a $
    figure.draw_without_rendering()


def test_without_a_vocabulary_words_are_counted(tmp_path, run):
    make_set(tmp_path)
    status, out, err = run("--refer_data_root", ".")
    assert status == 0
    (warning,) = err.splitlines()
    assert "sentence lengths in words only" in warning
    assert "tokens" not in out
    assert cells(out, "val")[0] == ["3", "4", "1.33", "2", "25.00", "10.5", "20", "20"]
    assert (tmp_path / "models/stats/refcoco_unc.png").exists()
    status, _, err = run("--refer_data_root", ".", "--bert_tokenizer", "absent/vocab.txt")
    assert (status, err) == (2, "error: --bert_tokenizer absent/vocab.txt: no such file or folder\n")


def test_without_matplotlib_the_picture_is_skipped(tmp_path, run, vocabulary, monkeypatch):
    make_set(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"] + ["matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    status, out, err = run("--refer_data_root", ".", "--bert_tokenizer", vocabulary, "--json", "stats.json")
    assert status == 0
    (warning,) = err.splitlines()
    assert "no picture: drawing needs matplotlib: pip install -r requirements-extra.txt" in warning
    assert len(cells(out, "val")) == 2
    assert (tmp_path / "stats.json").exists()
    assert list(tmp_path.rglob("*.png")) == []


def test_what_cannot_be_drawn_is_counted_and_the_first_is_named(tmp_path, run, vocabulary):
    make_set(tmp_path, segmentations=SEGMENTATIONS | {102: [[1, 2]], 104: []})
    status, out, err = run("--refer_data_root", ".", "--bert_tokenizer", vocabulary, "--json", "stats.json")
    assert status == 2
    (line,) = err.splitlines()
    assert line.startswith("error: 2 objects can't be drawn and are left out, the first: refcoco/instances.json: ")
    assert "annotation 102 of ref 0: a polygon" in line
    assert cells(out, "val")[1][0] == "2"  # both objects, one of them drawn
    val, test_a = json.loads((tmp_path / "stats.json").read_text())["splits"][1:]
    assert val["undrawable"]["count"] == 1
    assert val["size_percent"]["maximum"] == pytest.approx(100 * 125 / 600)
    assert test_a["size_percent"] is None
    assert cells(out, "testA")[1][2:] == ["–"] * 5 + ["0", "–", "–", "0", "–"]
    assert (tmp_path / "models/stats/refcoco_unc.png").exists()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--dataset", "refcocoo"], r"unknown dataset 'refcocoo' \(did you mean refcoco\?\): choose one of "),
        (["--splitBy", "umd"], "unknown splitBy 'umd': refcoco has unc, google"),
        (["--dataset", "refcoco,refcocog", "--splitBy", "umd"], "unknown splitBy 'umd': refcoco has unc, google"),
        (["--dataset", "refcoco,refcocog", "--splitBy", "unc,umd,google"], "--splitBy names 3 split systems for 2"),
        (["--dataset", ","], "--dataset ',' names no dataset"),
        (
            ["--dataset", "refcocog"],
            r"refcocog/refs\(umd\)\.p is missing. Run `python -m refer\.prepare --dataset refcocog",
        ),
        (["--max_tokens", "0"], "--max_tokens 0: must be above 0"),
        (["--split_by", "unc"], "unknown flag --split_by; did you mean --splitBy"),
        (["--out", "refcoco"], "can't write refcoco: it is a folder"),
        (["--out", "refcoco/instances.json"], "can't write refcoco/instances.json: must end in .png"),
        (["--json", "refcoco/instances.json"], "can't write refcoco/instances.json: it is one of the files that are"),
        (["--json", "refcoco/instances.json/x"], "can't write refcoco/instances.json/x: "),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path, run, vocabulary, flags, told):
    make_set(tmp_path)
    status, out, err = run("--refer_data_root", ".", "--bert_tokenizer", vocabulary, *flags)
    assert status == 2
    assert len(err.splitlines()) == 1
    assert re.match("error: " + told, err), err
    assert out == ""


def test_which_sets_the_flags_mean(tmp_path):
    make_set(tmp_path)
    assert stats.choose_sets(tmp_path, "refcoco") == [("refcoco", "unc")]  # google is not there
    make_set(tmp_path, split_by="google")
    make_set(tmp_path, dataset="mine", split_by="a")
    both = [("refcoco", "unc"), ("refcoco", "google")]
    assert stats.choose_sets(tmp_path, "refcoco") == both
    assert stats.choose_sets(tmp_path, "refcoco,refcoco", "google") == both[1:]
    assert stats.choose_sets(tmp_path, "refcoco", "unc,google") == both
    assert stats.choose_sets(tmp_path, " refcoco , mine ", "google,a") == [both[1], ("mine", "a")]
    assert stats.choose_sets(tmp_path, "mine,refcoco") == [("mine", "a"), *both]
    with pytest.raises(UserError, match="mine has a"):
        stats.choose_sets(tmp_path, "mine,refcoco", "unc")


def test_refshapes_has_its_own_vocabulary(refshapes_root, run):
    status, out, err = run("--dataset", "refshapes", "--refer_data_root", refshapes_root, "--json", "stats.json")
    assert (status, err) == (0, "")
    refer = REFER(refshapes_root, "refshapes", "unc")
    for split in ("train", "val", "testA", "testB"):
        refs = refer.loadRefs(refer.getRefIds(split=split))
        expected = len(refs), sum(len(ref["sentences"]) for ref in refs), len({ref["image_id"] for ref in refs})
        sentences, objects = cells(out, split)
        assert tuple(int(sentences[i]) for i in (0, 1, 3)) == expected
        # Every word of it is in its vocabulary, so there are two tokens more than words.
        assert float(sentences[8]) == pytest.approx(float(sentences[5]) + 2, abs=0.06)
        assert objects[-2:] == ["0", "0.00"]
    assert "\nno image is in two splits (by file and COCO's number)\n" in out
    assert out.splitlines()[-1] == "models/stats/refshapes_unc.png"


def test_a_missing_set_is_not_an_empty_one(tmp_path):
    with pytest.raises(MissingFileError):
        REFER(tmp_path, *stats.choose_sets(tmp_path, "refcoco+")[0])

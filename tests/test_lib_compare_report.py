"""lib.compare: kinds of expressions, learning curves, the gallery and the page."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
from result_files import EXPRESSIONS, with_counts, write_results

from lib.compare import charts, gallery, page, table
from lib.compare.kinds import distractors, groupings, property_of
from lib.compare.results import ModelResults, load_models, pool
from refer.masks import encode_mask, resize_mask
from refer.refer import REFER

SPLITS = ("val", "testA")


@pytest.fixture(scope="module")
def refer(refshapes_root):
    return REFER(refshapes_root, "refshapes", "unc")


@pytest.fixture(scope="module")
def models(refer):
    """Two models with two seeds: ``ours`` is perfect except for its first expression, ``late`` finds only that."""
    lines = []
    for ref in refer.loadRefs(refer.getRefIds(split="val")):
        for sentence in ref["sentences"]:
            mask = resize_mask(refer.getMask(ref)["mask"], 32)
            ids = {"image_id": ref["image_id"], "ref_id": ref["ref_id"], "sent_id": sentence["sent_id"]}
            line = ids | {"sentence": sentence["sent"], "split": "val", "union": int(mask.sum())}
            lines.append(line | {"intersection": 0, "mask": encode_mask(mask)})
    first = np.arange(len(lines)) == 0
    ious = {"ours": (~first).astype(float), "late": first.astype(float)}
    return [ModelResults(name, [lines, lines], np.array([values, values])) for name, values in ious.items()]


@pytest.mark.parametrize(
    ("sentence", "kind"),
    [
        ("The small red circle, left of the cross", "relation"),
        ("square at the top left", "position"),
        ("leftmost big shape", "position"),
        ("biggest shape", "size"),
        ("red cross", "color"),
        ("the triangle", "shape"),
        ("coloured thing", "other"),
    ],
)
def test_the_property_that_a_sentence_names(sentence, kind):
    assert property_of(sentence) == kind


def test_every_grouping_contains_every_expression_once(models, refer):
    lines = models[0].lines[0]
    found = groupings(lines, refer)
    assert len(found) == 4
    for grouping in found:
        assert sorted(np.concatenate([*grouping.groups.values()]).tolist()) == list(range(len(lines)))
    for name, indices in found[1].groups.items():
        bounds = [int(number) for number in re.findall(r"\d+", name)]
        counts = [len(lines[i]["sentence"].split()) for i in indices]
        assert min(counts) >= bounds[0]
        assert len(bounds) == 1 or max(counts) <= bounds[1]
    assert len(groupings(lines, None)) == 2


def test_distractors_have_the_shape_of_the_object(refer):
    for ref_id in refer.getRefIds(split="testA"):
        ref = refer.Refs[ref_id]
        shapes = [item["attributes"]["shape"] for item in refer.imgToAnns[ref["image_id"]]]
        shape = refer.refToAnn[ref_id]["attributes"]["shape"]
        assert distractors(refer, ref_id) == shapes.count(shape) - 1 > 0


def test_splits_are_pooled(tmp_path):
    path = write_results(tmp_path / "ours.jsonl", with_counts((90, 100), (50, 100), (0, 10), (60, 80)))
    (model,) = pool(load_models({"ours": [path, path]}, SPLITS))
    assert model.ious.shape == (2, len(EXPRESSIONS))
    assert [line["split"] for line in model.lines[1]] == ["val", "val", "val", "testA"]
    assert model.ious[0, 3] == 0.75


def test_curves_are_over_the_steps_that_all_seeds_have():
    lines = [[{"kind": "eval", "step": s, "mIoU": s + seed} for s in range(2, 6 + seed)] for seed in (0, 1)]
    steps, values = charts.curve_of(lines, "eval", "mIoU")
    assert steps == [2, 3, 4, 5]
    assert values.tolist() == [[2, 3, 4, 5], [3, 4, 5, 6]]


def test_curves_are_drawn_with_a_band(models):
    runs = {"ours": [[{"kind": "eval", "step": s, "mIoU": s * seed} for s in (1, 2, 3)] for seed in (1, 3)]}
    (figure,) = charts.draw_curves(runs, ["ours", "late"]).values()
    axes = figure.axes[0]
    assert axes.lines[0].get_ydata().tolist() == [2, 4, 6]
    (band,) = axes.collections
    assert sorted(set(band.get_paths()[0].vertices[:, 1])) == [1, 2, 3, 6, 9]


def test_bars_are_means_of_the_groups(models, refer):
    found = groupings(models[0].lines[0], refer)
    figures = charts.draw_kinds({model.name: model.ious for model in models}, found)
    assert len(figures) == 4
    for grouping, figure in zip(found, figures.values(), strict=True):
        heights = [bar.get_height() for bar in figure.axes[0].patches]
        expected = [100 * m.ious[:, indices].mean() for m in models for indices in grouping.groups.values()]
        assert heights == pytest.approx(expected)


def test_the_gallery(models, refer):
    wins, loses, failures = gallery.make_sections(models, "ours", refer, "paper")
    lines = models[0].lines[0]
    assert wins.title == "Where ours wins most against the mean of the others"
    assert len(wins.examples) == min(gallery.NUM_EXTREMES, len({line["image_id"] for line in lines}))
    assert [example.note for example in loses.examples] == [
        f"val  ref {lines[0]['ref_id']}  sentence {lines[0]['sent_id']}"
    ]
    assert failures.examples[0].sentence == lines[0]["sentence"]
    assert [cell.title for cell in loses.examples[0].cells] == ["ground truth", "ours", "late"]
    assert loses.examples[0].cells[2].score == "IoU 1.00"
    assert gallery.draw_sheet(loses).render().width > 900


class Collector(HTMLParser):
    """Collects attributes that load something, and the texts."""

    def __init__(self):
        super().__init__()
        self.sources, self.texts, self.open = [], [], []

    def handle_starttag(self, tag, attrs):
        self.sources += [value for name, value in attrs if name in ("src", "href", "srcset")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_contains_everything_and_loads_nothing(models, refer):
    odd = [model._replace(name=name) for model, name in zip(models, ("a<b>", "late"), strict=True)]
    rows = table.make_rows({"val": odd}, {}, "a<b>")
    sections = gallery.make_sections(odd, "a<b>", refer, "paper")
    text = page.make_page(rows, "a<b>", {"Learning curves": {"curve": b"png"}, "Nothing": {}}, sections)
    collector = Collector()
    collector.feed(text)
    assert not collector.open
    assert "<b>" not in text
    assert "Nothing" not in text
    assert "a<b>" in collector.texts
    assert all(source.startswith("data:image/") for source in collector.sources)
    assert len(collector.sources) == 1 + sum(4 * len(section.examples) for section in sections)
    assert "url(" not in text

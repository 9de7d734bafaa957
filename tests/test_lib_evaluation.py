"""The evaluate loop against values known beforehand, its rounds and reports; predict."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from golden_cases import golden_inputs, set_golden_weights
from pycocotools import mask as coco_mask

import lib.evaluation
from bert.tokenization import read_vocabulary
from CrossVLT import CrossVLTOutput, build_crossvlt
from data.dataset_refer_bert import ReferDataset
from data.loaders import build_eval_batches
from lib.errors import StoppedError
from lib.evaluation import ExpressionResult, alignment_maps, evaluate, predict
from lib.metrics import compute_metrics
from lib.protocols import PAPER, PROTOCOLS, Protocol
from refer.masks import decode_mask
from refer.refer import REFER


class Echo(torch.nn.Module):
    """Predicts as the object what is above 0 in the picture's first channel; counts the pictures it encodes."""

    encoded = 0

    def encode_images(self, images):
        assert not torch.is_grad_enabled()
        assert not self.training
        self.encoded += len(images)
        return images[:, 0]

    def segment(self, encoded, input_ids, attention_mask, *, size, return_similarities=None):
        assert len(encoded) == len(input_ids)
        return CrossVLTOutput(torch.stack([-encoded, encoded], dim=1), None)

    def forward(self, images, input_ids, attention_mask, return_similarities=None):
        return self.segment(self.encode_images(images), input_ids, attention_mask, size=images.shape[-2:])


def batch_of(indices, truths, predictions, objects=None, pictures=None, full_size=None):
    """A batch as ImageBatches makes it: ``predictions`` are what Echo answers for each picture."""
    ids = torch.zeros(len(indices), 4, dtype=torch.long)
    truths = {("paper", "resized"): torch.tensor(truths, dtype=torch.uint8)}
    if full_size is not None:
        truths["union", "original"] = [torch.tensor(one, dtype=torch.uint8) for one in full_size]
    every = torch.arange(len(indices))
    return {
        "image": (2 * torch.tensor(predictions).float() - 1)[:, None].expand(-1, 3, -1, -1),
        "input_ids": ids,
        "attention_mask": ids,
        "index": torch.tensor(indices),
        "image_index": every if pictures is None else torch.tensor(pictures),
        "object_index": every if objects is None else torch.tensor(objects),
        "targets": truths,
    }


# Expression 2 is right, 0 finds half of its object, 1 finds something where there is nothing.
PERFECT = batch_of([2], [[[1, 1], [0, 0]]], [[[1, 1], [0, 0]]])
HALF = batch_of([0, 1], [[[1, 1], [0, 0]], [[0, 0], [0, 0]]], [[[1, 0], [0, 0]]], pictures=[0, 0])
COUNTS = [[1, 2], [0, 1], [2, 2]]


def judge(batches, number=3, **how):
    return evaluate(Echo(), batches, indices=range(number), **{"batch_size": 4, **how})


def test_evaluate_counts_pixels_in_order():
    model = Echo().train()
    results = evaluate(model, [PERFECT, HALF], indices=range(3), batch_size=4, keep_masks={0, 2})
    assert list(results) == ["paper"]
    result = results["paper"]
    assert result.indices.tolist() == [0, 1, 2]
    assert result.counts.tolist() == COUNTS
    assert result.metrics["mIoU"] == pytest.approx(50)
    assert result.metrics["oIoU"] == pytest.approx(60)
    assert [result.iou(index) for index in range(3)] == [0.5, 0, 1]
    assert set(result.masks) == {0, 2}
    assert decode_mask(result.masks[0]).tolist() == [[True, False], [False, False]]
    assert model.training  # left as it was


def test_nothing_predicted_and_nothing_there():
    empty = batch_of([0, 1], [[[0, 0], [0, 0]], [[1, 1], [1, 1]]], [[[0, 0], [0, 0]]], pictures=[0, 0])
    result = judge([empty], 2)["paper"]
    assert result.counts.tolist() == [[0, 0], [0, 4]]  # U = 0 counts as an IoU of 0
    assert set(result.metrics.values()) == {0.0}


def test_a_picture_is_encoded_once_for_all_its_sentences():
    number = 7
    batch = batch_of(range(number), [[[1, 0], [0, 0]]], [[[1, 1], [0, 0]]], [0] * number, [0] * number)
    for share, times in ((True, 1), (False, number)):
        model = Echo()
        result = evaluate(model, [batch], indices=range(number), batch_size=3, share_images=share)["paper"]
        assert result.counts.tolist() == [[1, 2]] * number
        assert model.encoded == times


@pytest.mark.parametrize(
    ("indices", "told"), [([0, 0], "judged twice"), ([0], "1 of 2 expressions were never"), ([0, 2], "isn't among")]
)
def test_evaluate_insists_on_every_expression_once(indices, told):
    batch = batch_of(indices, [[[1, 0]]] * len(indices), [[[1, 0]]] * len(indices))
    with pytest.raises(RuntimeError, match=told):
        judge([batch], 2)


def test_one_pass_scores_several_protocols():
    # The picture is 2×2 for the model and 2×4 itself. The model answers: left half. The two polygons of the object
    # are the left half and the second column of the original: they overlap there.
    union, paper = [[1, 1, 0, 0]] * 2, [[1, 0, 0, 0]] * 2
    batch = batch_of([0], [[[1, 0], [1, 0]]], [[[1, 0], [1, 0]]], full_size=[union])
    results = judge([batch], 1, protocols=list(PROTOCOLS.values()), keep_masks={0})
    assert results["paper"].counts.tolist() == [[2, 2]]
    assert results["original"].counts.tolist() == [[4, 4]]
    assert decode_mask(results["paper"].masks[0]).shape == (2, 2)
    batch["targets"]["paper", "original"] = [torch.tensor(paper)]
    holes = Protocol("original+gt_mask=paper", "paper", "original")
    assert judge([batch], 1, protocols=[holes])[holes.name].counts.tolist() == [[2, 4]]


@pytest.mark.parametrize("size", [(5, 7), (1, 1), (40, 33)])
def test_counts_are_what_pycocotools_says(size):
    source = np.random.default_rng(0)
    truths, predictions = source.integers(0, 2, (2, 6, *size))
    truths[0], predictions[1] = 0, 0
    result = judge([batch_of(range(6), truths.tolist(), predictions.tolist())], 6, batch_size=4)["paper"]
    as_rle = [[coco_mask.encode(np.asfortranarray(m, np.uint8)) for m in several] for several in (predictions, truths)]
    for k, (intersection, union) in enumerate(result.counts.tolist()):
        wanted = coco_mask.iou([as_rle[0][k]], [as_rle[1][k]], [0])[0, 0] if union else 0.0
        assert intersection / max(union, 1) == pytest.approx(wanted)
        assert union == coco_mask.area(coco_mask.merge([as_rle[0][k], as_rle[1][k]]))


def test_what_is_known_is_not_judged_again(monkeypatch):
    known = np.array([[0, 0, 7, 9]])
    reported, lines = [], []
    monkeypatch.setattr(lib.evaluation, "SECONDS_BETWEEN_LINES", -1)
    how = {"report": reported.extend, "report_masks": True, "progress": "val", "log": lines.append}
    result = judge([PERFECT, HALF], known=known, **how)["paper"]
    assert [line.split(", ")[0] for line in lines] == ["val: 2/3 expressions", "val: 3/3 expressions"]
    assert result.counts.tolist() == [[7, 9], *COUNTS[1:]]  # the batch held 0 for the sake of 1
    assert [(one.index, one.intersection, one.union) for one in reported] == [(2, 2, 2), (1, 0, 1)]
    assert all(decode_mask(one.mask).shape == (2, 2) for one in reported)
    assert judge([], known=np.array([[i, 0, *COUNTS[i]] for i in range(3)]))["paper"].counts.tolist() == COUNTS


def test_reports_come_by_the_clock_and_before_leaving(monkeypatch):
    batches = [batch_of([i], [[[1, 0]]], [[[1, 0]]]) for i in range(4)]
    reports = []
    monkeypatch.setattr(lib.evaluation, "SECONDS_BETWEEN_REPORTS", -1)  # every round
    judge(batches, 4, report=lambda new: reports.append([one.index for one in new]))
    assert reports == [[0], [1], [2], [3], []]
    monkeypatch.setattr(lib.evaluation, "SECONDS_BETWEEN_REPORTS", 1000)
    reports.clear()
    asked = iter([False, False, True])
    model = Echo().train()
    with pytest.raises(StoppedError):
        evaluate(
            model, batches, indices=range(4), batch_size=2, stop_requested=lambda: next(asked),
            report=lambda new: reports.append([one.index for one in new]),
        )  # fmt: skip
    assert reports == [[0, 1]]  # asked before the first batch, the second and the third
    assert model.training


def test_without_a_terminal_a_line_now_and_then(monkeypatch):
    monkeypatch.setattr(lib.evaluation, "SECONDS_BETWEEN_LINES", -1)
    lines = []
    judge([PERFECT, HALF], progress="val", log=lines.append)
    assert [line.split(", ")[0] for line in lines] == ["val: 1/3 expressions", "val: 3/3 expressions"]
    assert [line.split(", ")[2] for line in lines] == ["oIoU 100.00 so far", "oIoU 60.00 so far"]


def test_predict_at_another_size():
    images = torch.full((1, 3, 4, 4), -1.0)
    images[:, :, :2] = 1.0
    ids = torch.zeros(1, 3, dtype=torch.long)
    assert predict(Echo().eval(), images, ids, ids)[0].tolist() == [[True] * 4] * 2 + [[False] * 4] * 2
    mask = predict(Echo().eval(), images, ids, ids, size=(8, 6))[0]
    assert (mask.shape, mask.dtype) == ((8, 6), torch.bool)
    assert mask[:4].all()
    assert not mask[4:].any()


@pytest.fixture
def small_split(refshapes_root):
    tokenizer = read_vocabulary(refshapes_root / "refshapes" / "vocab.txt")
    return ReferDataset(REFER(refshapes_root, "refshapes"), "val", tokenizer, img_size=64)


def test_batch_limits_and_shared_pictures_change_nothing(small_model, small_split):
    """With weights whose masks have a structure: I and U within 2 pixels of each other, however it is computed."""
    model = small_model(vocab_size=200).eval()
    device, number, found = torch.device("cpu"), len(small_split), {}
    for limit, share in ((1, True), (3, True), (8, True), (8, False), (1000, True)):
        batches = build_eval_batches(small_split, device, batch_size=limit, workers=0, rank=0, world_size=1)
        how = {"indices": range(number), "batch_size": limit, "share_images": share}
        found[limit, share] = evaluate(model, batches, **how)["paper"].counts
    one_by_one = []
    with torch.inference_mode():  # the plainest way there is
        for index in range(number):
            sample = small_split[index]
            image = next(iter(build_eval_batches(
                small_split, device, batch_size=1, workers=0, rank=0, world_size=1, indices=[index]
            )))["image"]  # fmt: skip
            logits = model(image, sample["input_ids"][None], sample["attention_mask"][None]).mask_logits
            predicted, truth = logits[0].argmax(0).bool(), sample["mask"].bool()
            one_by_one.append([int((predicted & truth).sum()), int((predicted | truth).sum())])
    assert np.array(one_by_one)[:, 0].max() > 20
    for counts in found.values():
        assert np.abs(counts - one_by_one).max() <= 2


@pytest.mark.usefixtures("every_thread")
def test_shared_picture_work_keeps_the_golden_logits():
    """Both recorded pictures with all three recorded sentences at once: the pairs that were recorded come out alike."""
    recorded = np.load(ROOT / "tests" / "data" / "golden" / "eval_tiny_224.npz")["logits"]
    inputs = golden_inputs("eval_tiny_224", 3, 224, 224)
    model = set_golden_weights(build_crossvlt("tiny")).eval()
    pictures, sentences = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([0, 1, 1, 2, 2, 0])
    with torch.inference_mode():
        encoded = model.encode_images(inputs.images)[pictures]
        ids, text_mask = inputs.input_ids[sentences], inputs.attention_mask[sentences]
        logits = model.segment(encoded, ids, text_mask, size=(224, 224)).mask_logits.numpy()
    assert np.abs(logits[::2, :, ::8, ::8] - recorded).max() < 2e-4
    assert np.abs(logits[1::2, :, ::8, ::8] - recorded).max() > 0.1  # another sentence is another answer


def test_alignment_maps_are_the_models(small_model, small_inputs):
    model = small_model().eval()
    model.temp.data[:] = torch.tensor([0.1, 1, 2, 3])
    images, ids, text_mask, _ = small_inputs(2)
    maps = alignment_maps(model, images, ids, text_mask)
    with torch.inference_mode():
        wanted = model(images, ids, text_mask, return_similarities=True).similarities
    assert [[m.shape for m in one] for one in maps] == [[(16, 16), (8, 8), (4, 4), (2, 2)]] * 2
    for stage in range(4):
        assert np.abs(maps[1][stage] - wanted[stage][1, 0].numpy() * model.temp[stage].item()).max() < 1e-6
        assert np.abs(maps[1][stage]).max() <= 1 + 1e-6


@pytest.mark.parametrize(("threshold", "object_pixels"), [(None, 2), (0.2, 3), (0.5, 2), (0.85, 1), (0.999, 0)])
def test_thresholds_of_the_objects_probability(threshold, object_pixels):
    # Probabilities 0.88, 0.73, 0.27, 0.12: a difference of 2, 1, -1, -2 between the logits.
    difference = torch.tensor([[2.0, 1.0], [-1.0, -2.0]])
    logits = torch.stack([torch.zeros(2, 2), difference])[None]
    assert int(Protocol("p", threshold=threshold).predicted(logits, (2, 2)).sum()) == object_pixels
    reached = Protocol("p", threshold=torch.sigmoid(torch.tensor(1.0)).item()).predicted(logits, (2, 2))
    assert reached.tolist() == [[[True, True], [False, False]]]  # exactly there counts


def test_logits_are_resized_not_masks():
    logits = torch.randn(1, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    wanted = F.interpolate(logits, size=(9, 14), mode="bilinear", align_corners=False).argmax(1).bool()
    assert torch.equal(PAPER.predicted(logits, (9, 14)), wanted)


def test_metrics_of_a_result_are_those_of_its_counts():
    assert judge([HALF, PERFECT])["paper"].metrics == compute_metrics(COUNTS)
    assert ExpressionResult._fields == ("index", "protocol", "intersection", "union", "mask")

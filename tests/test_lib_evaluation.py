"""evaluate() compared with counts by hand and by pycocotools; masks of logits and alignment maps."""

import multiprocessing
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from golden_cases import golden_inputs, set_golden_weights
from PIL import Image
from pycocotools import mask as coco_mask

import lib.collector
import lib.evaluation
from bert.tokenization import read_vocabulary
from CrossVLT import CrossVLTOutput, build_crossvlt
from data.dataset_refer_bert import ReferDataset
from data.loaders import build_eval_batches
from data.transforms import resize_image
from lib.baselines import baseline_metrics
from lib.collector import ExpressionResult, ResultSink
from lib.errors import CommonError, StoppedError, UserError
from lib.evaluation import EvalSetup, alignment_maps, evaluate, logits_to_masks
from lib.metrics import compute_metrics
from lib.protocols import PAPER, PROTOCOLS, Protocol
from refer.masks import decode_mask, resize_mask
from refer.refer import REFER
from utils import Distributed, gc_paused

BOTH = [PROTOCOLS["paper"], PROTOCOLS["original"]]


class Echo(torch.nn.Module):
    """Predicts the bright pixels of an image as the object; counts the images that it encodes."""

    num_encoded = 0

    def encode_images(self, images):
        assert not torch.is_grad_enabled()
        assert not self.training
        self.num_encoded += len(images)
        return images[:, 0]

    def segment(self, encoded_images, input_ids, attention_mask, *, size):
        assert len(encoded_images) == len(input_ids)
        return CrossVLTOutput(torch.stack([-encoded_images, encoded_images], dim=1), None)

    def forward(self, images, input_ids, attention_mask):
        return self.segment(self.encode_images(images), input_ids, attention_mask, size=images.shape[-2:])


class Split:
    """Stand-in for ReferDataset with the attributes that evaluate() uses.

    Args:
        predictions: an image of 0 and 1 per image, which :class:`Echo` predicts as the mask.
        targets: a mask per expression, or a dict of masks by gt_mask.
        images: the image of each expression (default: one image each).
        objects: the object of each expression (default: one object each).
    """

    split = "val"

    def __init__(self, predictions, targets, images=None, objects=None, img_size=None):
        self.predictions, self.targets = np.array(predictions, np.uint8), targets
        self.img_size = img_size or self.predictions.shape[-1]
        indices = range(len(targets))
        self.expressions = [
            SimpleNamespace(image_id=image, ref_id=ref, sent_id=100 + index, sentence=f"sentence {index}")
            for index, image, ref in zip(indices, images or indices, objects or indices, strict=True)
        ]
        self.input_ids = self.attention_mask = torch.zeros(len(targets), 4, dtype=torch.long)

    def __len__(self):
        return len(self.targets)

    def input_image(self, index):
        image = Image.fromarray(255 * self.predictions[self.expressions[index].image_id]).convert("RGB")
        return resize_image(image, self.img_size)

    def target_mask(self, index, gt_mask="paper", eval_size="resized"):
        target = self.targets[index]
        mask = np.array(target[gt_mask] if isinstance(target, dict) else target, np.uint8)
        return torch.from_numpy(resize_mask(mask, self.img_size) if eval_size == "resized" else mask)


class Memory(ResultSink):
    """Keeps results in lists, one per call."""

    def __init__(self, earlier=()):
        self.earlier, self.calls = earlier, []

    def earlier_results(self, split):
        return self.earlier

    def write(self, dataset, results):
        self.calls.append([(result.index, result.intersection, result.union) for result in results])
        self.masks = [result.mask for result in results]


# Expression 0: half of the object is found. 1: a prediction for an empty target. 2: correct.
EXAMPLE = Split(
    predictions=[[[1, 0], [0, 0]], [[1, 1], [0, 0]]],
    targets=[[[1, 1], [0, 0]], [[0, 0], [0, 0]], [[1, 1], [0, 0]]],
    images=[0, 0, 1],
)
COUNTS = [[1, 2], [0, 1], [2, 2]]


def setup(batch_size=4, **options):
    return EvalSetup(Distributed(0, 0, 1, torch.device("cpu")), batch_size, **options)


def evaluate_echo(split, protocols=(PAPER,), batch_size=4, **options):
    return evaluate(Echo(), split, protocols, setup(batch_size), **options)


def test_pixels_are_counted_in_the_order_of_the_dataset():
    model = Echo().train()
    results = evaluate(model, EXAMPLE, [PAPER], setup(), keep_masks={0, 2})
    assert list(results) == ["paper"]
    result = results["paper"]
    assert result.indices.tolist() == [0, 1, 2]
    assert result.counts.tolist() == COUNTS
    assert result.metrics["mIoU"] == pytest.approx(50)
    assert result.metrics["oIoU"] == pytest.approx(60)
    assert [result.iou(index) for index in range(3)] == [0.5, 0, 1]
    assert set(result.masks) == {0, 2}
    assert decode_mask(result.masks[0]).tolist() == [[True, False], [False, False]]
    assert model.training  # restored
    assert result.metrics == compute_metrics(COUNTS)


def test_only_the_requested_expressions_are_evaluated():
    result = evaluate_echo(EXAMPLE, indices=[2, 0])["paper"]
    assert result.indices.tolist() == [0, 2]
    assert result.counts.tolist() == [COUNTS[0], COUNTS[2]]
    assert (result.iou(0), result.iou(2)) == (0.5, 1)


def test_the_iou_of_two_empty_masks_is_zero():
    result = evaluate_echo(Split([[[0, 0], [0, 0]]], [[[0, 0], [0, 0]], [[1, 1], [1, 1]]], images=[0, 0]))["paper"]
    assert result.counts.tolist() == [[0, 0], [0, 4]]
    assert set(result.metrics.values()) == {0.0}


def test_an_image_is_encoded_once_for_all_its_sentences():
    model = Echo()
    split = Split([[[1, 1], [0, 0]]], [[[1, 0], [0, 0]]] * 7, images=[0] * 7, objects=[0] * 7)
    assert evaluate(model, split, [PAPER], setup(3))["paper"].counts.tolist() == [[1, 2]] * 7
    assert model.num_encoded == 1


@pytest.mark.parametrize(
    ("evaluated", "message"),
    [
        ([[0, 1], [1, 2]], "1 was evaluated twice"),
        ([[0, 2]], "1 of 3 expressions were not"),
        ([[0, 3]], "not requested"),
    ],
)
def test_every_expression_is_evaluated_exactly_once(monkeypatch, evaluated, message):
    """Repeated, missing and unexpected expressions from the loader raise an error."""
    (batch,) = build_eval_batches(EXAMPLE, torch.device("cpu"), batch_size=4, workers=0, rank=0, world_size=1)
    batches = []
    for indices in evaluated:
        first = {name: value[: len(indices)] for name, value in batch.items() if name not in ("image", "targets")}
        batches.append({**batch, **first, "index": torch.tensor(indices)})
    monkeypatch.setattr(lib.evaluation, "build_eval_batches", lambda *_, **__: batches)
    with pytest.raises(RuntimeError, match=message):
        evaluate_echo(EXAMPLE)


def test_protocols_are_evaluated_from_the_same_logits():
    # The image is 2×4, for the model 2×2. The model predicts the left half. The two polygons of the object are the left
    # half and the first column: they overlap there.
    union, paper = [[1, 1, 0, 0]] * 2, [[0, 1, 0, 0]] * 2
    split = Split([union], [{"union": union, "paper": paper}], img_size=2)
    results = evaluate_echo(split, BOTH, keep_masks={0})
    assert results["paper"].counts.tolist() == [[2, 2]]
    assert results["original"].counts.tolist() == [[4, 4]]
    assert decode_mask(results["paper"].masks[0]).shape == (2, 2)
    assert not results["original"].masks  # masks are kept for the first protocol
    holes = Protocol("original+gt_mask=paper", "paper", "original")
    assert evaluate_echo(split, [holes])[holes.name].counts.tolist() == [[2, 4]]


@pytest.mark.parametrize("size", [5, 1, 40])
def test_counts_agree_with_pycocotools(size):
    source = np.random.default_rng(0)
    targets, predictions = source.integers(0, 2, (2, 6, size, size))
    targets[0], predictions[1] = 0, 0
    result = evaluate_echo(Split(predictions, list(targets)))["paper"]
    as_rle = [[coco_mask.encode(np.asfortranarray(m, np.uint8)) for m in masks] for masks in (predictions, targets)]
    for k, (intersection, union) in enumerate(result.counts.tolist()):
        expected = coco_mask.iou([as_rle[0][k]], [as_rle[1][k]], [0])[0, 0] if union else 0.0
        assert intersection / max(union, 1) == pytest.approx(expected)
        assert union == coco_mask.area(coco_mask.merge([as_rle[0][k], as_rle[1][k]]))


def test_earlier_results_are_not_computed_again(monkeypatch, caplog):
    monkeypatch.setattr(lib.collector, "SECONDS_BETWEEN_LINES", -1)
    caplog.set_level("DEBUG", "crossvlt")
    sink = Memory([ExpressionResult(0, "paper", 7, 9, None)])
    result = evaluate_echo(EXAMPLE, batch_size=2, sink=sink)["paper"]
    assert result.counts.tolist() == [[7, 9], *COUNTS[1:]]  # the batch contains 0 because of 1
    assert caplog.messages[0] == "val: continuing, 1 of 3 expressions are evaluated, 2 remain"
    assert [line.split(", ")[0] for line in caplog.messages[1:]] == ["val: 2/3 expressions", "val: 3/3 expressions"]
    assert sink.calls == [[(1, 0, 1), (2, 2, 2)]]
    assert all(decode_mask(mask).shape == (2, 2) for mask in sink.masks)
    model = Echo()
    complete = Memory([ExpressionResult(index, "paper", *COUNTS[index], None) for index in range(3)])
    assert evaluate(model, EXAMPLE, [PAPER], setup(), sink=complete)["paper"].counts.tolist() == COUNTS
    assert model.num_encoded == 0


def test_results_are_written_at_intervals_and_before_a_stop(monkeypatch):
    split = Split([[[1, 0], [0, 0]]] * 4, [[[1, 0], [0, 0]]] * 4)
    monkeypatch.setattr(lib.collector, "SECONDS_BETWEEN_WRITES", -1)  # after every batch
    sink = Memory()
    evaluate_echo(split, batch_size=1, sink=sink)
    assert [[index for index, *_ in call] for call in sink.calls] == [[0], [1], [2], [3], []]
    monkeypatch.setattr(lib.collector, "SECONDS_BETWEEN_WRITES", 1000)
    answers = iter([False, False, True])  # before the first, second and third batch
    model, sink = Echo().train(), Memory()
    with pytest.raises(StoppedError, match="Stopped while evaluating split val"):
        evaluate(model, split, [PAPER], setup(1, stop_requested=lambda: next(answers)), sink=sink)
    assert [[index for index, *_ in call] for call in sink.calls] == [[0, 1]]
    assert model.training


def test_progress_is_logged_without_a_terminal(monkeypatch, caplog):
    monkeypatch.setattr(lib.collector, "SECONDS_BETWEEN_LINES", -1)
    caplog.set_level("DEBUG", "crossvlt")
    evaluate_echo(EXAMPLE, batch_size=2)
    assert [line.split(", ")[0] for line in caplog.messages] == ["val: 2/3 expressions", "val: 3/3 expressions"]
    assert [line.split(", ")[2] for line in caplog.messages] == ["oIoU 33.33 so far", "oIoU 60.00 so far"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_logits_are_an_error_that_names_the_expression(value):
    class Diverged(Echo):
        def segment(self, encoded_images, input_ids, attention_mask, *, size):
            output = super().segment(encoded_images, input_ids, attention_mask, size=size)
            output.mask_logits[-1, 1, 0, 0] = value
            return output

    sink = Memory()
    message = r"logits of expression 2 of split val are inf or nan \(sent_id 102, 'sentence 2'\)"
    with pytest.raises(CommonError, match=message):
        evaluate(Diverged(), EXAMPLE, [PAPER], setup(3), sink=sink)
    assert sink.calls == [[]]


def test_an_unreadable_image_ends_the_workers_and_keeps_earlier_results(monkeypatch):
    split = Split([[[1, 0], [0, 0]]] * 4, [[[1, 0], [0, 0]]] * 4)

    def input_image(index):
        if index == 2:
            raise UserError("Cannot decode image 2.jpg.")
        return Split.input_image(split, index)

    monkeypatch.setattr(split, "input_image", input_image, raising=False)
    for workers in (0, 1):
        sink = Memory()
        with gc_paused(), pytest.raises(CommonError, match=r"^Cannot decode image 2\.jpg\.$"):
            evaluate(Echo(), split, [PAPER], setup(1, workers=workers), sink=sink)
        assert [[index for index, *_ in call] for call in sink.calls] == [[0, 1]]
        assert not multiprocessing.active_children()


def test_masks_at_another_size():
    images = torch.full((1, 3, 4, 4), -1.0)
    images[:, :, :2] = 1.0
    ids = torch.zeros(1, 3, dtype=torch.long)
    with torch.inference_mode():
        logits = Echo().eval().segment(Echo().eval().encode_images(images), ids, ids, size=(4, 4)).mask_logits
    assert logits_to_masks(logits, (4, 4), PAPER)[0].tolist() == [[True] * 4] * 2 + [[False] * 4] * 2
    mask = logits_to_masks(logits, (8, 6), PAPER)[0]
    assert (mask.shape, mask.dtype) == ((8, 6), torch.bool)
    assert mask[:4].all()
    assert not mask[4:].any()


def test_batch_size_and_shared_encoding_change_nothing(small_model, refshapes_root):
    """Intersections and unions differ by at most 2 pixels from those of one forward pass per expression."""
    tokenizer = read_vocabulary(refshapes_root / "refshapes" / "vocab.txt")
    split = ReferDataset(REFER(refshapes_root, "refshapes"), "val", tokenizer, img_size=64)
    model = small_model(vocab_size=200).eval()
    one_by_one = []
    with torch.inference_mode():
        for index in range(len(split)):
            sample = split[index]
            (batch,) = build_eval_batches(
                split, torch.device("cpu"), batch_size=1, workers=0, rank=0, world_size=1, indices=[index]
            )
            ids, attention_mask = sample["input_ids"][None], sample["attention_mask"][None]
            logits = model(batch["image"], ids, attention_mask).mask_logits
            predicted, target = logits[0].argmax(0).bool(), sample["mask"].bool()
            one_by_one.append([int((predicted & target).sum()), int((predicted | target).sum())])
    assert np.array(one_by_one)[:, 0].max() > 20
    for batch_size in (1, 3, 8, 1000):
        counts = evaluate(model, split, [PAPER], setup(batch_size))["paper"].counts
        assert np.abs(counts - one_by_one).max() <= 2


@pytest.mark.usefixtures("all_threads")
def test_shared_encoding_keeps_the_golden_logits():
    """The recorded logits stay the same when each image is evaluated with two sentences at once."""
    recorded = np.load(ROOT / "tests" / "data" / "golden" / "eval_tiny_224.npz")["logits"]
    inputs = golden_inputs("eval_tiny_224", 3, 224, 224)
    model = set_golden_weights(build_crossvlt("tiny")).eval()
    images, sentences = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([0, 1, 1, 2, 2, 0])
    with torch.inference_mode():
        encoded = model.encode_images(inputs.images)[images]
        ids, attention_mask = inputs.input_ids[sentences], inputs.attention_mask[sentences]
        logits = model.segment(encoded, ids, attention_mask, size=(224, 224)).mask_logits.numpy()
    assert np.abs(logits[::2, :, ::8, ::8] - recorded).max() < 2e-4
    assert np.abs(logits[1::2, :, ::8, ::8] - recorded).max() > 0.1  # the other sentences change the prediction


def test_alignment_maps_are_cosines(small_model, small_inputs):
    model = small_model().eval()
    model.temp.data[:] = torch.tensor([0.1, 1, 2, 3])
    images, ids, attention_mask, _ = small_inputs(2)
    maps = alignment_maps(model, images, ids, attention_mask)
    with torch.inference_mode():
        expected = model(images, ids, attention_mask, return_similarities=True).similarities
    assert [[m.shape for m in of_sentence] for of_sentence in maps] == [[(16, 16), (8, 8), (4, 4), (2, 2)]] * 2
    for stage in range(4):
        assert np.abs(maps[1][stage] - expected[stage][1, 0].numpy() * model.temp[stage].item()).max() < 1e-6
        assert np.abs(maps[1][stage]).max() <= 1 + 1e-6


@pytest.mark.parametrize(("threshold", "object_pixels"), [(None, 2), (0.2, 3), (0.5, 2), (0.85, 1), (0.999, 0)])
def test_threshold_of_the_object_probability(threshold, object_pixels):
    # Probabilities 0.88, 0.73, 0.27, 0.12: a difference of 2, 1, -1, -2 between the logits.
    difference = torch.tensor([[2.0, 1.0], [-1.0, -2.0]])
    logits = torch.stack([torch.zeros(2, 2), difference])[None]
    assert int(logits_to_masks(logits, (2, 2), Protocol("p", threshold=threshold)).sum()) == object_pixels
    equal = logits_to_masks(logits, (2, 2), Protocol("p", threshold=torch.sigmoid(torch.tensor(1.0)).item()))
    assert equal.tolist() == [[[True, True], [False, False]]]  # a probability equal to the threshold counts


def test_logits_are_resized_not_masks():
    logits = torch.randn(1, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(logits, size=(9, 14), mode="bilinear", align_corners=False).argmax(1).bool()
    assert torch.equal(logits_to_masks(logits, (9, 14)), expected)


def test_baselines_by_hand():
    # One image of 16 pixels, three expressions: one of object b (2 pixels), two of object a (4 other pixels).
    a, b = np.zeros((4, 4)), np.zeros((4, 4))
    a[0], b[1, :2] = 1, 1
    values = baseline_metrics(Split([a], [b, a, a], images=[0] * 3, objects=["b", "a", "a"]), PAPER)
    assert values["all foreground"]["mIoU"] == pytest.approx(100 * (2 + 4 + 4) / 16 / 3)
    assert values["all foreground"]["oIoU"] == pytest.approx(100 * 10 / 48)
    assert values["best object"]["mIoU"] == pytest.approx(100 * 2 / 3)
    assert values["best object"]["oIoU"] == pytest.approx(100 * 8 / (6 + 4 + 4))

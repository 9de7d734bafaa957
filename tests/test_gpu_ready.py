"""The network, the losses, a training step and evaluation on fake CUDA tensors: no CPU tensor, few synchronizations."""

import itertools

import pytest
import torch
from fake_gpu import GPU, fake_gpu, move_to_gpu
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._pytree import tree_leaves

import lib.evaluation
from bert.tokenization import read_vocabulary
from data.dataset_refer_bert import ReferDataset
from data.image_batches import ImageBatches
from data.loaders import DeviceBatches
from data.transforms import normalize_images
from lib.collector import ResultSink
from lib.config import DEFAULTS
from lib.criterion import CrossVLTCriterion
from lib.engine.loop import optimizer_step
from lib.engine.state import build_train_state
from lib.evaluation import EvalSetup, alignment_maps, evaluate, logits_to_masks
from lib.inference import prepare
from lib.precision import AMP_DTYPES, autocast
from lib.protocols import PAPER, PROTOCOLS, Protocol
from lib.variants import FUSIONS
from refer.masks import decode_mask
from refer.refer import REFER
from utils import Distributed

PRECISIONS = tuple(AMP_DTYPES)


@pytest.fixture
def watched(monkeypatch):
    """Run a test with fake CUDA tensors. ``with watched() as watch:`` checks the operations of the block."""
    with fake_gpu(monkeypatch) as watch:
        yield watch


@pytest.fixture
def gpu_model(small_model, watched):
    """Return a function that builds a small model on the CPU and replaces its tensors by fake CUDA ones."""

    def build(**changes):
        with unset_fake_temporarily():
            model = small_model(**changes)
        return move_to_gpu(model)

    return build


@pytest.fixture
def gpu_inputs(watched):
    """Images, input_ids, attention_mask and masks of two samples."""
    ids = torch.ones(2, 7, dtype=torch.long, device=GPU)
    masks = torch.ones(2, 64, 64, dtype=torch.long, device=GPU)
    return torch.ones(2, 3, 64, 64, device=GPU), ids, torch.ones_like(ids), masks


def as_batch(images, ids, text_mask, masks):
    return {"image": images, "input_ids": ids, "attention_mask": text_mask, "mask": masks, "index": range(len(ids))}


@pytest.mark.parametrize(
    "use_cpu",
    [
        lambda x: torch.zeros(2) + 1,
        lambda x: x.index_select(0, torch.tensor([0], device=x.device)),
        lambda x: x * torch.tensor([1.0, 2.0]).to(x.device),
        lambda x: x[torch.tensor([0, 1])],
        lambda x: torch.tensor([1, 2], device=x.device),
    ],
)
def test_the_check_finds_cpu_tensors(watched, use_cpu):
    x = torch.ones(2, device=GPU)
    with pytest.raises(AssertionError, match=r"CPU tensors|host's memory"), watched():
        use_cpu(x)


def test_the_check_counts_copies(watched):
    x, on_cpu = torch.ones(2, device=GPU), torch.zeros(2)
    with watched() as watch:
        assert x.tolist() == [1, 1]
        assert x.cpu().device.type == "cpu"
        assert x.sum() < 0  # every value that the host reads is 1
        assert on_cpu.to(GPU).device == GPU
        assert (x * torch.tensor(2.0)).device == GPU  # allowed by PyTorch
    assert (watch.fetches, watch.uploads) == (3, 1)


@pytest.mark.parametrize(("fusion", "amp", "training"), list(itertools.product(FUSIONS, PRECISIONS, (False, True))))
def test_forward_pass_and_losses(watched, gpu_model, gpu_inputs, fusion, amp, training):
    model = gpu_model(fusion=fusion).train(training)
    images, ids, text_mask, masks = gpu_inputs
    last_outputs = []
    model.classifier.conv1_1.register_forward_hook(lambda *call: last_outputs.append(call[-1]))
    with watched() as watch:
        with autocast(amp, GPU):
            encoded = model.encode_images(images)
            output = model.segment(encoded, ids, text_mask, size=(64, 64), return_similarities=True)
        losses = CrossVLTCriterion()(output, masks)
        CrossVLTCriterion(alignment=False)(output, masks, 1000.0)
    assert (watch.fetches, watch.uploads) == (0, 0)
    assert {last.dtype for last in last_outputs} == {AMP_DTYPES[amp] or torch.float32}
    assert {x.device for x in (output.mask_logits, *output.similarities, *losses.values())} == {GPU}
    assert {term.dtype for term in losses.values()} == {torch.float32}


@pytest.mark.parametrize(("fusion", "amp"), list(itertools.product(FUSIONS, PRECISIONS)))
def test_a_prepared_model(watched, gpu_model, gpu_inputs, fusion, amp):
    model, (images, ids, text_mask, _) = gpu_model(fusion=fusion).eval(), gpu_inputs
    with watched() as watch, torch.inference_mode():
        prepared = prepare(model, amp=amp)
        output = prepared(images, ids, text_mask, return_similarities=True)
    assert (watch.fetches, watch.uploads) == (0, 0)
    assert {x.device for x in (output.mask_logits, *output.similarities)} == {GPU}


def test_normalization(watched):
    with watched() as watch:
        images = normalize_images(torch.ones(2, 3, 64, 64, dtype=torch.uint8, device=GPU))
    assert (images.dtype, images.device) == (torch.float32, GPU)
    assert (watch.fetches, watch.uploads) == (0, 0)


@pytest.mark.parametrize(("amp", "global_norm"), [("off", False), ("bf16", True), ("fp16", False)])
def test_a_training_step_synchronizes_once(watched, gpu_model, gpu_inputs, monkeypatch, amp, global_norm):
    """A whole step without the backward pass, which needs a real GPU. GLOBAL_NORM synchronizes twice."""
    recipe = DEFAULTS.TRAIN.clone()
    recipe.AMP, recipe.GLOBAL_NORM, recipe.CLIP_GRAD, recipe.STEPS = amp, global_norm, 1.0, 10
    recipe.EMA = 0.9
    state = build_train_state(gpu_model(), recipe, steps_per_epoch=10)
    assert all(group["fused"] for group in state.optimizer.param_groups)

    def backward(loss):
        assert (loss.dtype, loss.device) == (torch.float32, GPU)
        for parameter in state.model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.ones_like(parameter)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    batches = [as_batch(*gpu_inputs)] * 2
    with watched():
        optimizer_step(state.model, CrossVLTCriterion(), batches, state)  # creates the optimizer's state
    with watched() as watch:
        values = optimizer_step(state.model, CrossVLTCriterion(), batches, state)
    assert values.keys() >= {"loss", "alignment4", "grad_norm", "lr"}
    assert watch.fetches == 1 + global_norm
    assert watch.uploads == 0


class Sink(ResultSink):
    """Requests all masks."""

    def earlier_results(self, split):
        return []

    def write(self, dataset, results):
        self.results = results


ALL_PROTOCOLS = (*PROTOCOLS.values(), Protocol("threshold", threshold=0.3))


@pytest.mark.parametrize(
    ("protocols", "with_masks"), [((PAPER,), False), (ALL_PROTOCOLS, False), ((PAPER,), True), (ALL_PROTOCOLS, True)]
)
def test_evaluation_reads_the_device_once_per_batch(
    watched, gpu_model, refshapes_root, monkeypatch, protocols, with_masks
):
    """It reads the device once more per batch if masks are requested."""
    with unset_fake_temporarily():
        tokenizer = read_vocabulary(refshapes_root / "refshapes" / "vocab.txt")
        split = ReferDataset(REFER(refshapes_root, "refshapes"), "val", tokenizer, img_size=64)
        targets, indices = [protocol.target_key for protocol in protocols], [0, 1, 2, len(split) - 1]
        batches = list(ImageBatches(split, 3, targets, indices))
        assert len(batches) == 2
        own_sizes = {index: split.full_size_mask(index).shape for index in indices}
    monkeypatch.setattr(lib.evaluation, "build_eval_batches", lambda *_, **__: DeviceBatches(batches, GPU))
    sink = Sink() if with_masks else None
    model, setup = gpu_model(vocab_size=200), EvalSetup(Distributed(0, 0, 1, GPU), batch_size=2)
    with watched() as watch:
        results = evaluate(model, split, protocols, setup, indices=indices, sink=sink)
    assert {tuple(row) for result in results.values() for row in result.counts.tolist()} == {(1, 1)}
    assert watch.fetches == len(batches) * (1 + with_masks)
    tensors = [item for batch in batches for item in tree_leaves(batch) if isinstance(item, torch.Tensor)]
    assert watch.uploads == len(tensors) - 2 * len(batches)  # all but index and object_index
    if with_masks:
        assert {result.index for result in sink.results} == set(indices)
        for result in sink.results:
            mask = decode_mask(result.mask)
            assert mask.shape == (own_sizes[result.index] if result.protocol == "original" else (64, 64))
            assert mask.ravel()[7::8].all()  # of every byte, the last bit
            assert mask.sum() == mask.size // 8


def test_masks_and_alignment_maps(watched, gpu_model, gpu_inputs):
    model, (images, ids, text_mask, _) = gpu_model().eval(), gpu_inputs
    with watched() as watch:
        with torch.inference_mode():
            masks = logits_to_masks(model(images, ids, text_mask).mask_logits, (50, 70), PROTOCOLS["paper"])
        assert (watch.fetches, watch.uploads) == (0, 0)
        maps = alignment_maps(model, images, ids, text_mask)
    assert (masks.device, masks.shape) == (GPU, (2, 50, 70))
    assert [[m.shape for m in of_sentence] for of_sentence in maps] == [[(16, 16), (8, 8), (4, 4), (2, 2)]] * 2
    assert (watch.fetches, watch.uploads) == (4, 0)

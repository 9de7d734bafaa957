"""Samples and loaders: preprocessing, drawing of sentences, division among processes, shared memory, bad images."""

import collections
import os
import pickle
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from PIL import Image

from bert.tokenization import read_vocabulary
from data.dataset_refer_bert import ReferDataset, SharedList
from data.image_batches import ImageBatches
from data.loaders import TrainBatchSampler, build_eval_batches, build_train_loader
from data.transforms import normalize_images, preprocess_image, read_image, resize_image
from lib.errors import UserError
from refer.datasets import IMAGE_FORMATS
from refer.masks import resize_mask
from refer.refer import REFER


@pytest.fixture
def refer(refshapes_root):
    return REFER(refshapes_root, "refshapes")


@pytest.fixture
def make_dataset(refshapes_root, refer):
    def make(split="val", **kwargs):
        tokenizer = read_vocabulary(refshapes_root / "refshapes" / "vocab.txt")
        return ReferDataset(refer, split, tokenizer, **{"img_size": 48, **kwargs})

    return make


def test_preprocessing_equals_numpy_arithmetic():
    generator = np.random.default_rng(0)
    image = Image.fromarray(generator.integers(0, 256, (37, 53, 3), dtype=np.uint8))
    actual = preprocess_image(image, 24)
    resized = np.asarray(image.resize((24, 24), Image.Resampling.BILINEAR), dtype=np.float32) / 255
    expected = (resized - np.float32([0.485, 0.456, 0.406])) / np.float32([0.229, 0.224, 0.225])
    assert (actual.dtype, actual.shape) == (torch.float32, (3, 24, 24))
    assert np.abs(actual.numpy() - expected.transpose(2, 0, 1)).max() < 1e-6
    mask = generator.integers(0, 2, (37, 53), dtype=np.uint8)
    assert resize_mask(mask, 24).dtype == np.uint8
    expected = np.asarray(Image.fromarray(mask).resize((24, 24), Image.Resampling.NEAREST))
    assert np.array_equal(resize_mask(mask, 24), expected)


@pytest.mark.parametrize("draw_seed", [None, 0])
def test_a_sample_equals_the_files(make_dataset, refer, draw_seed):
    dataset = make_dataset(draw_seed=draw_seed)
    index = len(dataset) // 2
    sample, expression = dataset[index], dataset.expressions[dataset.expression_of(index)]
    ref = refer.loadRefs(expression.ref_id)[0]
    assert (expression.ann_id, expression.image_id) == (ref["ann_id"], ref["image_id"])
    image = read_image(refer.get_image_path(ref["image_id"]))
    assert torch.equal(sample["image"], resize_image(image, 48))
    assert torch.equal(normalize_images(sample["image"]), preprocess_image(image, 48))
    assert np.array_equal(sample["mask"].numpy(), resize_mask(refer.getMask(ref)["mask"], 48))
    assert sample["mask"].dtype == torch.uint8
    assert expression.sentence in [sentence["raw"] for sentence in ref["sentences"]]
    vocabulary = (refer.instances_path.parent / "vocab.txt").read_text().splitlines()
    words = [vocabulary[i] for i in sample["input_ids"][sample["attention_mask"] == 1]]
    assert words == ["[CLS]", *expression.sentence.split(), "[SEP]"]
    assert sample["input_ids"].shape == sample["attention_mask"].shape == (21,)
    assert sample["index"] == index


def test_evaluation_has_a_sample_per_sentence_and_training_one_per_ref(make_dataset, refer):
    refs = refer.loadRefs(refer.getRefIds(split="val"))
    sentences = [(ref["ref_id"], s["sent_id"]) for ref in refs for s in ref["sentences"]]
    assert [(e.ref_id, e.sent_id) for e in make_dataset().expressions] == sentences
    assert len(make_dataset()) == len(sentences)
    drawn = make_dataset(draw_seed=0)
    assert len(drawn) == len(refs)
    assert [drawn.expressions[drawn.expression_of(i)].ref_id for i in range(len(drawn))] == [r["ref_id"] for r in refs]


def test_drawn_sentences_are_a_function_of_seed_epoch_and_index(make_dataset):
    def draws(seed, epoch):
        dataset = make_dataset("train", draw_seed=seed)
        dataset.set_epoch(epoch)
        return [dataset.expression_of(index) for index in range(len(dataset))]

    assert draws(0, 0) == draws(0, 0)
    assert draws(0, 0) != draws(0, 1)
    assert draws(0, 0) != draws(1, 0)


def test_sentences_are_drawn_uniformly(make_dataset, refer):
    dataset = make_dataset("train", draw_seed=0)
    sizes = [len(ref["sentences"]) for ref in refer.loadRefs(refer.getRefIds(split="train"))]
    index = int(np.argmax(sizes))
    counts = collections.Counter()
    for epoch in range(600):
        dataset.set_epoch(epoch)
        counts[dataset.expression_of(index)] += 1
    assert len(counts) == sizes[index] > 1
    assert min(counts.values()) > 0.75 * 600 / sizes[index]


def test_running_workers_see_a_new_epoch(make_dataset):
    dataset = make_dataset("train", draw_seed=0)
    loader = torch.utils.data.DataLoader(dataset, batch_size=4, num_workers=1, persistent_workers=True)
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        actual = torch.cat([batch["input_ids"] for batch in loader])
        expected = dataset.input_ids[[dataset.expression_of(i) for i in range(len(dataset))]]
        assert torch.equal(actual, expected.long())


def test_shuffling_only_changes_which_object_a_sentence_belongs_to(make_dataset):
    plain, shuffled = make_dataset(), make_dataset(shuffle_seed=0)
    assert sorted(e.sentence for e in plain.expressions) == sorted(e.sentence for e in shuffled.expressions)
    assert [e[:3] for e in plain.expressions] == [e[:3] for e in shuffled.expressions]
    moved = sum(a != b for a, b in zip(plain.expressions, shuffled.expressions, strict=True))
    assert moved > len(plain) / 2
    assert list(make_dataset(shuffle_seed=0).expressions) == list(shuffled.expressions)


def batches_of(dataset, batch_size, *, rank=0, world_size=1, **kwargs):
    kwargs = {"batch_size": batch_size, "workers": 0, "rank": rank, "world_size": world_size, **kwargs}
    return list(build_eval_batches(dataset, torch.device("cpu"), **kwargs))


@pytest.mark.parametrize(("batch_size", "world_size"), [(1, 1), (3, 2), (8, 3), (1000, 2)])
def test_each_expression_is_in_one_process_and_each_image_in_one_batch(make_dataset, batch_size, world_size):
    dataset = make_dataset()
    shares = [batches_of(dataset, batch_size, rank=rank, world_size=world_size) for rank in range(world_size)]
    batches = [batch["index"].tolist() for share in shares for batch in share]
    assert sorted(index for batch in batches for index in batch) == list(range(len(dataset)))
    alone = [batch["index"].tolist() for batch in batches_of(dataset, batch_size)]
    assert sorted(batches) == sorted(alone)  # a batch's content does not depend on the number of processes
    images = [{dataset.expressions[index].image_id for index in batch} for batch in batches]
    assert sum(map(len, images)) == len({e.image_id for e in dataset.expressions})
    for batch, image_ids in zip(batches, images, strict=True):
        assert len(batch) <= batch_size or len(image_ids) == 1


def test_a_batch_of_images_equals_its_samples(make_dataset, refer):
    dataset, targets = make_dataset(), [("paper", "resized"), ("union", "original")]
    loaded = []
    dataset.load_image = lambda index: loaded.append(index) or ReferDataset.load_image(dataset, index)
    batches = batches_of(dataset, 30, targets=targets)
    assert len(loaded) == 7  # each image once
    for batch in batches:
        for row, index in enumerate(batch["index"].tolist()):
            sample = ReferDataset.__getitem__(make_dataset(), index)
            assert torch.equal(batch["image"][batch["image_index"][row]], normalize_images(sample["image"]))
            for name in ("input_ids", "attention_mask"):
                assert torch.equal(batch[name][row], sample[name])
            masks = {kind: batch["targets"][kind][batch["object_index"][row]] for kind in targets}
            assert torch.equal(masks["paper", "resized"], sample["mask"])
            ref_id = dataset.expressions[index].ref_id
            assert np.array_equal(masks["union", "original"].numpy(), refer.getMask(ref_id, "union")["mask"])


def test_batches_whose_results_exist_are_left_out(make_dataset):
    dataset = make_dataset()
    batches = ImageBatches(dataset, 4).batches
    assert len(batches[1]) > 1
    evaluated = {*batches[0], *batches[2], batches[1][0]}  # batch 1 is incomplete, so it is evaluated again
    assert ImageBatches(dataset, 4, evaluated=evaluated).batches == [batches[1], *batches[3:]]


def test_only_the_requested_expressions_are_evaluated(make_dataset):
    batches = ImageBatches(make_dataset(), 4, indices=[3, 5, 1, 3]).batches
    assert sorted(index for batch in batches for index in batch) == [1, 3, 5]


def train_order(rank=0, epoch=0, first_step=0, world_size=2, batch_size=3, accum_steps=1):
    """Return the micro-batches of one process for 20 samples."""
    sampler = TrainBatchSampler(20, batch_size, accum_steps=accum_steps, rank=rank, world_size=world_size, seed=0)
    sampler.set_position(epoch, first_step)
    batches = list(sampler)
    assert len(sampler) == len(batches)
    return batches


def test_training_samples_are_divided_among_processes_and_shuffled_in_each_epoch():
    assert [len(batch) for batch in train_order()] == [3, 3, 3]  # samples that do not fill a step are dropped
    first, second = ({i for batch in train_order(rank) for i in batch} for rank in (0, 1))
    assert not first & second
    assert train_order() == train_order() != train_order(epoch=1)


def test_a_step_has_the_same_samples_however_they_are_divided():
    def steps(world_size, batch_size, accum_steps):
        shares = [
            train_order(rank, 3, world_size=world_size, batch_size=batch_size, accum_steps=accum_steps)
            for rank in range(world_size)
        ]
        number = len(shares[0]) // accum_steps
        return [
            sorted(i for share in shares for batch in share[k * accum_steps : (k + 1) * accum_steps] for i in batch)
            for k in range(number)
        ]

    whole = steps(1, 4, 1)
    assert len(whole) == 5
    for division in ((2, 2, 1), (1, 2, 2), (1, 1, 4), (4, 1, 1), (2, 1, 2)):
        assert steps(*division) == whole


def test_an_epoch_can_be_resumed_at_any_step():
    whole = train_order(epoch=2, accum_steps=2, batch_size=2)
    assert len(whole) == 4
    for first_step in (0, 1, 2):
        rest = train_order(epoch=2, first_step=first_step, accum_steps=2, batch_size=2)
        assert rest == whole[2 * first_step :]


def train_loader(dataset, **kwargs):
    kwargs = {"batch_size": 3, "accum_steps": 2, "workers": 0, "rank": 0, "world_size": 1, "seed": 0, **kwargs}
    return build_train_loader(dataset, torch.device("cpu"), **kwargs)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_training_step_is_a_list_of_normalized_micro_batches(make_dataset, workers):
    dataset = make_dataset(draw_seed=0)
    loader = train_loader(dataset, workers=workers)
    steps = list(loader.steps(epoch=1))
    assert len(steps) == loader.steps_per_epoch == len(dataset) // 6
    assert [len(step) for step in steps] == [2] * len(steps)
    sampler = TrainBatchSampler(len(dataset), 3, accum_steps=2, rank=0, world_size=1, seed=0)
    sampler.set_position(epoch=1)
    micro_batches = [micro_batch for step in steps for micro_batch in step]
    assert [batch["index"].tolist() for batch in micro_batches] == list(sampler)
    for batch in micro_batches:
        indices = batch["index"].tolist()
        assert torch.equal(batch["image"], torch.stack([preprocess_image(dataset.load_image(i), 48) for i in indices]))
        assert torch.equal(batch["input_ids"], torch.stack([dataset[i]["input_ids"] for i in indices]))  # epoch 1's
        assert (batch["mask"].dtype, batch["mask"].shape) == (torch.int64, (3, 48, 48))
    (last,) = loader.steps(epoch=1, start=len(steps) - 1)
    for batch, before in zip(last, steps[-1], strict=True):
        assert all(torch.equal(batch[name], before[name]) for name in before)


def test_too_few_training_samples_for_one_step_are_reported(make_dataset):
    dataset = make_dataset(draw_seed=0)
    with pytest.raises(UserError) as caught:
        train_loader(dataset, batch_size=len(dataset), world_size=2)
    assert str(caught.value) == (
        f"{len(dataset)} training samples are not enough for one optimizer step of 2 process(es) × {len(dataset)} × "
        "2 accumulated. Lower --batch-size."
    )


def test_missing_images_are_reported_before_the_first_sample(make_dataset, tmp_path):
    dataset = make_dataset()
    dataset.check_images()
    missing = {dataset.image_path(0), dataset.image_path(len(dataset) - 1)}
    for path in dataset.image_dir.iterdir():
        if path not in missing:
            (tmp_path / path.name).symlink_to(path)
    dataset.image_dir = tmp_path
    with pytest.raises(UserError, match=r"2 of the 7 images of split val are missing, for example .*\.jpg\. See"):
        dataset.check_images()


def test_errors_about_missing_and_corrupt_images_name_the_file(tmp_path):
    path = tmp_path / "corrupt.jpg"
    with pytest.raises(UserError, match=r"^No such image: .*corrupt\.jpg\.$"):
        read_image(path)
    Image.effect_noise((64, 64), 50).convert("RGB").save(path)
    whole = path.read_bytes()
    for content in (b"", b"not an image", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"^Cannot decode image .*corrupt\.jpg: "):
            read_image(path)


@pytest.mark.parametrize("image_format", IMAGE_FORMATS)
def test_the_documented_formats_are_read(tmp_path, image_format):
    Image.new("RGB", (64, 48), "red").save(tmp_path / "image.jpg", image_format)
    assert read_image(tmp_path / "image.jpg").size == (64, 48)


@pytest.mark.parametrize("image_format", ["EPS", "PDF", "ICO"])
def test_other_formats_are_not_opened(tmp_path, image_format):
    """For an EPS, Pillow would start Ghostscript."""
    Image.new("RGB", (64, 48)).save(tmp_path / "image.jpg", image_format)
    with pytest.raises(UserError, match=r"^Cannot decode image .*image\.jpg: it is not a JPEG, PNG, .* or PPM file\.$"):
        read_image(tmp_path / "image.jpg")


def test_a_fifo_is_not_opened(tmp_path):
    """Opening it would wait for a writer."""
    os.mkfifo(tmp_path / "image.jpg")
    with pytest.raises(UserError, match=r"^Cannot decode image .*image\.jpg: it is not a regular file\.$"):
        read_image(tmp_path / "image.jpg")


def test_an_image_whose_size_differs_from_its_annotation_is_reported(tmp_path, make_dataset):
    dataset = make_dataset()
    other = tmp_path / dataset.image_path(0).name
    Image.new("RGB", (11, 13)).save(other)
    dataset.image_dir = tmp_path
    with pytest.raises(UserError, match=rf"{other.name} is 11×13, but its annotation says \d+×\d+"):
        dataset[0]


def test_gray_transparent_and_cmyk_images_are_converted_to_rgb(tmp_path):
    for mode in ("L", "RGBA", "P", "CMYK", "LA"):
        Image.new(mode, (5, 4)).save(tmp_path / "image.tiff")
        assert read_image(tmp_path / "image.tiff").mode == "RGB"


@pytest.mark.parametrize(
    ("dtype", "kind"), [(np.uint16, "16-bit image (mode I;16)"), (np.float32, "32-bit image (mode F)")]
)
def test_images_of_more_than_8_bits_per_channel_are_rejected(tmp_path, dtype, kind):
    """Pillow would clip their values at 255, so they would be nearly white or nearly black."""
    path = tmp_path / "deep.tiff"
    Image.fromarray(np.linspace(0, 1, 80).reshape(8, 10).astype(dtype)).save(path)
    with pytest.raises(UserError) as caught:
        read_image(path)
    assert str(caught.value) == f"{path} is a {kind}. Convert it to 8 bits per channel."


def test_a_shared_list_returns_equal_items():
    items = [(), (1, -(2**70), 0.1, float("inf"), None, True), ("naïve", [[1, 2.5], {"counts": "a\0b"}])]
    shared = SharedList(items)
    assert list(shared) == items
    assert [shared[0], shared[1], shared[-1]] == items
    assert len(shared) == 3
    for index in (3, -4):
        with pytest.raises(IndexError):
            shared[index]
    assert list(SharedList([])) == []


def tensors_of(value):
    """Return all tensors in an object's attributes."""
    if isinstance(value, torch.Tensor):
        return [value]
    attributes = vars(value).values() if hasattr(value, "__dict__") else ()
    return [tensor for attribute in attributes for tensor in tensors_of(attribute)]


def test_workers_share_annotations_and_tokens(make_dataset):
    """All data that grows with the split is in shared tensors, for forked and for spawned workers."""
    dataset = make_dataset("train", draw_seed=0)
    samples = [dataset[index] for index in range(3)]
    pickled = bytes(ForkingPickler.dumps(dataset))  # sent to a new worker; contains handles instead of tensors
    tensors = tensors_of(dataset)
    assert all(tensor.is_shared() for tensor in tensors)
    assert sum(tensor.numel() for tensor in tensors) > 20_000
    assert len(pickled) < 4_000
    in_worker = pickle.loads(pickled)
    for index, sample in enumerate(samples):
        assert all(torch.equal(value, in_worker[index][name]) for name, value in sample.items())
    for epoch in range(3):
        dataset.set_epoch(epoch)  # changes the worker's dataset too
        indices = range(len(dataset))
        assert [in_worker.expression_of(i) for i in indices] == [dataset.expression_of(i) for i in indices]


def test_refs_of_excluded_images_are_left_out(make_dataset):
    whole = make_dataset("train", draw_seed=0)
    excluded = {whole.expressions[0].image_id, whole.expressions[-1].image_id}
    rest = make_dataset("train", draw_seed=0, excluded_images=excluded)
    kept = [expression for expression in whole.expressions if expression.image_id not in excluded]
    assert list(rest.expressions) == kept
    assert 0 < len(rest) == len({expression.ref_id for expression in kept}) < len(whole)
    ref_ids = [whole.expressions[whole.expression_of(index)].ref_id for index in range(len(whole))]
    assert torch.equal(rest[0]["mask"], whole[ref_ids.index(kept[0].ref_id)]["mask"])


def test_a_segmentation_that_is_nested_too_deeply_is_reported(make_dataset, refer):
    nested = []
    for _ in range(5000):
        nested = [nested]
    refer.refToAnn[refer.getRefIds(split="val")[0]]["segmentation"] = nested
    with pytest.raises(UserError, match=r"instances\.json: the segmentation of an annotation is nested too deeply"):
        make_dataset()

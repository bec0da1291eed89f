"""Tests of data.py: views and batches, what is labelled, the four data sets, lists, and what is refused.

    python -m pytest tests/test_data.py        (from the root; ten seconds on a CPU)

The tests write their images into a temporary folder; nothing is downloaded.
"""

import argparse
import io
import os
import struct
import sys
import unicodedata
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image, ImageOps
from torchvision.datasets import SBDataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

import data
from conftest import InterruptedFile
from data import (
    IndexStream, InputError, Process, SegmentationData, Views, check_files, labeled_ids,
    load_dataset, make_loader, masks_checksum, unlabeled_ids,
)

STREAM = (5, 1, 0)
VOC_COLOURS = [
    (0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128), (128, 0, 128), (0, 128, 128),
    (128, 128, 128), (64, 0, 0), (192, 0, 0), (64, 128, 0), (192, 128, 0), (64, 0, 128), (192, 0, 128),
    (64, 128, 128), (192, 128, 128), (0, 64, 0), (128, 64, 0), (0, 192, 0), (128, 192, 0), (0, 64, 128),
]
CITYSCAPES_TRAIN_IDS = {
    7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13,
    27: 14, 28: 15, 31: 16, 32: 17, 33: 18,
}


def write(path, array, palette=(), **options):
    """Save an array as an image, indexed if there is a palette of colours, and make its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    if len(palette):
        image.putpalette(np.array(palette, np.uint8).tobytes())
    image.save(path, **options)


def rgb(seed, H=20, W=30):
    """A random image, (H, W, 3) uint8."""
    return np.random.default_rng(seed).integers(0, 256, (H, W, 3), np.uint8)


def mask(seed, H=20, W=30, C=3):
    """A random mask of C classes and void, (H, W) uint8."""
    return np.random.default_rng(seed).choice(np.uint8([*range(C), 255]), (H, W))


def processes(world):
    """All processes of `world` that train together."""
    return [Process(rank, world) for rank in range(world)]


# ---- Views ----


def scene(tmp_path, image, label=None, crop=False):
    """A data set of seven classes whose only image is "x"."""
    write(tmp_path / "x.png", image)
    files = {"x": (tmp_path / "x.png", None)}
    if label is not None:
        write(tmp_path / "y.png", label)
        files = {"x": (tmp_path / "x.png", tmp_path / "y.png")}
    return SegmentationData("folder", files, ["x"], [], ["class"] * 7, data.voc_palette(), crop)


@pytest.mark.parametrize("crop, size", [(True, (28, 24)), (False, (32, 40))])
def test_image_and_label_are_cropped_and_flipped_together(tmp_path, crop, size):
    """Each pixel of the image tells its place in red and green, and so its label."""
    y, x = np.mgrid[:32, :40].astype(np.uint8)
    image, label = np.stack([x, y, x], -1), (3 * x + y) % 7
    views = Views(scene(tmp_path, image, label, crop), ["x"], size=size, labeled=True, stream=STREAM)
    tops, lefts, flips = set(), set(), 0
    for draw in range(150):
        X, Y = views[0, draw]
        assert X.shape == (3, *size)
        assert torch.equal(Y, (3 * X[0] + X[1]) % 7)
        steps = X[0].int().diff(dim=1).unique().tolist()
        assert steps in ([1], [-1])
        flips += steps == [-1]
        tops.add(int(X[1].min()))
        lefts.add(int(X[0].min()))
    assert 50 < flips < 100
    assert tops == set(range(32 - size[0] + 1))
    assert lefts == set(range(40 - size[1] + 1))


def test_both_unlabelled_views_have_one_geometry_and_no_mask_is_opened(tmp_path, monkeypatch):
    """A mark that every window sees lies at one place in both views, of which only A.X has other colours."""
    ground, mark, tail = (30, 20, 60), (250, 200, 120), (230, 240, 150)
    image = np.full((32, 40, 3), ground, np.uint8)
    image[12:16, 18:20] = mark
    image[16:18, 20:23] = tail
    dataset = scene(tmp_path, image, crop=True)
    monkeypatch.setattr(SegmentationData, "read_label", None)
    views = Views(dataset, ["x"], size=(24, 24), labeled=False, stream=STREAM)
    places, changed = set(), 0
    for draw in range(60):
        X, AX = views[0, draw]
        blobs = []
        for view in (X, AX):
            light = view.sum(0, dtype=torch.int)
            blobs.append(light * 2 > light.min() + light.max())
        assert blobs[0].sum() == 14
        assert torch.equal(*blobs)
        places.add(tuple(blobs[0].nonzero()[0].tolist()))
        changed += not torch.equal(X, AX)
        assert set(map(tuple, X.flatten(1).T.tolist())) == {ground, mark, tail}
    assert len(places) > 30
    assert changed == 60


@pytest.mark.parametrize("h, w", [(17, 23), (45, 80), (30, 41)])
def test_resize_is_pillows_for_images_and_takes_the_nearest_label(h, w):
    image, label = rgb(1, 30, 41), mask(2, 30, 41)
    X = data.resize(torch.from_numpy(image).permute(2, 0, 1), (h, w))
    Y = data.resize(torch.from_numpy(label), (h, w))
    assert X.dtype == Y.dtype == torch.uint8
    pillow = np.asarray(Image.fromarray(image).resize((w, h), Image.Resampling.BILINEAR))
    assert np.abs(X.permute(1, 2, 0).numpy().astype(int) - pillow).max() <= 1
    rows = [label[int((i + 0.5) * 30 / h)] for i in range(h)]
    assert Y.tolist() == [[row[int((j + 0.5) * 41 / w)] for j in range(w)] for row in rows]


def test_perturb_applies_the_released_jitter_in_any_order_and_grey_one_time_in_five(monkeypatch):
    """A.X is what the four adjustments make of X one after another, and perhaps its grey."""
    drawn, make_params = [], v2.ColorJitter.make_params

    def spy(self, inputs):
        drawn.append(make_params(self, inputs))
        return drawn[-1]

    monkeypatch.setattr(v2.ColorJitter, "make_params", spy)
    adjust = {
        "brightness": TF.adjust_brightness,
        "contrast": TF.adjust_contrast,
        "saturation": TF.adjust_saturation,
        "hue": TF.adjust_hue,
    }
    image = torch.from_numpy(rgb(3, 8, 8)).permute(2, 0, 1)
    grey, orders = [], set()
    for seed in range(250):
        AX = data.perturb(image, seed)
        expected = image
        order = drawn[seed]["fn_idx"].tolist()
        for name in [list(adjust)[i] for i in order]:
            expected = adjust[name](expected, drawn[seed][f"{name}_factor"])
        grey.append(bool((AX == AX[0]).all()))
        if grey[-1]:
            expected = TF.rgb_to_grayscale(expected, num_output_channels=3)
        assert AX.dtype == torch.uint8
        assert torch.equal(AX, expected)
        orders.add(tuple(order))
    assert len(orders) == 24
    assert 32 < sum(grey) < 70
    for name in adjust:
        low, high = (-0.1, 0.1) if name == "hue" else (0.6, 1.4)
        factors = [params[f"{name}_factor"] for params in drawn]
        margin = 0.05 * (high - low)
        assert low <= min(factors) < low + margin
        assert high - margin < max(factors) <= high
        assert abs(np.mean(factors) - (low + high) / 2) < margin


def test_perturb_follows_from_the_seed_and_leaves_the_global_generator():
    image = torch.from_numpy(rgb(3)).permute(2, 0, 1)
    views = []
    for global_seed in (0, 1):
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        views.append([data.perturb(image, seed) for seed in (7, 8, 2**63 - 1)])
        assert torch.equal(torch.get_rng_state(), before)
    assert all(map(torch.equal, *views))
    assert not torch.equal(views[0][0], views[0][1])


def test_batches_are_normalised_as_by_torchvision():
    image = torch.from_numpy(np.stack([rgb(4), rgb(5)])).permute(0, 3, 1, 2)
    label = torch.from_numpy(np.stack([mask(4), mask(5)]))
    X, Y = data.to_device([image, label], torch.device("cpu"))
    expected = v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])(image / 255)
    torch.testing.assert_close(X, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(data.normalize(image[0]), expected[0], atol=1e-6, rtol=1e-5)
    assert Y.dtype == torch.int64
    assert Y.tolist() == label.tolist()


# ---- Batches ----


@pytest.mark.parametrize("world, shares", [(1, [6]), (2, [3, 3]), (3, [2, 2, 2]), (4, [2, 2, 1, 1])])
def test_a_batch_is_shared_evenly_and_weights_restore_its_mean(world, shares):
    """DistributedDataParallel takes the mean over processes, each of its own mean times its weight."""
    parts = [data.images_of_process(6, process) for process in processes(world)]
    assert [len(part) for part in parts] == shares
    assert np.concatenate(parts).tolist() == list(range(6))
    losses = np.array([3.0, 1, 4, 1, 5, 9])
    weights = [data.weight_of_process(6, process) for process in processes(world)]
    mean = np.mean([weight * losses[part].mean() for weight, part in zip(weights, parts)])
    assert mean == pytest.approx(losses.mean(), abs=1e-12)


def test_each_step_of_each_process_has_a_seed_of_its_own():
    seeds = set()
    for numbers in np.ndindex(3, 3, 5, 3):
        seed, stage, step, rank = numbers
        data.seed_step(seed, stage, step, Process(rank, 3))
        seeds.add(torch.initial_seed())
    assert len(seeds) == 3 * 3 * 5 * 3
    twice = []
    for _ in range(2):
        data.seed_step(1, 2, 10**6, Process())
        twice.append(torch.rand(3).tolist())
    assert twice[0] == twice[1]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("length", [1, 4, 7, 20])
def test_processes_share_one_order_and_a_resumed_run_enters_it(world, length):
    one = list(IndexStream(length, 6, STREAM, 0, 9))
    assert [draw for batch in one for _, draw in batch] == list(range(54))
    order = [index for batch in one for index, _ in batch]
    epochs = [order[start : start + length] for start in range(0, 54, length)]
    assert all(sorted(epoch) == list(range(length)) for epoch in epochs[:-1])
    for start in range(9):
        streams = [IndexStream(length, 6, STREAM, start, 9, process) for process in processes(world)]
        steps = list(zip(*streams, strict=True))
        assert [sum(parts, []) for parts in steps] == one[start:]
    if length >= 7:  # few images have few orders
        assert epochs[0] != epochs[1]
        assert list(IndexStream(length, 6, (6, 1, 0), 0, 9)) != one


@pytest.mark.parametrize("world, workers", [(1, 0), (2, 0), (3, 0), (1, 2)])
@pytest.mark.parametrize("labeled", [True, False])
def test_batches_depend_on_stream_and_step_alone(labeled, world, workers):
    """They are the same for other processes, loader processes, and states of the global generators."""
    shapes = load_dataset("shapes")
    options = dict(dataset=shapes, ids=shapes.train[:5], size=(40, 48), labeled=labeled, stream=STREAM)
    views = Views(**options)
    steps = IndexStream(length=5, batch_size=4, stream=STREAM, start=4, stop=7)
    expected = []
    for step in steps:
        samples = [views[item] for item in step]
        expected.append([torch.stack(tensors) for tensors in zip(*samples)])
    torch.manual_seed(world)
    np.random.seed(world)
    loaders = [
        make_loader(**options, batch_size=4, start=4, stop=7, process=process, workers=workers)
        for process in processes(world)
    ]
    batches = []
    for parts in zip(*loaders, strict=True):
        batches.append([torch.cat(tensors) for tensors in zip(*parts)])
    assert len(batches) == 3
    for tensor, want in zip(sum(batches, []), sum(expected, []), strict=True):
        assert tensor.dtype == torch.uint8
        assert torch.equal(tensor, want)


def test_another_stream_has_other_views():
    shapes = load_dataset("shapes")
    one, other = (Views(shapes, shapes.train, (40, 48), True, stream) for stream in (STREAM, (6, 1, 0)))
    assert not all(torch.equal(one[0, draw][0], other[0, draw][0]) for draw in range(9))


def test_batches_for_a_gpu_alone_are_pinned():
    shapes = load_dataset("shapes")
    for name in ("cpu", "cuda"):
        process = Process(device=torch.device(name))
        loader = make_loader(shapes, shapes.train, (48, 48), True, 4, STREAM, 0, 1, process)
        assert loader.pin_memory == (name == "cuda")


# ---- What is labelled ----


def record(train, val=(), without_mask=()):
    """A SegmentationData of ids alone, with no file behind them."""
    files = {key: ("image", None if key in without_mask else "mask") for key in [*train, *val]}
    return SegmentationData("folder", files, list(train), list(val), ["a", "b", "c"], data.voc_palette())


def split_ids(dataset, ratio, split, labeled_list=None, unlabeled_list=None):
    """The ids of D_L and of D_U."""
    labeled = labeled_ids(dataset, ratio, split, labeled_list)
    return labeled, unlabeled_ids(dataset, labeled, unlabeled_list)


@pytest.mark.parametrize(
    "N, ratio, count",
    [
        (10582, "1/20", 529), (10582, "1/8", 1322), (10582, "1/4", 2645), (2975, "1/8", 371),
        (2975, "1/2", 1487), (10580, "0.05", 529), (100, "0.29", 29), (7, "1", 7),
    ],
)
def test_a_split_takes_the_ratio_rounded_down(N, ratio, count):
    dataset = record([f"{i:05d}" for i in range(N)])
    splits = [split_ids(dataset, ratio, split) for split in (0, 1, 2)]
    for labeled, unlabeled in splits:
        assert len(labeled) == len(set(labeled)) == count
        assert sorted(labeled + unlabeled) == dataset.train
    assert splits[0] == split_ids(dataset, ratio, 0)
    assert splits[1][0] == [f"{i:05d}" for i in sorted(np.random.RandomState(1).permutation(N)[:count])]
    if count < N:
        assert len({tuple(labeled) for labeled, _ in splits}) == 3


@pytest.mark.parametrize("keep", [0, 45])
def test_a_split_stays_when_masks_that_it_does_not_need_are_missing(keep):
    ids = [f"{i:03d}" for i in range(100)]
    labeled, unlabeled = split_ids(record(ids), "1/10", 0)
    fewer = record(ids, without_mask=unlabeled[keep:])
    assert split_ids(fewer, "1/10", 0) == (labeled, unlabeled)


def test_the_ratio_counts_images_without_a_mask_too():
    ids = [f"{i:03d}" for i in range(100)]
    labeled, unlabeled = split_ids(record(ids, without_mask=ids[::2]), "1/4", 0)
    assert len(labeled) == 25
    assert len(unlabeled) == 75
    assert all(int(key) % 2 == 1 for key in labeled)


def test_without_a_ratio_every_training_image_that_has_a_mask_is_labelled():
    dataset = record("dcba", val="v", without_mask="db")
    for split in (0, 1):
        assert split_ids(dataset, None, split) == (["c", "a"], ["d", "b"])
    assert split_ids(record("cab", val="v"), None, 0) == (["c", "a", "b"], [])


def test_without_a_ratio_a_data_set_without_masks_is_refused():
    dataset = record("abcd", val="v", without_mask="abcd")
    dataset.mask_rule = "in some folder"
    with pytest.raises(InputError, match="no training image has a mask in some folder"):
        labeled_ids(dataset, None, 0)


@pytest.mark.parametrize(
    "ratio, words",
    [
        ("half", "not a number"),
        ("", "not a number"),
        ("1/0", "not a number"),
        ("nan", "not a number"),
        ("0", "over 0"),
        ("-1/20", "over 0"),
        ("1.01", "at most 1"),
        ("1/21", "label an image"),
        ("3/4", "15 labelled images, but only 10/20 have a mask in some folder: give at most --ratio 10/20"),
    ],
)
def test_a_senseless_ratio_is_refused(ratio, words):
    dataset = record([f"{i}" for i in range(20)], without_mask=[f"{i}" for i in range(10)])
    dataset.mask_rule = "in some folder"
    assert len(split_ids(dataset, "10/20", 0)[0]) == 10  # as the message says
    with pytest.raises(InputError) as caught:
        split_ids(dataset, ratio, 0)
    assert f"--ratio {ratio}" in str(caught.value)
    assert words in str(caught.value)


def lists(folder, *texts):
    """Write list files, bytes or str -> their paths; None stays None."""
    paths = []
    for name, text in zip(("labeled.txt", "unlabeled.txt"), texts):
        if isinstance(text, str):
            text = text.encode()
        if text is not None:
            (folder / name).write_bytes(text)
        paths.append(None if text is None else folder / name)
    return paths


@pytest.mark.parametrize(
    "labeled, unlabeled, expected",
    [("c\nb\n", None, (["c", "b"], ["a", "d"])), ("c\n", "d\na\n", (["c"], ["d", "a"]))],
)
def test_list_files_replace_the_ratio(tmp_path, labeled, unlabeled, expected):
    dataset = record("abcd", val="v", without_mask="d")
    assert split_ids(dataset, "nonsense", 0, *lists(tmp_path, labeled, unlabeled)) == expected


def test_a_list_of_unlabelled_images_leaves_the_ratio(tmp_path):
    dataset = record("abcd", val="v", without_mask="d")
    labeled, unlabeled = split_ids(dataset, "1/4", 0, *lists(tmp_path, None, "d\n"))
    assert len(labeled) == 1
    assert unlabeled == ["d"]


@pytest.mark.parametrize(
    "labeled, unlabeled, words",
    [
        ("a\nb\n", "c\nb\n", "overlap: 1 ids, such as b; take them out of one list"),
        ("a\nv\n", None, "validation.*: 1 ids, such as v; take them out"),
        ("a\n", "b\nv\n", "validation.*: 1 ids, such as v; take them out"),
        ("a\nx\n", None, "'x'"),
        ("a\n", "y\n", "'y'"),
        ("\n", None, "names no image"),
        ("ä".encode("latin-1"), None, "cannot be read as text in UTF-8"),
    ],
)
def test_list_files_that_overlap_or_name_no_image_are_refused(tmp_path, labeled, unlabeled, words):
    dataset = record("abcd", val="v", without_mask="d")
    with pytest.raises(InputError, match=words):
        split_ids(dataset, "nonsense", 0, *lists(tmp_path, labeled, unlabeled))


def test_a_val_txt_that_is_train_txt_is_refused_with_the_remedy():
    dataset = record("abcd")
    dataset.val = list(dataset.train)
    labeled = labeled_ids(dataset, "1/2", 0)
    with pytest.raises(InputError) as caught:
        unlabeled_ids(dataset, labeled)
    assert "overlap: 4 ids, such as a;" in str(caught.value)
    assert "take them out of one list (those of val.txt out of train.txt)" in str(caught.value)


# ---- The data sets ----


@pytest.fixture
def folder(tmp_path):
    """A data set of layout `folder`: train a0 to a4 (a4 without a mask), val v0; jpg, png, grey, indexed."""
    for i, key in enumerate(["a0", "a1", "a2", "a3", "a4", "v0"]):
        write(tmp_path / "images" / f"{key}.{'png' if i % 2 else 'jpg'}", rgb(i))
        if key != "a4":
            write(tmp_path / "masks" / f"{key}.png", mask(i), VOC_COLOURS if i < 2 else ())
    (tmp_path / "train.txt").write_text("a0\na1\na2\na3\na4\n")
    (tmp_path / "val.txt").write_text("v0\n")
    (tmp_path / "classes.txt").write_text("sky\nland\nsea\n")
    return tmp_path


def test_folder(folder):
    dataset = load_dataset("folder", folder)
    assert dataset.train == ["a0", "a1", "a2", "a3", "a4"]
    assert dataset.val == ["v0"]
    assert dataset.classes == ["sky", "land", "sea"]
    assert not dataset.crop
    assert dataset.has_mask("a3")
    assert not dataset.has_mask("a4")
    image, label = dataset.read_pair("a1")
    assert np.array_equal(image.permute(1, 2, 0), rgb(1))
    assert np.array_equal(label, mask(1))
    with pytest.raises(InputError, match="images/a4.jpg has no mask of the same name in"):
        dataset.read_label("a4")


@pytest.mark.parametrize("kind", ["colour", "grey", "transparent", "16 bits"])
def test_images_of_other_kinds_become_rgb(folder, kind):
    grey = np.dstack([mask(0)] * 3)
    stored, expected = {
        "colour": (rgb(1), rgb(1)),
        "grey": (mask(0), grey),
        "transparent": (np.dstack([rgb(1), mask(0)]), rgb(1)),
        "16 bits": (mask(0).astype(np.uint16) * 256 + 77, grey),
    }[kind]
    write(folder / "images" / "a3.png", stored)
    image = load_dataset("folder", folder).read_image("a3")
    assert image.dtype == torch.uint8
    assert np.array_equal(image.permute(1, 2, 0), expected)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize(
    "tag, turn",
    [
        (1, lambda a: a),
        (2, np.fliplr),
        (3, lambda a: np.rot90(a, 2)),
        (4, np.flipud),
        (5, lambda a: a.swapaxes(0, 1)),
        (6, lambda a: np.rot90(a, -1)),
        (7, lambda a: np.rot90(a, 2).swapaxes(0, 1)),
        (8, np.rot90),
    ],
)
def test_images_are_turned_upright_as_exif_says(folder, tag, turn, suffix):
    exif, stored = Image.Exif(), np.kron(rgb(7, 3, 2), np.ones((8, 8, 1), np.uint8))
    exif[0x0112] = tag
    (folder / "images" / "a0.jpg").unlink()
    write(folder / "images" / f"a0.{suffix}", stored, exif=exif)
    write(folder / "masks" / "a0.png", mask(0, *turn(stored).shape[:2]))
    dataset = load_dataset("folder", folder)
    read = dataset.read_image("a0").permute(1, 2, 0).numpy().astype(int)
    assert read.shape == turn(stored).shape
    assert np.abs(read - turn(stored)).mean() < (1e-9 if suffix == "png" else 20)
    check_files(dataset, ["a0"], [], (9, 9))


def odd_exif(*tag):
    """EXIF, little-endian: orientation 6, and another tag (number, type, count, four bytes)."""
    entries = [struct.pack("<HHI4s", 0x0112, 3, 1, b"\6\0\0\0"), struct.pack("<HHI4s", *tag)]
    return b"Exif\0\0II*\0\10\0\0\0\2\0" + b"".join(entries) + bytes(4)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
@pytest.mark.parametrize(
    "tag",
    [
        (0x011A, 2, 3, b"72\0\0"),  # XResolution, a rational, as a text
        (0x0128, 2, 2, b"2\0\0\0"),  # ResolutionUnit, a short, as a text
        (0x0128, 9, 1, b"\xff\xff\xff\xff"),  # and as a negative number
    ],
    ids=["a text for a rational", "a text for a short", "a negative short"],
)
def test_an_image_with_odd_exif_is_turned_upright(folder, tag, suffix):
    """Pillow alone fails at the other tag, which has nothing to do with how the image lies."""
    stored = np.kron(rgb(7, 3, 2), np.ones((8, 8, 1), np.uint8))
    (folder / "images/a0.jpg").unlink()
    path = folder / f"images/a0.{suffix}"
    write(path, stored, exif=odd_exif(*tag))
    with Image.open(path) as image:
        with pytest.raises((TypeError, struct.error)):
            ImageOps.exif_transpose(image)
    read = load_dataset("folder", folder).read_image("a0").permute(1, 2, 0).numpy().astype(int)
    turned = np.rot90(stored, -1)
    assert read.shape == turned.shape
    assert np.abs(read - turned).mean() < (1e-9 if suffix == "png" else 20)


def test_cityscapes_label_ids_become_the_19_official_train_ids(tmp_path):
    label = np.tile(np.uint8([*range(34), 255]), (3, 1))
    for part, city in (("train", "aachen"), ("val", "ulm"), ("test", "bonn")):
        name = f"{part}/{city}/{city}_000000_000019"
        write(tmp_path / f"leftImg8bit/{name}_leftImg8bit.png", rgb(0, 3, 35))
        write(tmp_path / f"gtFine/{name}_gtFine_labelIds.png", label)
        write(tmp_path / f"gtFine/{name}_gtFine_color.png", rgb(0, 3, 35))
    dataset = load_dataset("cityscapes", tmp_path)
    assert dataset.train == ["train/aachen/aachen_000000_000019"]
    assert dataset.val == ["val/ulm/ulm_000000_000019"]
    train_ids = [CITYSCAPES_TRAIN_IDS.get(number, 255) for number in range(34)]
    assert dataset.read_label(dataset.train[0]).tolist() == 3 * [[*train_ids, 255]]
    assert dataset.crop
    assert len(dataset.classes) == 19
    shown = [(dataset.classes[i], *dataset.palette[i].tolist()) for i in (0, 1, 18)]
    assert shown == [("road", 128, 64, 128), ("sidewalk", 244, 35, 232), ("bicycle", 119, 11, 32)]
    (note,) = check_files(dataset, dataset.train, [], (3, 35))
    assert "no unlabelled image" in note
    with pytest.raises(InputError, match="is 3x35, too small for --size"):
        check_files(dataset, [], dataset.train, (4, 35))


def test_other_files_of_cityscapes_are_no_images(tmp_path):
    for part in ("train/aachen", "val/ulm"):
        write(tmp_path / f"leftImg8bit/{part}/a_0_leftImg8bit.png", rgb(0))
        (tmp_path / f"leftImg8bit/{part}/a_1_leftImg8bit.json").write_text("{}")
    dataset = load_dataset("cityscapes", tmp_path)
    assert list(dataset.files) == ["train/aachen/a_0", "val/ulm/a_0"]


def test_a_folder_with_a_dot_in_its_name_is_no_file(folder):
    (folder / "masks/a0.png").unlink()
    (folder / "masks/a0.old").mkdir()
    assert not load_dataset("folder", folder).has_mask("a0")


@pytest.mark.parametrize("kind", [1, 4], ids=["a smaller copy", "a transparency mask"])
def test_the_overviews_of_a_geotiff_are_no_pages(folder, kind):
    (folder / "images/a0.jpg").unlink()
    page = Image.fromarray(rgb(5))
    overview = Image.fromarray(rgb(6)[::2, ::2])
    overview.encoderinfo = {"tiffinfo": {254: kind}}
    path = folder / "images/a0.tif"
    page.save(path, save_all=True, append_images=[overview])
    with Image.open(path) as image:
        assert image.n_frames == 2
    read = load_dataset("folder", folder).read_image("a0").permute(1, 2, 0).numpy()
    assert np.array_equal(read, rgb(5))


def test_a_missing_mask_of_cityscapes_is_named_with_its_ending(tmp_path):
    """As where gtFine was unpacked without the label ids."""
    for name in ("train/aachen/aachen_0", "val/ulm/ulm_0"):
        write(tmp_path / f"leftImg8bit/{name}_leftImg8bit.png", rgb(0))
        write(tmp_path / f"gtFine/{name}_gtFine_color.png", rgb(0))
    dataset = load_dataset("cityscapes", tmp_path)
    assert not dataset.has_mask("train/aachen/aachen_0")
    words = "leftImg8bit.png has no mask of the same name and the ending _gtFine_labelIds"
    with pytest.raises(InputError, match=f"{words} in"):
        dataset.read_label("train/aachen/aachen_0")


@pytest.mark.parametrize(
    "name, given, layout, words",
    [
        ("voc", "VOCdevkit/VOC2012", "VOCdevkit/VOC2012/JPEGImages", "give --data {d}"),
        ("voc", ".", "x/VOCdevkit/VOC2012/JPEGImages", "give --data {d}/x"),
        ("voc", ".", "JPEGImages", "{d} must be called VOCdevkit/VOC2012 (a link will do)"),
        ("voc", ".", "VOC2012/JPEGImages", "{d}/VOC2012 must be called VOCdevkit/VOC2012"),
        ("voc", ".", "x", "run python data.py voc --data {d}"),
        ("voc", ".", "VOCdevkit/VOC2012/JPEGImages", "run python data.py voc --data {d}"),
        ("cityscapes", "leftImg8bit", "leftImg8bit", "give --data {d}"),
        ("cityscapes", ".", "leftImg8bit/train", "leftImg8bit must have images in train and in val"),
        ("folder", ".", "x", "{d}/images is not a folder: --data must hold images"),
    ],
)
def test_a_wrong_layout_is_refused_with_the_folder_or_the_command(tmp_path, name, given, layout, words):
    (tmp_path / layout).mkdir(parents=True)
    with pytest.raises(InputError) as caught:
        load_dataset(name, tmp_path / given)
    assert words.format(d=tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_voc_palette_is_the_published_one():
    colours = [tuple(colour) for colour in data.voc_palette().tolist()]
    assert colours[:21] == VOC_COLOURS
    assert len(set(colours)) == 256


def test_a_shapes_scene_is_a_function_of_its_id():
    shapes = load_dataset("shapes")
    assert not set(shapes.train) & set(shapes.val)
    assert (len(shapes.train), len(shapes.val), len(shapes.classes)) == (400, 200, 5)
    assert all(map(shapes.has_mask, shapes.files))
    pairs = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        np.random.seed(seed)
        pairs.append(shapes.read_pair("train_0003"))
    assert all(map(torch.equal, *pairs))
    image, label = pairs[0]
    assert torch.equal(shapes.read_image("train_0003"), image)
    assert torch.equal(shapes.read_label("train_0003"), label)
    assert not any(torch.equal(image, shapes.read_image(other)) for other in ("val_0003", "train_0004"))
    assert image.shape == (3, 48, 48)
    assert label.shape == (48, 48)
    assert image.dtype == label.dtype == torch.uint8


@pytest.fixture(scope="module")
def scenes():
    """100 scenes of `shapes` for training and 100 for validation: {part: [(image, label)]}."""
    return {part: [data.draw_scene(f"{part}_{i:04d}") for i in range(100)] for part in ("train", "val")}


def test_the_colour_of_a_pixel_does_not_tell_its_class(scenes):
    """Of 512 colours each is taken for its likeliest class in the training scenes."""
    colour, label = {}, {}
    for part, pairs in scenes.items():
        image = np.concatenate([image.flatten(1).T for image, _ in pairs]).astype(int)
        colour[part] = image // 32 @ [64, 8, 1]
        label[part] = np.concatenate([y.flatten() for _, y in pairs])
    assert set(label["train"]) == {0, 1, 2, 3, 4, 255}
    counts = [np.bincount(colour["train"][label["train"] == c], minlength=512) for c in range(5)]
    likeliest = np.argmax([n / n.sum() for n in counts], axis=0)[colour["val"]]
    assert np.mean([(likeliest == c)[label["val"] == c].mean() for c in range(5)]) < 0.45


def test_where_a_polygon_is_bright_tells_its_class(scenes):
    """By class: the share of pixels brighter than the background, and how often this changes along a row."""
    bright, steps = [[] for _ in range(5)], [[] for _ in range(5)]
    for image, label in scenes["val"]:
        grey = image.double().mean(0)
        above = grey > grey[label == 0].median()
        for c in set(label.unique().tolist()) - {255}:
            inside = (label[:, 1:] == c) & (label[:, :-1] == c)
            bright[c].append(above[label == c].double().mean())
            steps[c].append((above[:, 1:] != above[:, :-1])[inside].double().mean())
    _, pale, dark, striped, checked = [float(torch.stack(of_class).nanmean()) for of_class in bright]
    assert pale > 0.8
    assert dark < 0.2
    assert 0.3 < striped < 0.7
    assert 0.3 < checked < 0.7
    _, pale, dark, striped, checked = [float(torch.stack(of_class).nanmean()) for of_class in steps]
    assert pale < 0.1
    assert dark < 0.1
    assert checked > 1.5 * striped


# ---- Files and lists ----


def cut(path, size):
    """Leave so many bytes of a file."""
    path.write_bytes(path.read_bytes()[:size])


def remake(d, files, change=np.asarray, ending=None, **options):
    """Save files anew, with other values, in another format, or by another name."""
    for path in list(d.glob(files)):
        array = change(np.asarray(Image.open(path)))
        path.unlink()
        write(path.with_name(path.stem + (ending or path.suffix)), array, **options)


def use_links(d):
    """Link to both folders and to single files; links to folders below them are not followed."""
    for part in ("images", "masks"):
        (d / part).rename(d / f"all {part}")
        (d / part).symlink_to(d / f"all {part}")
        (d / part / "circle").symlink_to(d / part)
        path = next((d / part).glob("a0.*"))
        path.rename(d / f"one of {part}")
        path.symlink_to(d / f"one of {part}")


def add_litter(d):
    """Add the files that Windows, a Mac, GDAL, labelme and Jupyter leave behind."""
    for part in ("images", "masks"):
        for name in ("Thumbs.db", ".DS_Store", "._a0.png", "a0.png.aux.xml", "a0.tfw", "a0.json"):
            (d / part / name).write_bytes(b"\0\5\x16\7")
        write(d / part / ".ipynb_checkpoints" / "a0.png", rgb(9))
    write(d / "masks" / "a0.jpg", rgb(9))


def write_list_on_windows(d):
    lines = ["images\\a0.jpg", "images\\a1.png", "a2", "a3.jpg", ".\\a4"]
    (d / "train.txt").write_bytes("\r\n".join(lines).encode("utf-8-sig"))


TURN = Image.Exif()
TURN[0x0112] = 6
GREYS = [(i, i, i) for i in range(256)]
USED = {
    "links": use_links,
    "litter": add_litter,
    "masks called x.jpg.png": lambda d: remake(d, "masks/*", ending=".jpg.png"),
    "masks of 32 bits": lambda d: remake(d, "masks/*", np.int32, ".tif"),
    "turned masks": lambda d: remake(d, "masks/*", lambda a: np.rot90(a).copy(), exif=TURN),
    "grey palette": lambda d: remake(d, "masks/a3.png", palette=GREYS),
    "list of Windows": write_list_on_windows,
}
for files in ("images/*.tif", "images/*.BMP", "images/*.webp", "images/*.ppm", "masks/*.tiff", "masks/*.bmp"):
    USED[files] = lambda d, parts=files.split("*"): remake(d, f"{parts[0]}*", ending=parts[1], lossless=True)


@pytest.mark.parametrize("case", USED)
def test_data_in_other_shapes_are_the_same(folder, case):
    before = load_dataset("folder", folder)
    images = [before.read_image(key) for key in before.train]
    USED[case](folder)
    dataset = load_dataset("folder", folder)
    assert (dataset.train, dataset.val, dataset.classes) == (before.train, before.val, before.classes)
    assert [key for key in dataset.files if key in before.files] == list(before.files)
    assert split_ids(dataset, "2/5", 0) == split_ids(before, "2/5", 0)
    assert check_files(dataset, ["a0", "a1", "a2", "a3"], ["a4"], (20, 30)) == []
    assert all(map(torch.equal, images, map(dataset.read_image, dataset.train)))
    assert all(np.array_equal(dataset.read_label(f"a{i}"), mask(i)) for i in range(4))


@pytest.mark.parametrize("ending", [".v1", ".jpg"])
def test_names_may_have_other_dots(folder, ending):
    """As a0.v1.jpg with a0.v1.png, or a0.jpg.png in both folders."""
    for part in ("images", "masks"):
        remake(folder, f"{part}/*", ending=f"{ending}.png")
    for path in (folder / "train.txt", folder / "val.txt"):
        path.write_text("".join(f"{line}{ending}\n" for line in path.read_text().split()))
    dataset = load_dataset("folder", folder)
    assert dataset.train == [f"a{i}{ending}" for i in range(5)]
    assert np.array_equal(dataset.read_label(f"a2{ending}"), mask(2))


def test_an_id_is_the_path_below_the_folder(tmp_path):
    """Images of one name differ by their folders; a mask lies at the same path."""
    name = unicodedata.normalize("NFD", "größe")  # as a Mac stores it
    for i, path in enumerate(["day/1", "night/1", f"night/{name}", "v"]):
        write(tmp_path / f"images/{path}.jpg", rgb(i))
        write(tmp_path / f"masks/{unicodedata.normalize('NFC', path)}.png", mask(i))
    write(tmp_path / "images/noon/2.jpg", rgb(4))
    write(tmp_path / "masks/2.png", mask(4))
    train = ["night/1", "night/größe", "images/day/1.jpg", "noon/2"]
    for name, lines in dict(train=train, val=["v"], classes=["sky", "land", "sea"]).items():
        (tmp_path / f"{name}.txt").write_text("\n".join(lines), encoding="utf-8")
    dataset = load_dataset("folder", tmp_path)
    assert dataset.train == ["night/1", "night/größe", "day/1", "noon/2"]
    assert sorted(dataset.files) == ["day/1", "night/1", "night/größe", "noon/2", "v"]
    assert [dataset.has_mask(key) for key in dataset.train] == [True, True, True, False]
    for i, key in enumerate(["day/1", "night/1", "night/größe", "v"]):
        assert np.array_equal(dataset.read_label(key), mask(i))


def test_a_program_is_not_run_as_an_image(folder):
    """EPS is one, which Pillow would hand to an interpreter, whatever the file's name."""
    write(folder / "images/a0.jpg", rgb(0), format="EPS")
    dataset = load_dataset("folder", folder)
    with mock.patch("PIL.EpsImagePlugin.Ghostscript") as interpreter:
        with pytest.raises(InputError, match="a0.jpg cannot be read as"):
            dataset.read_image("a0")
    assert not interpreter.called


def test_a_photo_with_a_preview_is_read_without_it(folder):
    """Cameras write MPO files, which are called .jpg; some programs cut the preview off."""
    photo = np.kron(rgb(7, 3, 2), np.ones((8, 8, 1), np.uint8))
    path = folder / "images/a0.jpg"
    preview = Image.fromarray(255 - photo)
    write(path, photo, format="MPO", save_all=True, append_images=[preview], exif=TURN)
    whole = path.read_bytes()
    turned = np.rot90(photo, -1)
    for content in (whole, whole[: whole.rindex(b"\xff\xd8\xff")]):
        path.write_bytes(content)
        with Image.open(path) as image:
            assert (image.format, image.n_frames) == ("MPO", 2)
        read = load_dataset("folder", folder).read_image("a0").permute(1, 2, 0).numpy()
        assert read.shape == turned.shape
        assert np.abs(read.astype(int) - turned).mean() < 20
    assert len(content) < len(whole)


@pytest.mark.parametrize("ending", [".heic", ".npy", ".nii.gz"])
def test_a_listed_file_in_a_format_that_is_not_read_is_named(folder, ending):
    """A line is its id or its name; nobody is told that there is no such image."""
    path = folder / f"images/scan{ending}"
    path.write_bytes(b"something")
    for line in ("scan", f"scan{ending}", f"images/scan{ending}"):
        (folder / "train.txt").write_text(f"a0\n{line}\n")
        dataset = load_dataset("folder", folder)
        with pytest.raises(InputError) as caught:
            check_files(dataset, ["a0"], dataset.train[1:], (20, 30))
        assert str(caught.value).startswith(f"{path} cannot be read as PNG, TIFF, ")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ending", [".jpg", ".npy", ".nii.gz"])
def test_a_mask_in_a_format_that_is_not_read_is_named(folder, ending):
    """It is not called missing, nor is its image taken for an unlabelled one."""
    (folder / "masks/a2.png").unlink()
    path = folder / f"masks/a2{ending}"
    path.write_bytes(b"something")
    dataset = load_dataset("folder", folder)
    assert labeled_ids(dataset, None, 0) == ["a0", "a1", "a2", "a3"]
    with pytest.raises(InputError) as caught:
        check_files(dataset, ["a0", "a2"], ["a4"], (20, 30))
    assert str(caught.value).startswith(f"{path} cannot be read as PNG, TIFF, BMP, PPM: convert")
    assert "\n" not in str(caught.value)


def test_a_file_that_is_read_goes_before_one_that_is_not(folder):
    for name in ("images/a1.heic", "images/a1.nii.gz", "masks/a1.npy", "masks/a1.jpg"):
        (folder / name).write_bytes(b"something")
    image, label = load_dataset("folder", folder).read_pair("a1")
    assert np.array_equal(image.permute(1, 2, 0), rgb(1))
    assert np.array_equal(label, mask(1))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("name", ["images/a0.jpg", "masks/a0.png", "train.txt", "classes.txt"])
def test_a_pipe_in_place_of_a_file_is_refused(folder, name):
    """Reading one waits forever for a process that writes."""
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(InputError, match=f"{name} is not a regular file"):
        dataset = load_dataset("folder", folder)
        check_files(dataset, ["a0"], [], (20, 30))


@pytest.mark.parametrize("closed", ["images", "masks"])
def test_a_folder_that_may_not_be_read_is_not_taken_for_an_empty_one(folder, monkeypatch, closed):
    monkeypatch.setattr(os, "access", lambda path, mode: path.name != closed)  # root may read all
    with pytest.raises(InputError, match=f"{closed} cannot be read: its permissions"):
        load_dataset("folder", folder)


AACHEN = "aachen_000000_000019"
FILES = f"2007_000032,train/aachen/{AACHEN},ä ö,Zürich,b.1,plot,plot (1),b/plot,a/7,b/7".split(",")
PAIR = (
    f"leftImg8bit/train/aachen/{AACHEN}_leftImg8bit.png "
    f"gtFine/train/aachen/{AACHEN}_gtFine_labelTrainIds.png"
)


@pytest.mark.parametrize(
    "text, ids",
    [
        ("\ufeff2007_000032\r\n\r\n  \r\nb.1\t\r\n\r\n", ["2007_000032", "b.1"]),
        (unicodedata.normalize("NFD", "Zürich.jpg\nä ö"), ["Zürich", "ä ö"]),
        ("b.1\n2007_000032\nb.1\n2007_000032.jpg", ["b.1", "2007_000032"]),
        ("plot.jpg\nplot (1).JPG", ["plot", "plot (1)"]),
        ("a/7\nimages/b/7.tif\nC:\\My data\\images\\b\\plot.png", ["a/7", "b/7", "b/plot"]),
        ("../b.1\n/any/folder/2007_000032\n./x/../a/7", ["b.1", "2007_000032", "a/7"]),
        ("/JPEGImages/2007_000032.jpg /SegmentationClassAug/2007_000032.png", ["2007_000032"]),
        ("JPEGImages/2007_000032.jpg x/2007_000032.png\nb.1.jpg b.1_mask.png", ["2007_000032", "b.1"]),
        ("images\\plot (1).jpg\tmasks\\plot (1).png\na/7.jpg,masks/a/7.png", ["plot (1)", "a/7"]),
        (PAIR, [f"train/aachen/{AACHEN}"]),
        (f"train/aachen/{AACHEN}_leftImg8bit", [f"train/aachen/{AACHEN}"]),
    ],
)
def test_list_files_as_projects_ship_them(tmp_path, text, ids):
    (tmp_path / "list.txt").write_bytes(text.encode())
    assert data.read_list(tmp_path / "list.txt", FILES) == ids


@pytest.mark.parametrize(
    "line",
    [
        "2007_000033", "b.2", "plot 1", "plot (2).jpg", "/JPEGImages/ b.1", "..",  # no such image
        "7", "c/7", AACHEN,  # its path below the folder is another
        '"plot.jpg"', "'plot'", "plot.jpg,", "plot,", "plot;",  # a table
        "images/b.1.jpg masks/plot.png", "b.1.jpg b.10.png", "x/../b.1.jpg y.png",  # another image's mask
        '{"x/b.1.jpg", ' * 9999, "x/" * 9999,  # anything
    ],
)
def test_a_line_that_names_no_image_is_refused(tmp_path, line):
    (tmp_path / "list.txt").write_text(f"2007_000032\n{line}\n")
    with pytest.raises(InputError, match="list.txt") as caught:
        data.read_list(tmp_path / "list.txt", FILES)
    assert repr(line[:80]) in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "latin-1"])
def test_a_list_in_another_encoding_is_refused(tmp_path, encoding):
    (tmp_path / "list.txt").write_bytes("Zürich\nä ö\n".encode(encoding))
    with pytest.raises(InputError, match="list.txt") as caught:
        data.read_list(tmp_path / "list.txt", FILES)
    assert "\n" not in str(caught.value)


# ---- Checks before training ----


def number(*classes, void=255):
    """A change of a mask's values 0, 1, 2 and 255."""
    return lambda label: np.uint8([*classes, void])[np.minimum(label, 3)]


def fractions(array):
    """A change of an image or mask to one channel of floats."""
    return np.float32(array[..., 0] if array.ndim == 3 else array)


def pages(path, array):
    """Save an image of two pages, or of two frames, which differ."""
    write(path, array, save_all=True, append_images=[Image.fromarray(array[::-1].copy())])


def add_pages(d, ending):
    """Save an unlabelled image anew, with a second page."""
    (d / "images/a1.png").unlink()
    pages(d / f"images/a1{ending}", rgb(1))


def convert(d, name, mode):
    """Save an image as a TIFF of another mode."""
    (path,) = (d / "images").glob(f"{name}.*")
    image = Image.open(path).convert(mode)
    path.unlink()
    image.save(path.with_suffix(".tif"))


def classes(text):
    """Write classes.txt."""
    return lambda d: (d / "classes.txt").write_text(text)


# What is done to `folder`, whose a0 and a2 are labelled, and words of the message.
BROKEN = {
    "half an image": (lambda d: cut(d / "images/a0.jpg", 700), "images/a0.jpg cannot be read as"),
    "half a header": (lambda d: cut(d / "images/a1.png", 9), "images/a1.png cannot be read as"),
    "image of fractions": (lambda d: remake(d, "images/a0*", fractions, ".tif"), "a0.tif has mode F"),
    "unlabelled image of fractions": (
        lambda d: remake(d, "images/a1*", fractions, ".tif"),
        "a1.tif has mode F; it must be RGB or grey integers",
    ),
    "image in LAB": (lambda d: convert(d, "a0", "LAB"), "a0.tif has mode LAB"),
    "unlabelled image in LAB": (lambda d: convert(d, "a1", "LAB"), "a1.tif has mode LAB"),
    "stack of images": (
        lambda d: add_pages(d, ".tif"),
        "a1.tif has 2 pages: write each to a file of its own",
    ),
    "animated GIF": (lambda d: add_pages(d, ".gif"), "a1.gif has 2 pages"),
    "animated WebP": (lambda d: add_pages(d, ".webp"), "a1.webp has 2 pages"),
    "animated PNG": (lambda d: add_pages(d, ".png"), "a1.png has 2 pages"),
    "stack of masks": (
        lambda d: (d / "masks/a2.png").unlink() or pages(d / "masks/a2.tif", mask(2)),
        "a2.tif has 2 pages",
    ),
    "turned image": (lambda d: write(d / "images/v0.png", rgb(5), exif=TURN), "(30, 20), its EXIF applied"),
    "RGB mask": (lambda d: write(d / "masks/a0.png", rgb(0)), "a0.png has mode RGB"),
    "value without a class": (lambda d: write(d / "masks/a2.png", mask(0, C=4)), "a2.png has the value 3"),
    "mask of fractions": (lambda d: remake(d, "masks/a2.png", fractions, ".tif"), "a2.tif has mode F"),
    "val mask of another size": (lambda d: write(d / "masks/v0.png", mask(0, 9, 8)), "masks/v0.png is"),
    "foreground 255": (lambda d: remake(d, "masks/a[02]*", number(0, 255, 255)), "paint the foreground 1"),
    "all void": (lambda d: remake(d, "masks/a[02]*", number(255, 255, 255)), "a0.png, like all labelled"),
    "val foreground 255": (lambda d: remake(d, "masks/v*", number(0, 255, 255)), "v0.png, like all val"),
    "val without mask": (lambda d: (d / "masks/v0.png").unlink(), "images/v0.png has no mask"),
    "val mask named otherwise": (lambda d: remake(d, "masks/v*", ending="_seg.png"), "masks (PNG, TIFF, BMP"),
    "masks named otherwise": (lambda d: remake(d, "masks/*", ending="_seg.png"), "a0_seg.png fits no image"),
    "masks as JPEG": (
        lambda d: remake(d, "masks/*", ending=".jpg"),
        "masks/a0.jpg cannot be read as PNG, TIFF, BMP, PPM: convert it",
    ),
    "JPEG called PNG": (lambda d: write(d / "masks/v0.png", mask(5), format="JPEG"), "cannot be read as PNG"),
    "palettes that differ": (lambda d: remake(d, "masks/a2.png", palette=GREYS[::-1]), "number the classes"),
    "two masks": (lambda d: write(d / "masks/a0.jpg.png", mask(0)), "a0.png are both masks of a0"),
    "two formats of a mask": (lambda d: write(d / "masks/a0.tif", mask(0)), "a0.tif have the same id, a0"),
    "no masks": (lambda d: (d / "masks").rename(d / "labels"), "only 0/5 have a mask of the same name in"),
    "no train.txt": (
        lambda d: (d / "train.txt").unlink(), "train.txt does not exist (README, Your own images)",
    ),
    "empty train.txt": (lambda d: (d / "train.txt").write_text("\n"), "train.txt names no image"),
    "an id for both": (
        lambda d: (d / "val.txt").write_text("v0\na4\n"),
        "overlap: 1 ids, such as a4",
    ),
    "one id twice": (lambda d: write(d / "images/a0.png", rgb(0)), "have the same id, a0"),
    "table of classes": (classes("id, name\n0, a\n1, b\n2, c"), "the line '0, a'"),
    "numbers": (classes("0: sky\n1: land\n2: sea"), "the line '0: sky'"),
    "heading": (classes("name\nsky\nland\nsea"), "the line 'name'"),
    "another heading": (classes("class\nsky\nland\nsea"), "the line 'class'"),
    "comment of CVAT": (classes("# label:color\nsky\nland\nsea"), "the line '# label:color'"),
    "labels.txt of labelme": (classes("__ignore__\nsky\nland\nsea"), "the line '__ignore__'"),
    "one class": (
        classes("tumour\n"),
        "must name 2 to 255 classes, and has 1; the background is one too, mostly the first",
    ),
    "256 classes": (classes("a\n" * 256), "classes.txt must name 2 to 255 classes, and has 256"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_data_set_is_refused_before_the_first_step(folder, case):
    spoil, words = BROKEN[case]
    spoil(folder)
    with pytest.raises(InputError) as caught:
        dataset = load_dataset("folder", folder)
        split_ids(dataset, "2/5", 0)
        check_files(dataset, ["a0", "a2"], ["a1", "a3", "a4"], (20, 30))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    if case != "an id for both":  # which is not one file's fault
        assert str(folder) in str(caught.value)


def write_masks_and_pixels(d):
    (d / "masks/a3.png").write_text("not opened while a3 is unlabelled")
    cut(d / "images/a3.png", 600)  # behind its header


UNUSED = "2 unlabelled images have a mask, which training does not use"


def remove_unused_masks(d):
    for key in ("a1", "a3"):
        (d / f"masks/{key}.png").unlink()


@pytest.mark.parametrize(
    "change, notes",
    [
        (remove_unused_masks, []),
        (write_masks_and_pixels, [UNUSED]),
        (
            lambda d: remake(d, "masks/a[02]*", number(0, 1, 1)),
            [UNUSED, "no labelled mask has a pixel of sea"],
        ),
        (
            lambda d: remake(d, "masks/v*", number(0, 1, 1, void=0)),
            [UNUSED, "no validation mask has a pixel of sea"],
        ),
        (lambda d: write(d / "masks/A4.png", mask(4)), [UNUSED, "A4.png fits no image"]),
        (lambda d: write(d / "masks/more/a0.png", mask(4)), [UNUSED, "a0.png fits no image"]),
        (
            lambda d: remake(d, "images/*", lambda a: np.uint16(a[..., 0]) * 16, ".png"),
            [UNUSED, "brightest value 15 of 255 (of 16 bits the upper 8)"],
        ),
    ],
)
def test_what_may_be_meant_is_noted(folder, change, notes):
    change(folder)
    dataset = load_dataset("folder", folder)
    found = check_files(dataset, ["a0", "a2"], ["a1", "a3", "a4"], (20, 30))
    assert len(found) == len(notes)
    assert all(words in note for note, words in zip(found, notes))


def test_that_no_image_is_unlabelled_is_noted(folder):
    """Also of drawn scenes, of which no file could tell it."""
    dataset = load_dataset("folder", folder)
    shapes = load_dataset("shapes")
    labeled = [key for key in dataset.train if dataset.has_mask(key)]
    assert check_files(dataset, labeled, ["a4"], (20, 30)) == []
    for notes in (
        check_files(dataset, labeled, [], (20, 30)),
        check_files(shapes, shapes.train, [], (48, 48)),
    ):
        (note,) = notes
        assert note.startswith("stage 2 will find no unlabelled image, as all are labelled: ")
        assert "--ratio" in note


@pytest.mark.parametrize("part", ["labelled", "validation"])
@pytest.mark.parametrize("top, is_lost", [(104, True), (109, False)])
def test_a_class_that_is_lost_at_the_size_of_training_is_noted(folder, part, top, is_lost):
    """960 pixels become 48: of each 20 number 10 is taken, here rows 10, 30 ... 90, 110."""
    large = np.zeros((960, 960), np.uint8)
    large[:, 480:] = 1
    small = large.copy()
    large[500:, :] = 2
    small[top : top + 3, 229:232] = 2
    for path in (folder / "images").iterdir():
        write(path, np.full((960, 960, 3), 200, np.uint8))
    for key in ("a0", "a2", "v0"):
        is_of_part = (key == "v0") == (part == "validation")
        write(folder / f"masks/{key}.png", small if is_of_part else large)
    dataset = load_dataset("folder", folder)
    notes = check_files(dataset, ["a0", "a2"], ["a4"], (48, 48))
    lost = f"no {part} mask keeps a pixel of sea at --size 48 48, which is too small for it"
    assert notes == ([lost] if is_lost else [])
    assert check_files(dataset, ["a0", "a2"], ["a4"], (960, 960)) == []
    dataset.crop = True  # a window keeps all sizes
    assert check_files(dataset, ["a0", "a2"], ["a4"], (48, 48)) == []


def test_many_classes_that_no_mask_shows_are_one_short_line(folder):
    names = [f"kind {i}" for i in range(150)]
    (folder / "classes.txt").write_text("\n".join(names))
    notes = check_files(load_dataset("folder", folder), ["a0", "a2"], ["a4"], (20, 30))
    five = "kind 3, kind 4, kind 5, kind 6, kind 7, ... (147 classes)"
    parts = ("labelled", "validation")
    assert notes == [f"no {part} mask has a pixel of {five}" for part in parts]


def test_drawn_scenes_need_no_check():
    shapes = load_dataset("shapes")
    with mock.patch.object(data, "draw_scene", side_effect=AssertionError):
        assert check_files(shapes, shapes.train[:5], shapes.train[5:], (48, 48)) == []
    assert masks_checksum(shapes, shapes.train[:5]) == masks_checksum(shapes, shapes.train[5:])


def test_a_checksum_tells_whether_a_mask_was_repainted(folder):
    """By the masks' bytes alone, not by their times, the images or other masks."""
    labeled = ["a0", "a2"]
    before = masks_checksum(load_dataset("folder", folder), labeled)
    os.utime(folder / "masks/a2.png", (0, 0))
    write(folder / "masks/a1.png", mask(9))
    write(folder / "images/a2.jpg", rgb(9))
    (folder / "train.txt").write_text("a2\na0\na4\n")
    assert masks_checksum(load_dataset("folder", folder), labeled) == before
    sums = {before}
    for key in labeled:
        path = folder / f"masks/{key}.png"
        content = path.read_bytes()
        repainted = np.asarray(Image.open(path)).copy()
        repainted[0, 0] = 1 if repainted[0, 0] == 0 else 0  # one pixel
        write(path, repainted)
        sums.add(masks_checksum(load_dataset("folder", folder), labeled))
        path.write_bytes(content)
    assert len(sums) == 3
    assert masks_checksum(load_dataset("folder", folder), labeled) == before


# ---- python data.py voc ----


@pytest.fixture
def download(tmp_path, monkeypatch):
    """Stand-ins for torchvision's VOC and SBD. Returns the list of their calls.

    VOC has train t1, t2 and val v1, v2; SBD has train t1, s1, v1 and val s2, t2, v2, s3.
    """
    root, calls = tmp_path / "VOCdevkit" / "VOC2012", []

    def voc(folder, year, image_set, download):
        calls.append(("voc", year, image_set, download))
        for i, key in enumerate(["t1", "t2", "v1", "v2"]):
            write(root / "SegmentationClass" / f"{key}.png", mask(i, C=21), VOC_COLOURS)
        for key in ("t1", "t2", "v1", "v2", "s1", "s2", "s3"):
            write(root / "JPEGImages" / f"{key}.jpg", rgb(0))
        lists = root / "ImageSets" / "Segmentation"
        lists.mkdir(parents=True, exist_ok=True)
        (lists / "train.txt").write_text("t1\nt2\n")
        (lists / "val.txt").write_text("v1\nv2\n")

    class Boundaries:
        def __init__(self, folder, image_set, mode, download):
            calls.append(("sbd", image_set, mode, download))
            (Path(folder) / "cls").mkdir(parents=True, exist_ok=not download)
            ids = {"train": ["t1", "s1", "v1"], "val": ["s2", "t2", "v2", "s3"]}[image_set]
            self.images = [f"{folder}/img/{key}.jpg" for key in ids]

        def __getitem__(self, i):
            value = 10 + int(Path(self.images[i]).stem[1:])
            return None, Image.fromarray(np.full((20, 30), value, np.uint8))

    monkeypatch.setattr(torchvision.datasets, "VOCSegmentation", voc)
    monkeypatch.setattr(torchvision.datasets, "SBDataset", Boundaries)
    return calls


@pytest.mark.parametrize("unpacked", ["", "voc", "sbd", "voc benchmark_RELEASE/dataset"])
def test_prepare_voc_downloads_what_lacks_and_merges_sbd(tmp_path, download, unpacked):
    if "voc" in unpacked:
        torchvision.datasets.VOCSegmentation(tmp_path, "2012", "trainval", True)
        download.clear()
    sbd = unpacked.removeprefix("voc").strip()
    if sbd:
        (tmp_path / sbd / "cls").mkdir(parents=True)
    data.prepare_voc(tmp_path, (5, 2))
    calls = [("sbd", "train", "segmentation", not sbd), ("sbd", "val", "segmentation", False)]
    if "voc" not in unpacked:
        calls.append(("voc", "2012", "trainval", True))
    assert download == calls
    dataset = load_dataset("voc", tmp_path)
    assert (dataset.train, dataset.val) == (["s1", "s2", "s3", "t1", "t2"], ["v1", "v2"])
    assert (dataset.classes[15], dataset.classes[20], len(dataset.classes)) == ("person", "tvmonitor", 21)
    for i, key in enumerate(["t1", "t2", "v1", "v2"]):
        assert np.array_equal(dataset.read_label(key), mask(i, C=21))
    for i in (1, 2, 3):
        assert (dataset.read_label(f"s{i}") == 10 + i).all()
    assert check_files(dataset, dataset.train[1:], dataset.train[:1], (20, 30)) == []
    data.prepare_voc(tmp_path, (5, 2))  # once more


FAIL = mock.Mock(side_effect=RuntimeError("File not found or corrupted."))


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("VOCSegmentation", FAIL, "not found or corrupted."),
        ("SBDataset", FAIL, "not found or corrupted."),
        ("SBDataset", SBDataset, "pip install scipy"),
        ("DATASETS", None, "5, 2 of (10582, 1449)"),
    ],
)
def test_why_voc_is_not_merged_is_said_at_once(tmp_path, download, monkeypatch, capsys, name, value, words):
    monkeypatch.setattr(torchvision.datasets, name, value, raising=False)
    monkeypatch.setattr(sys, "argv", ["data.py", "voc", "--data", str(tmp_path)])
    for module in ("scipy", "scipy.io"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit, match="2"):
        data.main()
    err = capsys.readouterr().err
    assert err.startswith("data.py: cannot merge")
    assert words in err
    assert err.count("\n") == 1
    assert not list(tmp_path.rglob("trainaug.txt"))
    assert (download == []) == (name == "SBDataset")


# ---- Errors and arguments ----


@pytest.mark.parametrize("error", [None, OSError(28, "No space left"), RuntimeError("unexpected pos")])
def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, error):
    path = tmp_path / "list.txt"
    path.write_text("old")
    if error is None:
        with data.replacing(path) as file:
            file.write(b"new")
    else:
        with pytest.raises(OSError, match="list.txt cannot be written .(No space left|unexpected pos)"):
            with data.replacing(path) as file:
                file.write(b"half")
                raise error
    assert path.read_text() == ("old" if error else "new")
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_that_lies_at_the_place_of_the_part_is_not_followed(tmp_path):
    (tmp_path / "other").write_text("another's")
    (tmp_path / "list.txt.part").symlink_to(tmp_path / "other")
    with data.replacing(tmp_path / "list.txt") as file:
        file.write(b"new")
    assert (tmp_path / "other").read_text() == "another's"
    assert (tmp_path / "list.txt").read_text() == "new"
    assert not (tmp_path / "list.txt").is_symlink()


def test_ctrl_c_is_no_failure_to_write(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "open", InterruptedFile, raising=False)
    with pytest.raises(KeyboardInterrupt):
        with data.replacing(tmp_path / "list.txt") as file:
            torch.save({"x": torch.zeros(9)}, file)
    assert list(tmp_path.iterdir()) == []


def test_an_error_is_one_line_also_from_a_loader_process():
    """PyTorch wraps the error of a loader process in its traceback."""
    wrapped = "Caught InputError in DataLoader worker process 0.\nTrace\ndata.InputError: a.png is grey\n"
    assert data.one_line(InputError("a.png is grey")) == "a.png is grey"
    assert data.one_line(InputError(wrapped)) == "a.png is grey"


@pytest.mark.parametrize(
    "text, shown",
    [
        ("größe 猫 1.jpg", "größe 猫 1.jpg"),
        ("a\x1b[2Jb", "a\\x1b[2Jb"),
        ("a\r\n\tb", "a\\r\\n\\tb"),
        ("\u202egpj", "\\u202egpj"),
        ("b\udcff", "b\\udcff"),  # a byte that is not UTF-8
    ],
)
def test_what_would_steer_the_terminal_is_printed_as_an_escape(text, shown):
    assert data.printable(text) == shown
    assert data.one_line(InputError(f"{text.splitlines()[-1]} is grey")).isprintable()


@pytest.mark.parametrize("stream", [None, io.StringIO()], ids=["closed", "a notebook's"])
def test_output_without_an_encoding_is_used_as_it_is(monkeypatch, stream):
    monkeypatch.setattr(sys, "stdout", stream)
    data.tolerant_output()
    assert sys.stdout is stream


def test_too_little_memory_is_known_by_its_text():
    gpu = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    for error in (gpu, MemoryError()):
        assert data.is_out_of_memory(error)
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert data.is_out_of_memory(caught.value)
    assert not data.is_out_of_memory(RuntimeError("size mismatch"))


def test_an_options_number_lies_within_its_bounds():
    assert [data.within(1, 3)(text) for text in "123"] == [1, 2, 3]
    assert data.within(0, kind=float)("1e9") == 1e9
    for text in ("0", "4"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"{text} is not between 1 and 3"):
            data.within(1, 3)(text)
    with pytest.raises(argparse.ArgumentTypeError, match="nan is not between 0 and inf"):
        data.within(0, kind=float)("nan")

"""Tests of data.py: order and views, splits and list files, the four data sets, and what is refused.

    python -m pytest tests/test_data.py        (from the root; a few seconds on a CPU)

The tests write their images into a temporary folder; nothing is downloaded.
"""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision.datasets import SBDataset
from torchvision.transforms import v2

import data
from data import Dataset, IndexStream, InputError, Views, check_files, load_dataset, make_loader, split_ids

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


def write(path, array, palette=False, **options):
    """Save an array as an image, indexed if `palette`, and make its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    if palette:
        image.putpalette(np.array(VOC_COLOURS, np.uint8).tobytes())
    image.save(path, **options)


def rgb(seed, H=20, W=30):
    return np.random.default_rng(seed).integers(0, 256, (H, W, 3), np.uint8)


def mask(seed, H=20, W=30, C=3):
    return np.random.default_rng(seed).choice(np.uint8([*range(C), 255]), (H, W))


@pytest.fixture
def folder(tmp_path):
    """A data set of layout `folder`: train a0 to a4 (a4 without a mask), val v0; jpg, png, grey, indexed."""
    for i, key in enumerate(["a0", "a1", "a2", "a3", "a4", "v0"]):
        write(tmp_path / "images" / f"{key}.{'png' if i % 2 else 'jpg'}", rgb(i))
        if key != "a4":
            write(tmp_path / "masks" / f"{key}.png", mask(i), palette=i < 2)
    (tmp_path / "train.txt").write_text("a0\na1\na2\na3\na4\n")
    (tmp_path / "val.txt").write_text("v0\n")
    (tmp_path / "classes.txt").write_text("sky\nland\nsea\n")
    return tmp_path


def record(train, val=(), without_mask=(), name="folder"):
    """A Dataset of ids alone, with no file behind them."""
    files = {key: ("image", None if key in without_mask else "mask") for key in [*train, *val]}
    return Dataset(name, files, list(train), list(val), ["a", "b", "c"], data.voc_palette())


# The order of the data


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("length", [1, 4, 7, 20])
def test_processes_share_one_order_and_a_resumed_run_enters_it(world, length):
    one = list(IndexStream(length, 6, STREAM, 0, 9))
    assert [draw for batch in one for _, draw in batch] == list(range(54))
    order = [index for batch in one for index, _ in batch]
    epochs = [order[start : start + length] for start in range(0, 54, length)]
    assert all(sorted(epoch) == list(range(length)) for epoch in epochs[:-1])
    assert length < 7 or epochs[0] != epochs[1]
    for start in range(9):
        ranks = [IndexStream(length, 6, STREAM, start, 9, rank, world) for rank in range(world)]
        assert [len(rank) for rank in ranks] == [9 - start] * world
        steps = list(zip(*ranks))
        assert [sum(parts, []) for parts in steps] == one[start:]
        assert [len(part) for part in steps[0]] == {1: [6], 2: [3, 3], 3: [2, 2, 2], 4: [2, 2, 1, 1]}[world]
    assert length < 7 or list(IndexStream(length, 6, (6, 1, 0), 0, 9)) != one


@pytest.mark.parametrize("workers", [0, 2, 4])
@pytest.mark.parametrize("labeled", [True, False])
def test_batches_depend_on_stream_and_step_alone(labeled, workers):
    shapes = load_dataset("shapes")
    options = dict(dataset=shapes, ids=shapes.train[:5], size=(40, 48), labeled=labeled, stream=STREAM)
    views, place = Views(**options), dict(batch_size=4, start=4, stop=7)
    steps = IndexStream(length=5, stream=STREAM, **place)
    direct = [[torch.stack(tensors) for tensors in zip(*(views[item] for item in step))] for step in steps]
    other = Views(**{**options, "stream": (6, 1, 0)})
    assert not all(torch.equal(views[0, draw][0], other[0, draw][0]) for draw in range(9))
    for world in (1, 2, 3):
        torch.manual_seed(world)  # nothing may come from the global generators
        np.random.seed(world)
        place.update(world=world, workers=workers)
        ranks = [make_loader(**options, **place, rank=rank) for rank in range(world)]
        batches = [[torch.cat(tensors) for tensors in zip(*parts)] for parts in zip(*ranks, strict=True)]
        assert len(batches) == len(direct) == 3
        for tensor, expected in zip(sum(batches, []), sum(direct, []), strict=True):
            assert tensor.dtype == torch.uint8 and torch.equal(tensor, expected)


# Views


def scene(tmp_path, image, label=None, crop=False):
    write(tmp_path / "x.png", image)
    if label is not None:
        write(tmp_path / "y.png", label)
    files = {"x": (tmp_path / "x.png", None if label is None else tmp_path / "y.png")}
    return Dataset("folder", files, ["x"], [], ["class"] * 7, data.voc_palette(), crop)


@pytest.mark.parametrize("crop, size", [(True, (28, 24)), (False, (32, 40))])
def test_image_and_label_are_cropped_and_flipped_together(tmp_path, crop, size):
    y, x = np.mgrid[:32, :40].astype(np.uint8)
    image, label = np.stack([x, y, x], -1), (3 * x + y) % 7  # each pixel tells its place, and so its label
    views = Views(scene(tmp_path, image, label, crop), ["x"], size=size, labeled=True, stream=STREAM)
    tops, lefts, flips = set(), set(), 0
    for draw in range(150):
        X, Y = views[0, draw]
        assert X.shape == (3, *size) and torch.equal(Y, (3 * X[0] + X[1]) % 7)
        steps = X[0].int().diff(dim=1).unique().tolist()
        assert steps in ([1], [-1])
        flips += steps != [1]
        tops.add(int(X[1].min()))
        lefts.add(int(X[0].min()))
    assert 50 < flips < 100
    assert tops == set(range(32 - size[0] + 1)) and lefts == set(range(40 - size[1] + 1))


def test_both_unlabelled_views_have_one_geometry_and_no_mask_is_opened(tmp_path, monkeypatch):
    image = np.full((32, 40, 3), (30, 20, 60), np.uint8)
    image[12:16, 18:20], image[16:18, 20:23] = (250, 200, 120), (230, 240, 150)  # seen by every window
    dataset = scene(tmp_path, image, crop=True)
    monkeypatch.setattr(Dataset, "read_label", None)
    views = Views(dataset, ["x"], size=(24, 24), labeled=False, stream=STREAM)
    places, changed, colours = set(), 0, {(30, 20, 60), (250, 200, 120), (230, 240, 150)}
    for draw in range(60):
        X, AX = views[0, draw]
        blobs = []
        for view in (X, AX):
            light = view.sum(0, dtype=torch.int)
            blobs.append(light * 2 > light.min() + light.max())
        assert blobs[0].sum() == 14 and torch.equal(*blobs)
        places.add(tuple(blobs[0].nonzero()[0].tolist()))
        changed += not torch.equal(X, AX)
        assert set(map(tuple, X.flatten(1).T.tolist())) == colours  # X itself is not perturbed
    assert len(places) > 30 and changed == 60


def test_resize_is_pillows_for_images_and_takes_the_nearest_label(tmp_path):
    image, label = rgb(1, 30, 41), mask(2, 30, 41)
    for h, w in ((17, 23), (45, 80), (30, 41)):
        X, Y = data.resize(torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(label), (h, w))
        pillow = np.asarray(Image.fromarray(image).resize((w, h), Image.Resampling.BILINEAR))
        assert np.abs(X.permute(1, 2, 0).numpy().astype(int) - pillow).max() <= 1
        rows = [label[int((i + 0.5) * 30 / h)] for i in range(h)]
        assert Y.tolist() == [[row[int((j + 0.5) * 41 / w)] for j in range(w)] for row in rows]


def test_perturb_draws_the_released_factors_and_grey_one_time_in_five(monkeypatch):
    ranges = {"brightness": (0.6, 1.4), "contrast": (0.6, 1.4), "saturation": (0.6, 1.4), "hue": (-0.1, 0.1)}
    drawn, orders, order = {name: [] for name in ranges}, set(), []
    for name in ranges:

        def adjust(image, factor, name=name, original=getattr(data.TF, f"adjust_{name}")):
            drawn[name].append(factor)
            order.append(name)
            return original(image, factor)

        monkeypatch.setattr(data.TF, f"adjust_{name}", adjust)
    image, grey = torch.from_numpy(rgb(3, 8, 8)).permute(2, 0, 1), 0
    for draw in range(400):
        AX = data.perturb(image, np.random.default_rng(draw))
        assert AX.shape == image.shape and AX.dtype == torch.uint8
        grey += bool((AX == AX[0]).all())
        orders.add(tuple(order))
        order.clear()
    for name, (low, high) in ranges.items():
        assert len(drawn[name]) == 400
        assert low <= min(drawn[name]) < low + 0.05 * (high - low)
        assert high - 0.05 * (high - low) < max(drawn[name]) <= high
    assert len(orders) == 24  # every order of the four
    assert 55 < grey < 105


def test_normalize_is_torchvisions():
    image = torch.from_numpy(np.stack([rgb(4), rgb(5)])).permute(0, 3, 1, 2)
    want = v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])(image / 255)
    torch.testing.assert_close(data.normalize(image), want, atol=1e-6, rtol=1e-5)


# Splits and list files


@pytest.mark.parametrize(
    "N, ratio, count",
    [(10582, "1/20", 529), (10582, "1/8", 1322), (10582, "1/4", 2645), (2975, "1/8", 371),
     (2975, "1/2", 1487), (10580, "0.05", 529), (100, "0.29", 29), (7, "1", 7)],
)
def test_a_split_takes_the_ratio_rounded_down(N, ratio, count):
    dataset = record([f"{i:05d}" for i in range(N)])
    splits = [split_ids(dataset, ratio, number) for number in (0, 1, 2)]
    for labeled, unlabeled in splits:
        assert len(labeled) == len(set(labeled)) == count
        assert sorted(labeled + unlabeled) == dataset.train
    assert splits[0] == split_ids(dataset, ratio, 0)
    assert count == N or len({tuple(labeled) for labeled, _ in splits}) == 3


def test_labelled_images_have_masks_and_all_images_are_counted():
    dataset = record([f"{i:02d}" for i in range(40)], without_mask=[f"{i:02d}" for i in range(0, 40, 2)])
    labeled, unlabeled = split_ids(dataset, "1/4", 0)
    assert len(labeled) == 10 and all(int(key) % 2 for key in labeled) and len(unlabeled) == 30


@pytest.mark.parametrize("keep", [0, 0.5])
def test_a_split_stays_when_masks_that_it_does_not_need_are_missing(keep):
    ids = [f"{i:03d}" for i in range(100)]
    labeled, unlabeled = split_ids(record(ids), "1/10", 0)
    fewer = record(ids, without_mask=unlabeled[int(90 * keep) :])
    assert split_ids(fewer, "1/10", 0) == (labeled, unlabeled)


@pytest.mark.parametrize(
    "ratio, words",
    [("half", "not a number"), ("", "not a number"), ("1/0", "not a number"), ("nan", "not a number"),
     ("0", "not above 0"), ("-1/20", "not above 0"), ("1.01", "at most 1"), ("1/21", "no labelled"),
     ("3/4", "15 labelled images, but only 10 of the 20")],
)
def test_a_senseless_ratio_is_refused(ratio, words):
    dataset = record([f"{i}" for i in range(20)], without_mask=[f"{i}" for i in range(10)])
    with pytest.raises(InputError) as caught:
        split_ids(dataset, ratio, 0)
    assert f"--ratio {ratio}" in str(caught.value) and "\n" not in str(caught.value)
    assert words in str(caught.value)


FILES = dict.fromkeys(["2007_000032", "aachen_000000_000019", "ä ö", "Zürich", "b.1"])


@pytest.mark.parametrize(
    "text, ids",
    [
        (b"\xef\xbb\xbf2007_000032\r\n\r\n  \r\nb.1\t\r\n\r\n", ["2007_000032", "b.1"]),
        ("Zürich\nä ö\n".encode(), ["Zürich", "ä ö"]),
        (b"b.1\n2007_000032\nb.1\n2007_000032.jpg", ["b.1", "2007_000032"]),
        (b"/JPEGImages/2007_000032.jpg /SegmentationClassAug/2007_000032.png\n", ["2007_000032"]),
        (b"JPEGImages/2007_000032.jpg x.png\nJPEGImages/b.1.jpg y.png", ["2007_000032", "b.1"]),
        (b"leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit.png "
         b"gtFine/train/aachen/aachen_000000_000019_gtFine_labelTrainIds.png\n", ["aachen_000000_000019"]),
        (b"", []),
    ],
)
def test_list_files_as_projects_ship_them(tmp_path, text, ids):
    (tmp_path / "list.txt").write_bytes(text)
    assert data.read_list(tmp_path / "list.txt", FILES) == ids


@pytest.mark.parametrize("line", ["2007_000033", "../b.1", "x/../b.1.jpg y.png", "..", "/JPEGImages/ b.1"])
def test_a_list_with_an_id_that_has_no_image_is_refused(tmp_path, line):
    (tmp_path / "list.txt").write_text(f"2007_000032\n{line}\n")
    with pytest.raises(InputError, match="list.txt") as caught:
        data.read_list(tmp_path / "list.txt", FILES)
    assert repr(line) in str(caught.value)


@pytest.mark.parametrize(
    "labeled, unlabeled, words",
    [("c\nb\n", None, (["c", "b"], ["a", "d"])), ("c\n", "d\na\n", (["c"], ["d", "a"])), (None, "d\n", None),
     ("a\nb\n", "c\nb\n", "overlap: 1 ids, b"), ("a\nd\n", None, "d, which has no mask"),
     ("a\nx\n", None, "'x'"), ("\n", None, "names no image"), ("a\n", "y\n", "'y'"),
     (b"\xff\xfe", None, "cannot be read"), ("a\nv\n", None, "validation"), ("a\n", "b\nv\n", "validation")],
)
def test_list_files_instead_of_a_ratio(tmp_path, labeled, unlabeled, words):
    paths = []
    for name, text in (("l.txt", labeled), ("u.txt", unlabeled)):
        if text is not None:
            (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        paths.append(None if text is None else tmp_path / name)
    dataset = record("abcd", val="v", without_mask="d")
    if isinstance(words, str):
        with pytest.raises(InputError, match=words):
            split_ids(dataset, "nonsense", 0, *paths)
    elif words:
        assert split_ids(dataset, "nonsense", 0, *paths) == words
    else:  # labelled by ratio, unlabelled by list
        labeled, unlabeled = split_ids(dataset, "1/4", 0, *paths)
        assert len(labeled) == 1 and unlabeled == ["d"]


# The four data sets


def test_folder(folder):
    dataset = load_dataset("folder", folder)
    assert (dataset.train, dataset.val, dataset.crop) == (["a0", "a1", "a2", "a3", "a4"], ["v0"], False)
    assert dataset.classes == ["sky", "land", "sea"]
    for i, key in enumerate(["a0", "a1", "a2", "a3"]):  # masks: two indexed, two grey
        label = dataset.read_label(key)
        assert label.dtype == torch.uint8 and np.array_equal(label, mask(i)) and 255 in label
    assert np.array_equal(dataset.read_image("a1").permute(1, 2, 0), rgb(1))
    assert [dataset.has_mask(key) for key in ("a3", "a4")] == [True, False]
    check_files(dataset, ["a0", "a1", "a2", "a3"], ["a4"], (20, 30))
    for array in (mask(0), np.dstack([rgb(1), mask(0)])):  # grey, and with transparency
        write(folder / "images" / "a3.png", array)
        want = array[..., :3] if array.ndim == 3 else np.dstack([array] * 3)
        assert np.array_equal(dataset.read_image("a3").permute(1, 2, 0), want)
    (folder / "masks" / "a3.png").write_text("not opened while a3 is unlabelled")
    check_files(dataset, ["a0", "a1", "a2"], ["a3", "a4"], (20, 30))


def test_voc(tmp_path):
    root = tmp_path / "VOCdevkit" / "VOC2012"
    for i, key in enumerate(["2007_000001", "2008_000002", "2009_000003"]):
        write(root / "JPEGImages" / f"{key}.jpg", rgb(i))
        write(root / "SegmentationClassAug" / f"{key}.png", mask(i, C=21), palette=True)
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "trainaug.txt").write_text("2007_000001\n2009_000003\n")
    (lists / "val.txt").write_text("2008_000002\n")
    dataset = load_dataset("voc", tmp_path)
    assert (dataset.train, dataset.val) == (["2007_000001", "2009_000003"], ["2008_000002"])
    assert len(dataset.classes) == 21
    assert (dataset.classes[15], dataset.classes[20]) == ("person", "tvmonitor")
    assert np.array_equal(dataset.read_label("2009_000003"), mask(2, C=21))
    check_files(dataset, dataset.train, [], (20, 30))


def test_cityscapes_label_ids_become_the_19_official_train_ids(tmp_path):
    label = np.tile(np.uint8([*range(34), 255]), (3, 1))
    for part, city in (("train", "aachen"), ("val", "ulm")):
        write(tmp_path / f"leftImg8bit/{part}/{city}/{city}_000000_000019_leftImg8bit.png", rgb(0, 3, 35))
        write(tmp_path / f"gtFine/{part}/{city}/{city}_000000_000019_gtFine_labelIds.png", label)
        write(tmp_path / f"gtFine/{part}/{city}/{city}_000000_000019_gtFine_color.png", rgb(0, 3, 35))
    dataset = load_dataset("cityscapes", tmp_path)
    assert (dataset.train, dataset.val) == (["aachen_000000_000019"], ["ulm_000000_000019"])
    want = [CITYSCAPES_TRAIN_IDS.get(number, 255) for number in [*range(34), 255]]  # license plate: -1 is 255
    assert dataset.read_label(dataset.train[0]).tolist() == 3 * [want]
    assert dataset.crop and len(dataset.classes) == 19
    shown = [(dataset.classes[i], *dataset.palette[i].tolist()) for i in (0, 1, 13, 18)]
    assert shown[:2] == [("road", 128, 64, 128), ("sidewalk", 244, 35, 232)]
    assert shown[2:] == [("car", 0, 0, 142), ("bicycle", 119, 11, 32)]
    check_files(dataset, dataset.train, [], (3, 35))
    with pytest.raises(InputError, match="smaller than.*--size 4 35"):
        check_files(dataset, [], dataset.train, (4, 35))


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize(
    "tag, turn",
    [(1, lambda a: a), (2, np.fliplr), (3, lambda a: np.rot90(a, 2)), (4, np.flipud),
     (5, lambda a: a.swapaxes(0, 1)), (6, lambda a: np.rot90(a, -1)),
     (7, lambda a: np.rot90(a, 2).swapaxes(0, 1)), (8, np.rot90)],
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
    check_files(dataset, ["a0"], [], (9, 9))  # decodes
    cropped, (H, W) = Dataset(**{**vars(dataset), "crop": True, "val": []}), turn(stored).shape[:2]
    check_files(cropped, [], ["a0"], (H, W))  # reads the header alone
    for size in ((H + 1, W), (H, W + 1)):
        with pytest.raises(InputError, match=f"a0.{suffix} is .*smaller than"):
            check_files(cropped, [], ["a0"], size)


def test_an_image_with_an_odd_exif_entry_is_read_or_refused(folder):
    exif, path = Image.Exif(), folder / "images" / "a0.jpg"
    exif[0x0112], exif[0x010E] = 6, "hello"  # whose number is then that of a width
    write(path, rgb(0), exif=exif)
    path.write_bytes(path.read_bytes().replace(b"\x01\x0e\x00\x02", b"\x01\x00\x00\x02"))
    try:
        assert load_dataset("folder", folder).read_image("a0").shape == (3, 30, 20)
    except InputError as error:
        assert str(path) in str(error)


def cut(path, keep=0.5):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])


BROKEN = {  # what is wrong, and words of the message; a0 and a2 are labelled, the rest is not
    "RGB mask": (lambda d: write(d / "masks/a0.png", rgb(0)), "a0.png has mode RGB"),
    "value without a class": (lambda d: write(d / "masks/a2.png", mask(0, C=4)), "a2.png has the value 3"),
    "16 bits": (lambda d: write(d / "masks/a2.png", mask(0).astype(np.uint16) * 300), "a2.png has the value"),
    "mask of another size": (lambda d: write(d / "masks/a2.png", mask(0, 30, 20)), "a2.png is"),
    "val mask of another size": (lambda d: write(d / "masks/v0.png", mask(0, 9, 8)), "masks/v0.png is"),
    "val value without a class": (lambda d: write(d / "masks/v0.png", mask(0, C=5)), "masks/v0.png has the"),
    "truncated val image": (lambda d: cut(d / "images/v0.png"), "images/v0.png cannot be read"),
    "val without mask": (lambda d: (d / "masks/v0.png").unlink(), "images/v0.png has no mask"),
    "truncated image": (lambda d: cut(d / "images/a0.jpg"), "images/a0.jpg cannot be read"),
    "truncated mask": (lambda d: cut(d / "masks/a0.png"), "masks/a0.png cannot be read"),
    "no image": (lambda d: (d / "images/a3.png").write_text("hello"), "images/a3.png cannot be read"),
    "empty image": (lambda d: cut(d / "images/a4.jpg", 0), "images/a4.jpg cannot be read"),
    "no images": (lambda d: (d / "images").rename(d / "img"), "images is not a folder"),
    "no masks": (lambda d: (d / "masks").rename(d / "msk"), "only 0 of the 5 training images have a mask"),
    "no train.txt": (lambda d: (d / "train.txt").unlink(), "train.txt cannot be read"),
    "empty train.txt": (lambda d: (d / "train.txt").write_text("\n"), "the train split of"),
    "empty val.txt": (lambda d: (d / "val.txt").write_text(""), "the val split of"),
    "unknown id": (lambda d: (d / "val.txt").write_text("v0\nv1\n"), "val.txt names 'v1'"),
    "an id for both": (lambda d: (d / "val.txt").write_text("v0\na4\n"), "overlap: 1 ids, a4"),
    "one id twice": (lambda d: write(d / "images/more/a0.png", rgb(0)), "have the same id, a0"),
    "no classes.txt": (lambda d: (d / "classes.txt").unlink(), "classes.txt cannot be read"),
    "one class": (lambda d: (d / "classes.txt").write_text("sky\n"), "classes.txt names 1 classes"),
    "256 classes": (lambda d: (d / "classes.txt").write_text("a\n" * 256), "classes.txt names 256 classes"),
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
    assert str(folder) in str(caught.value) or case in ("no masks", "an id for both")  # not one file's fault
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name, part", [("voc", "JPEGImages"), ("cityscapes", "train"), ("folder", "images")])
def test_a_missing_data_set_is_refused_by_its_folder(tmp_path, name, part):
    with pytest.raises(InputError, match=f"nowhere.*{part} is not a folder"):
        load_dataset(name, tmp_path / "nowhere")


def test_voc_palette_is_the_published_one():
    assert [tuple(colour) for colour in data.voc_palette()[:21].tolist()] == VOC_COLOURS
    assert len({tuple(colour) for colour in data.voc_palette().tolist()}) == 256


def test_a_shapes_scene_is_a_function_of_its_id():
    shapes = load_dataset("shapes")
    assert not set(shapes.train) & set(shapes.val) and len(shapes.classes) == 7
    pairs = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        np.random.seed(seed)
        pairs.append((shapes.read_image("train_0003"), shapes.read_label("train_0003")))
    assert all(map(torch.equal, *pairs))
    image, label = pairs[0]
    assert not any(torch.equal(image, shapes.read_image(other)) for other in ("val_0003", "train_0004"))
    assert image.shape == (3, 96, 96) and image.dtype == label.dtype == torch.uint8


def test_colour_alone_does_not_tell_the_classes_of_shapes():
    def pixels(part, number, tint):
        scenes = [data.draw_scene(f"{part}_{i:04d}") for i in range(number)]
        image = np.concatenate([image.flatten(1).T for image, _ in scenes]).astype(int)
        label = np.concatenate([label.flatten() for _, label in scenes])
        hue = np.array([*VOC_COLOURS[:7], *[(0, 0, 0)] * 249])[label]
        return ((1 - tint) * image + tint * hue).astype(int) // 32 @ [64, 8, 1], label  # one of 512 colours

    def mean_recall(tint):
        """Of the class that is likeliest by its colour, if all were equally frequent; chance is 1/7."""
        colour, label = pixels("train", 60, tint)
        assert set(label) == {0, 1, 2, 3, 4, 5, 6, 255}
        counts = np.stack([np.bincount(colour[label == c], minlength=512) for c in range(7)])
        likeliest = (counts / counts.sum(1, keepdims=True)).argmax(0)
        colour, label = pixels("val", 30, tint)
        return np.mean([(likeliest[colour] == label)[label == c].mean() for c in range(7)])

    assert mean_recall(0) < 0.2
    assert mean_recall(0.5) > 0.4  # the measure sees it where colours are half their class's


# The download of VOC and SBD, with stand-ins for torchvision's data sets


@pytest.fixture
def download(tmp_path, monkeypatch):
    """VOC with train t1, t2 and val v1, v2; SBD with train t1, s1, v1 and val s2, t2, v2, s3. Lists calls."""
    root, calls = tmp_path / "VOCdevkit" / "VOC2012", []

    def voc(folder, year, image_set, download):
        calls.append(("voc", year, image_set, download))
        for i, key in enumerate(["t1", "t2", "v1", "v2"]):
            write(Path(folder) / "VOCdevkit/VOC2012/SegmentationClass" / f"{key}.png", mask(i), palette=True)
        for key in ("t1", "t2", "v1", "v2", "s1", "s2", "s3"):
            write(root / "JPEGImages" / f"{key}.jpg", rgb(0))
        lists = root / "ImageSets" / "Segmentation"
        lists.mkdir(parents=True)
        (lists / "train.txt").write_text("t1\nt2\n")
        (lists / "val.txt").write_text("v1\nv2\n")

    class Boundaries:
        def __init__(self, folder, image_set, mode, download):
            calls.append(("sbd", image_set, mode, download))
            (Path(folder) / "cls").mkdir(parents=True, exist_ok=True)
            ids = {"train": ["t1", "s1", "v1"], "val": ["s2", "t2", "v2", "s3"]}[image_set]
            self.images = [f"{folder}/img/{key}.jpg" for key in ids]

        def __getitem__(self, i):
            return None, Image.fromarray(np.full((20, 30), 10 + int(Path(self.images[i]).stem[1:]), np.uint8))

    monkeypatch.setattr(torchvision.datasets, "VOCSegmentation", voc)
    monkeypatch.setattr(torchvision.datasets, "SBDataset", Boundaries)
    return calls


def test_prepare_voc_merges_sbd_and_keeps_vocs_own_masks(tmp_path, download):
    data.prepare_voc(tmp_path, (5, 2))
    assert download == [
        ("sbd", "train", "segmentation", True), ("sbd", "val", "segmentation", False),
        ("voc", "2012", "trainval", True),
    ]
    dataset = load_dataset("voc", tmp_path)
    assert (dataset.train, dataset.val) == (["s1", "s2", "s3", "t1", "t2"], ["v1", "v2"])
    for i, key in enumerate(["t1", "t2", "v1", "v2"]):
        assert np.array_equal(dataset.read_label(key), mask(i))
    for i in (1, 2, 3):
        assert (dataset.read_label(f"s{i}") == 10 + i).all()
    with Image.open(dataset.files["s1"][1]) as saved:
        assert saved.mode == "P" and saved.getpalette()[:63] == np.ravel(VOC_COLOURS).tolist()
    check_files(dataset, dataset.train, [], (20, 30))


def test_prepare_voc_refuses_other_counts(tmp_path, download):
    with pytest.raises(InputError, match="5 training and 2 validation") as caught:
        data.prepare_voc(tmp_path)
    assert str(tmp_path) in str(caught.value) and not list(tmp_path.rglob("trainaug.txt"))


@pytest.mark.parametrize("failing", ["VOCSegmentation", "SBDataset"])
def test_prepare_voc_reports_a_failed_download(tmp_path, download, monkeypatch, failing):
    def fail(*args, **options):
        raise RuntimeError("File not found or corrupted.")

    monkeypatch.setattr(torchvision.datasets, failing, fail)
    with pytest.raises(InputError, match="cannot download.*corrupted"):
        data.prepare_voc(tmp_path)


def test_prepare_voc_asks_for_scipy_before_it_downloads(tmp_path, download, monkeypatch):
    monkeypatch.setattr(torchvision.datasets, "SBDataset", SBDataset)
    for name in ("scipy", "scipy.io"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match="pip install scipy") as caught:
        data.prepare_voc(tmp_path)
    assert download == [] and "\n" not in str(caught.value)

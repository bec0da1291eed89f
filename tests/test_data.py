"""Tests of data.py: order and views, splits and list files, the four data sets, and what is refused.

    python -m pytest tests/test_data.py        (from the root; a few seconds on a CPU)

The tests write their images into a temporary folder; nothing is downloaded.
"""

import sys
import unicodedata
from pathlib import Path
from unittest import mock

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


def write(path, array, palette=(), **options):
    """Save an array as an image, indexed if there is a palette of colours, and make its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    if len(palette):
        image.putpalette(np.array(palette, np.uint8).tobytes())
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
            write(tmp_path / "masks" / f"{key}.png", mask(i), VOC_COLOURS if i < 2 else ())
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
        ranks = [list(IndexStream(length, 6, STREAM, start, 9, rank, world)) for rank in range(world)]
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
    assert splits[1][0] == [f"{i:05d}" for i in sorted(np.random.RandomState(1).permutation(N)[:count])]
    assert count == N or len({tuple(labeled) for labeled, _ in splits}) == 3


@pytest.mark.parametrize("keep", [0, 0.5])
def test_a_split_stays_when_masks_that_it_does_not_need_are_missing(keep):
    ids = [f"{i:03d}" for i in range(100)]
    labeled, unlabeled = split_ids(record(ids), "1/10", 0)
    fewer = record(ids, without_mask=unlabeled[int(90 * keep) :])
    assert split_ids(fewer, "1/10", 0) == (labeled, unlabeled)
    labeled, unlabeled = split_ids(record(ids, without_mask=ids[::2]), "1/4", 0)  # all images are counted
    assert len(labeled) == 25 and all(int(key) % 2 for key in labeled) and len(unlabeled) == 75


@pytest.mark.parametrize(
    "ratio, words",
    [("half", "not a number"), ("", "not a number"), ("1/0", "not a number"), ("nan", "not a number"),
     ("0", "over 0"), ("-1/20", "over 0"), ("1.01", "at most 1"), ("1/21", "label an image"),
     ("3/4", "15 labelled images, but only 10/20 have a mask in some folder: give at most --ratio 10/20")],
)
def test_a_senseless_ratio_is_refused(ratio, words):
    dataset = record([f"{i}" for i in range(20)], without_mask=[f"{i}" for i in range(10)])
    dataset.sought = " in some folder"
    assert len(split_ids(dataset, "10/20", 0)[0]) == 10  # as the message says
    with pytest.raises(InputError) as caught:
        split_ids(dataset, ratio, 0)
    assert f"--ratio {ratio}" in str(caught.value) and words in str(caught.value)


FILES = "2007_000032,aachen_000000_000019,ä ö,Zürich,b.1,plot,plot (1),b/plot,a/7,b/7".split(",")


@pytest.mark.parametrize(
    "text, ids",
    [
        (b"\xef\xbb\xbf2007_000032\r\n\r\n  \r\nb.1\t\r\n\r\n", ["2007_000032", "b.1"]),
        ("Zürich.jpg\r\nä ö\r\n".encode("utf-16"), ["Zürich", "ä ö"]),
        ("b.1\r\nplot\r\n".encode("utf-16-le"), ["b.1", "plot"]),
        (unicodedata.normalize("NFD", "Zürich.jpg\nä ö").encode(), ["Zürich", "ä ö"]),
        (b"b.1\n2007_000032\nb.1\n2007_000032.jpg", ["b.1", "2007_000032"]),
        (b'"plot.jpg",\nplot (1).JPG;', ["plot", "plot (1)"]),
        (b"a/7\nimages/b/7.tif\nC:\\My data\\images\\b\\plot.png", ["a/7", "b/7", "b/plot"]),
        (b"/JPEGImages/2007_000032.jpg /SegmentationClassAug/2007_000032.png\n", ["2007_000032"]),
        (b"JPEGImages/2007_000032.jpg x/2007_000032.png\nb.1.jpg b.1_mask.png", ["2007_000032", "b.1"]),
        (b"images\\plot (1).jpg\tmasks\\plot (1).png\na/7.jpg,masks/a/7.png", ["plot (1)", "a/7"]),
        (b"leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit.png "
         b"gtFine/train/aachen/aachen_000000_000019_gtFine_labelTrainIds.png\n", ["aachen_000000_000019"]),
    ],
)
def test_list_files_as_projects_ship_them(tmp_path, text, ids):
    (tmp_path / "list.txt").write_bytes(text)
    assert data.read_list(tmp_path / "list.txt", FILES) == ids


@pytest.mark.parametrize(
    "line", ["2007_000033", "../b.1", "x/../b.1.jpg y.png", "..", "/JPEGImages/ b.1", "7", "b.2", "plot 1",
             "plot (2).jpg", "images/b.1.jpg masks/plot.png", "b.1.jpg b.10.png", '{"x/b.1.jpg", ' * 9999],
)
def test_a_list_with_an_id_that_has_no_image_is_refused(tmp_path, line):
    (tmp_path / "list.txt").write_text(f"2007_000032\n{line}\n")
    with pytest.raises(InputError, match="list.txt") as caught:
        data.read_list(tmp_path / "list.txt", FILES)
    assert repr(line[:80]) in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "labeled, unlabeled, words",
    [("c\nb\n", None, (["c", "b"], ["a", "d"])), ("c\n", "d\na\n", (["c"], ["d", "a"])), (None, "d\n", None),
     ("a\nb\n", "c\nb\n", "overlap: 1 ids, b"), ("a\nx\n", None, "'x'"), ("\n", None, "names no image"),
     ("a\n", "y\n", "'y'"), ("ä".encode("latin-1"), None, "cannot be read as text in UTF-8"),
     ("a\nv\n", None, "validation.*: 1 ids, v"), ("a\n", "b\nv\n", "validation.*: 1 ids, v")],
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
    assert [dataset.files[key][1] is not None for key in ("a3", "a4")] == [True, False]
    for array in (rgb(1), mask(0), np.dstack([rgb(1), mask(0)])):  # in colour, grey, and with transparency
        write(folder / "images" / "a3.png", array)
        want = array[..., :3] if array.ndim == 3 else np.dstack([array] * 3)
        assert np.array_equal(dataset.read_image("a3").permute(1, 2, 0), want)
    (folder / "masks" / "a3.png").write_text("not opened while a3 is unlabelled")
    check_files(dataset, ["a0", "a1", "a2"], ["a3", "a4"], (20, 30))


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
    shown = [(dataset.classes[i], *dataset.palette[i].tolist()) for i in (0, 1, 18)]
    assert shown == [("road", 128, 64, 128), ("sidewalk", 244, 35, 232), ("bicycle", 119, 11, 32)]
    check_files(dataset, dataset.train, [], (3, 35))
    with pytest.raises(InputError, match="is 3x35, too small for --size"):
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
    check_files(dataset, ["a0"], [], (9, 9))


# Data as people have them: what is done to `folder`, whose a0 and a2 are labelled, and what must come of it


def cut(path, keep=0.5):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])


def remake(d, files, change=np.asarray, ending=None, **options):
    """Save files anew, with other values, in another format, or by another name."""
    for path in list(d.glob(files)):
        array = change(np.asarray(Image.open(path)))
        path.unlink()
        write(path.with_name(path.stem + (ending or path.suffix)), array, **options)


def use_links_and_add_litter(d):
    for part in ("images", "masks"):
        (d / part).rename(d / f"all {part}")
        (d / part).mkdir()
        (d / part / "link").symlink_to(d / f"all {part}")
        (d / part / "circle").symlink_to(d / part)
        for name in ("Thumbs.db", ".DS_Store", "._a0.png", "a0.png.aux.xml", "a0.tfw", "a0.json"):
            (d / part / name).write_bytes(b"\0\5\x16\7")
        write(d / part / ".ipynb_checkpoints" / "a0.png", rgb(9))
    write(d / "masks" / "a0.jpg", rgb(9))


def number(*classes, void=255):
    """A change of a mask's values 0, 1, 2 and 255."""
    return lambda label: np.uint8([*classes, void])[np.minimum(label, 3)]


WINDOWS = "images\\a0.jpg\r\nimages\\a1.png\r\na2\r\na3.jpg\r\n.\\a4\r\n".encode("utf-16")
GREYS = [(i, i, i) for i in range(256)]
USED = {
    "links and litter": use_links_and_add_litter,
    "masks called x.jpg.png": lambda d: remake(d, "masks/*", ending=".jpg.png"),
    "masks of 32 bits": lambda d: remake(d, "masks/*", np.int32, ".tif"),
    "grey palette": lambda d: remake(d, "masks/a3.png", palette=GREYS),
    "list of Windows": lambda d: (d / "train.txt").write_bytes(WINDOWS),
    "labels.txt of labelme": lambda d: (d / "classes.txt").write_text("#\n__ignore__\nsky,\nland\nsea\n"),
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
    assert split_ids(dataset, "2/5", 0) == split_ids(before, "2/5", 0)
    assert check_files(dataset, ["a0", "a1", "a2", "a3"], ["a4"], (20, 30)) == []
    assert all(map(torch.equal, images, map(dataset.read_image, dataset.train)))
    assert all(np.array_equal(dataset.read_label(f"a{i}"), mask(i)) for i in range(4))


TURN = Image.Exif()
TURN[0x0112] = 6
BROKEN = {  # and words of the message
    "turned image": (lambda d: write(d / "images/v0.png", rgb(5), exif=TURN), "(30, 20), its EXIF applied"),
    "RGB mask": (lambda d: write(d / "masks/a0.png", rgb(0)), "a0.png has mode RGB"),
    "value without a class": (lambda d: write(d / "masks/a2.png", mask(0, C=4)), "a2.png has the value 3"),
    "fractions": (lambda d: remake(d, "masks/a2.png", np.float32, ".tif"), "a2.tif has mode F"),
    "val mask of another size": (lambda d: write(d / "masks/v0.png", mask(0, 9, 8)), "masks/v0.png is"),
    "foreground 255": (lambda d: remake(d, "masks/a[02]*", number(0, 255, 255)), "paint the foreground 1"),
    "all void": (lambda d: remake(d, "masks/a[02]*", number(255, 255, 255)), "a0.png, like all labelled"),
    "val foreground 255": (lambda d: remake(d, "masks/v*", number(0, 255, 255)), "v0.png, like all val"),
    "val without mask": (lambda d: (d / "masks/v0.png").unlink(), "images/v0.png has no mask"),
    "val mask named otherwise": (lambda d: remake(d, "masks/v*", ending="_seg.png"), "masks (PNG, TIFF, BMP"),
    "masks named otherwise": (lambda d: remake(d, "masks/*", ending="_seg.png"), "a0_seg.png fits no image"),
    "masks as JPEG": (lambda d: remake(d, "masks/*", ending=".jpg"), "as JPEG alters classes"),
    "JPEG called PNG": (lambda d: write(d / "masks/v0.png", mask(5), format="JPEG"), "cannot be read as PNG"),
    "palettes that differ": (lambda d: remake(d, "masks/a2.png", palette=GREYS[::-1]), "number the classes"),
    "two masks": (lambda d: write(d / "masks/more/a0.png", mask(0)), "more/a0.png are both masks of a0"),
    "no masks": (lambda d: (d / "masks").rename(d / "labels"), "only 0/5 have a mask of the same name in"),
    "no train.txt": (lambda d: (d / "train.txt").unlink(), "train.txt cannot be read"),
    "empty train.txt": (lambda d: (d / "train.txt").write_text("\n"), "train.txt names no image"),
    "an id for both": (lambda d: (d / "val.txt").write_text("v0\na4\n"), "overlap: 1 ids, a4"),
    "one id twice": (lambda d: write(d / "images/a0.png", rgb(0)), "have the same id, a0"),
    "heading": (lambda d: (d / "classes.txt").write_text("id, name\n0, a\n1, b\n2, c"), "without a heading"),
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
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert str(folder) in str(caught.value) or case == "an id for both"  # not one file's fault


@pytest.mark.parametrize(
    "change, notes",
    [(lambda d: remake(d, "masks/a[02]*", number(0, 1, 1)), ["no labelled mask has a pixel of sea"]),
     (lambda d: remake(d, "masks/v*", number(0, 1, 1, void=0)), ["no validation mask has a pixel of sea"]),
     (lambda d: (d / "classes.txt").write_text("name\nsky\nland\nsea\n"),
      [f"no {part} mask has a pixel of sea" for part in ("labelled", "validation")]),
     (lambda d: write(d / "masks/A4.png", mask(4)), ["A4.png fits no image)"]),
     (lambda d: remake(d, "images/*", lambda a: np.uint16(a[..., 0]) * 16, ".png"),
      ["brightest value 15 of 255 (of 16 bits the upper 8): stretch all alike"])],
)
def test_what_may_be_meant_is_noted(folder, change, notes):
    change(folder)
    dataset = load_dataset("folder", folder)
    found = check_files(dataset, ["a0", "a2"], ["a1", "a3", "a4"], (20, 30))
    assert len(found) == len(notes) and all(map(str.endswith, found, notes))


def test_an_id_is_the_path_where_names_are_not_unique(tmp_path):
    name = unicodedata.normalize("NFD", "größe")  # as a Mac stores it
    for i, path in enumerate(["day/1", "night/1", f"night/{name}", "v"]):
        write(tmp_path / f"images/{path}.jpg", rgb(i))
        write(tmp_path / f"masks/{unicodedata.normalize('NFC', path)}.png", mask(i))
    lists = {"train": "night/1\ngröße\nimages/day/1.jpg", "val": "v", "classes": "sky\nland\nsea"}
    for part, text in lists.items():
        (tmp_path / f"{part}.txt").write_text(text, encoding="utf-8")
    dataset = load_dataset("folder", tmp_path)
    assert dataset.train == ["night/1", "größe", "day/1"]
    assert all(np.array_equal(dataset.read_label(key), mask(i)) for i, key in ((0, "day/1"), (2, "größe")))


@pytest.mark.parametrize(
    "name, given, layout, words",
    [("voc", "VOCdevkit/VOC2012", "VOCdevkit/VOC2012/JPEGImages", "give --data {d}"),
     ("voc", ".", "x/VOCdevkit/VOC2012/JPEGImages", "give --data {d}/x"),
     ("voc", ".", "JPEGImages", "run python data.py voc --data {d}"),
     ("voc", ".", "VOCdevkit/VOC2012/JPEGImages", "run python data.py voc --data {d}"),
     ("cityscapes", "leftImg8bit", "leftImg8bit", "give --data {d}"),
     ("cityscapes", ".", "leftImg8bit/train", "leftImg8bit must have images in train and in val"),
     ("folder", ".", "x", "{d}/images is not a folder: --data must hold images")],
)
def test_a_wrong_layout_is_refused_with_the_folder_or_the_command(tmp_path, name, given, layout, words):
    (tmp_path / layout).mkdir(parents=True)
    with pytest.raises(InputError) as caught:
        load_dataset(name, tmp_path / given)
    assert words.format(d=tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_voc_palette_is_the_published_one():
    assert [tuple(colour) for colour in data.voc_palette()[:21].tolist()] == VOC_COLOURS
    assert len({tuple(colour) for colour in data.voc_palette().tolist()}) == 256


def test_a_shapes_scene_is_a_function_of_its_id():
    shapes = load_dataset("shapes")
    assert not set(shapes.train) & set(shapes.val) and len(shapes.classes) == 5
    pairs = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        np.random.seed(seed)
        pairs.append(shapes.read_pair("train_0003"))
    assert all(map(torch.equal, *pairs))
    image, label = pairs[0]
    assert not any(torch.equal(image, shapes.read_image(other)) for other in ("val_0003", "train_0004"))
    assert image.shape == (3, 48, 48) and image.dtype == label.dtype == torch.uint8


def test_the_pattern_tells_a_class_and_its_colours_do_not():
    scenes = {part: [data.draw_scene(f"{part}_{i:04d}") for i in range(200)] for part in ("train", "val")}
    colour, label = {}, {}
    for part, pairs in scenes.items():
        image = np.concatenate([image.flatten(1).T for image, _ in pairs]).astype(int)
        colour[part], label[part] = image // 32 @ [64, 8, 1], np.concatenate([y.flatten() for _, y in pairs])
    assert set(label["train"]) == {0, 1, 2, 3, 4, 255}
    counts = [np.bincount(colour["train"][label["train"] == c], minlength=512) for c in range(5)]
    likeliest = np.argmax([n / n.sum() for n in counts], axis=0)[colour["val"]]  # by its colour alone
    assert np.mean([(likeliest == c)[label["val"] == c].mean() for c in range(5)]) < 0.45

    bright, steps = [[] for _ in range(5)], [[] for _ in range(5)]
    for image, label in scenes["val"]:
        grey = image.double().mean(0)
        above = grey > grey[label == 0].median()
        for c in set(label.unique().tolist()) - {255}:
            inside = label[:, 1:] == label[:, :-1]
            inside &= label[:, 1:] == c
            bright[c].append(above[label == c].double().mean())
            steps[c].append((above[:, 1:] != above[:, :-1])[inside].double().mean())
    bright = [float(torch.stack(of_class).nanmean()) for of_class in bright]
    steps = [float(torch.stack(of_class).nanmean()) for of_class in steps]
    assert bright[1] > 0.8 and bright[2] < 0.2 and 0.3 < bright[3] < 0.7 and 0.3 < bright[4] < 0.7
    assert steps[1] < 0.1 and steps[2] < 0.1 and steps[4] > 1.5 * steps[3]


# VOC and SBD, with stand-ins for torchvision's data sets


@pytest.fixture
def download(tmp_path, monkeypatch):
    """VOC with train t1, t2 and val v1, v2; SBD with train t1, s1, v1 and val s2, t2, v2, s3. Lists calls."""
    root, calls = tmp_path / "VOCdevkit" / "VOC2012", []

    def voc(folder, year, image_set, download):
        calls.append(("voc", year, image_set, download))
        for i, key in enumerate(["t1", "t2", "v1", "v2"]):
            write(root / "SegmentationClass" / f"{key}.png", mask(i, C=21), VOC_COLOURS)
        for key in ("t1", "t2", "v1", "v2", "s1", "s2", "s3"):
            write(root / "JPEGImages" / f"{key}.jpg", rgb(0))
        for part, ids in (("train", "t1\nt2\n"), ("val", "v1\nv2\n")):
            (root / "ImageSets" / "Segmentation").mkdir(parents=True, exist_ok=True)
            (root / "ImageSets" / "Segmentation" / f"{part}.txt").write_text(ids)

    class Boundaries:
        def __init__(self, folder, image_set, mode, download):
            calls.append(("sbd", image_set, mode, download))
            (Path(folder) / "cls").mkdir(parents=True, exist_ok=not download)
            ids = {"train": ["t1", "s1", "v1"], "val": ["s2", "t2", "v2", "s3"]}[image_set]
            self.images = [f"{folder}/img/{key}.jpg" for key in ids]

        def __getitem__(self, i):
            return None, Image.fromarray(np.full((20, 30), 10 + int(Path(self.images[i]).stem[1:]), np.uint8))

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
    assert download == calls + [("voc", "2012", "trainval", True)] * ("voc" not in unpacked)
    dataset = load_dataset("voc", tmp_path)
    assert (dataset.train, dataset.val) == (["s1", "s2", "s3", "t1", "t2"], ["v1", "v2"])
    assert (dataset.classes[15], dataset.classes[20], len(dataset.classes)) == ("person", "tvmonitor", 21)
    for i, key in enumerate(["t1", "t2", "v1", "v2"]):
        assert np.array_equal(dataset.read_label(key), mask(i, C=21))
    assert all((dataset.read_label(f"s{i}") == 10 + i).all() for i in (1, 2, 3))
    assert check_files(dataset, dataset.train, [], (20, 30)) == []
    data.prepare_voc(tmp_path, (5, 2))  # once more


FAIL = mock.Mock(side_effect=RuntimeError("File not found or corrupted."))


@pytest.mark.parametrize(
    "name, value, words",
    [("VOCSegmentation", FAIL, "not found or corrupted."), ("SBDataset", FAIL, "not found or corrupted."),
     ("SBDataset", SBDataset, "pip install scipy"), ("DATASETS", None, "5, 2 of (10582, 1449)")],
)
def test_why_voc_is_not_merged_is_said_at_once(tmp_path, download, monkeypatch, capsys, name, value, words):
    monkeypatch.setattr(torchvision.datasets, name, value, raising=False)
    monkeypatch.setattr(sys, "argv", ["data.py", "voc", "--data", str(tmp_path)])
    for module in ("scipy", "scipy.io"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit, match="2"):
        data.main()
    err = capsys.readouterr().err
    assert err.startswith("data.py: cannot merge") and words in err and err.count("\n") == 1
    assert not list(tmp_path.rglob("trainaug.txt")) and (download == []) == (name == "SBDataset")

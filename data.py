"""Data sets, splits, views and batches (Sec. 4.2).

    python data.py voc --data DIR      merge PASCAL VOC 2012 and SBD, after downloading what DIR lacks

Four data sets: `shapes` (drawn from a seed), `voc`, `cityscapes`, `folder` (your own images). An unlabelled
image's mask is never opened for training. The images and views of a step depend on seed and step alone.
"""

import argparse
import contextlib
import math
import os
import re
import shutil
import sys
import unicodedata
from collections import Counter
from colorsys import hsv_to_rgb
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from torchvision import datasets
from torchvision.transforms.v2 import functional as TF

VOID = 255
ORDER, VIEW = 0, 1  # parts of the seeds, behind a stream's: of IndexStream, of Views
EXACT = ("PNG", "TIFF", "BMP", "PPM")  # formats that keep the values of masks
FORMATS = (*EXACT, "JPEG", "JPEG2000", "WEBP", "GIF")  # formats of images; no EPS: it is a program
ENDINGS = {end: kind for end, kind in Image.registered_extensions().items() if kind in FORMATS}
DATASETS = ("shapes", "voc", "cityscapes", "folder")
VOC_CLASSES = """background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse
    motorbike person pottedplant sheep sofa train tvmonitor""".split()
SHAPES_CLASSES = "background pale dark striped checked".split()
SHAPES_PALETTE = (70, 70, 70), (229, 57, 57), (143, 229, 57), (57, 229, 229), (143, 57, 229)
SHAPES_TRAIN, SHAPES_VAL, SHAPES_SIZE = 400, 200, 48
MEAN = 255 * torch.tensor([0.485, 0.456, 0.406])[:, None, None]  # ImageNet's, of R, G and B in 0 to 255
DEVIATION = 255 * torch.tensor([0.229, 0.224, 0.225])[:, None, None]


class InputError(ValueError):
    """The user's input cannot be used; the one-line message names the file or option and the remedy."""


def require(condition, message):
    """Raises InputError with this message unless the condition holds."""
    if not condition:
        raise InputError(message)


def one_line(error):
    """What an error says; a loader process wraps it in its traceback, whose last line is the message."""
    return str(error).strip().splitlines()[-1].removeprefix("data.InputError: ")


@contextlib.contextmanager
def replacing(path):
    """A binary file to write, which becomes `path` once it is whole. Raises OSError, naming `path`."""
    try:
        with open(f"{path}.part", "wb") as file:
            yield file
        os.replace(f"{path}.part", path)
    except (OSError, RuntimeError) as error:
        Path(f"{path}.part").unlink(missing_ok=True)
        cause = isinstance(error, RuntimeError) and error.__context__ or error  # torch.save hides a full disk
        raise OSError(f"{path} cannot be written ({getattr(cause, 'strerror', None) or cause})") from None


@dataclass
class Dataset:
    """A data set's files and names, as load_dataset finds them."""

    name: str
    files: dict  # {id: (image path, mask path or None)} of all that is on disk; those of `shapes` are drawn
    train: list  # ids for training, labelled or not
    val: list  # ids for evaluation
    classes: list  # C names
    palette: np.ndarray  # (C or more, 3) uint8 RGB
    crop: bool = False  # training cuts a random window of its size, instead of resizing (Cityscapes)
    train_id: np.ndarray = None  # (256,) uint8: the class that a value of a mask stands for, if not itself
    sought: str = ""  # where masks were looked for, as in "it has no mask of the same name in ..."

    def read_image(self, key):
        """The image `key` -> (3, H, W) uint8 RGB, turned upright. Raises InputError if it cannot be read."""
        return draw_scene(key)[0] if self.name == "shapes" else read_rgb(self.files[key][0])

    def read_label(self, key):
        """The mask file of `key` -> (H, W) uint8, 0 .. C-1 or 255. Raises InputError for anything else."""
        image, path = self.files[key]
        require(path, f"{image} has no mask{self.sought}")
        mask = open_image(path, formats=EXACT)
        label = np.asarray(mask)
        require(label.ndim == 2 and mask.mode != "F", f"{path} has mode {mask.mode}; it must be indexed")
        last = len(self.classes) - 1 if self.train_id is None else 33  # Cityscapes has 34 ids for 19 classes
        wrong = label[(label < 0) | (label > last) & (label != VOID)]
        require(not wrong.size, f"mask {path} has the value {max(wrong, default=0)}, not 0 to {last} or 255")
        label = label if self.train_id is None else self.train_id[label]
        return torch.from_numpy(label.astype(np.uint8))

    def read_pair(self, key):
        """read_image and read_label of `key`. Raises InputError also if the two differ in size."""
        if self.name == "shapes":
            return draw_scene(key)
        image, label = self.read_image(key), self.read_label(key)
        (path, mask), have, want = self.files[key], tuple(label.shape), tuple(image.shape[1:])
        require(have == want, f"mask {mask} is {have} (H, W), but {path} is {want}, its EXIF applied")
        return image, label


def open_image(path, read=ImageOps.exif_transpose, formats=FORMATS):
    """read(image) of a PIL image: by default it is decoded and turned as EXIF says. Raises InputError."""
    try:
        with Image.open(path, formats=formats) as image:
            return read(image)
    except Exception as error:  # damaged bytes reach Pillow's readers as errors of many kinds
        raise InputError(f"{path} cannot be read as {', '.join(formats)} ({error})") from None


def read_rgb(path):
    """An image file -> (3, H, W) uint8 RGB, turned upright; of 16 bits the upper 8. Raises InputError."""
    image = open_image(path)
    require(image.mode not in ("F", "LAB"), f"{path} has mode {image.mode}; it must be RGB or grey integers")
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    image.info.pop("transparency", None)
    return TF.pil_to_tensor(image.convert("RGB"))


def within(low, high=math.inf, kind=int):
    """An argparse type, for all scripts: a number of this kind, low <= number <= high."""

    def number(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return kind(text)

    return number


def load_dataset(name, data="datasets"):
    """The Dataset `name`, one of DATASETS. Raises InputError if something is missing or ambiguous.

    data  the folder that holds VOCdevkit/VOC2012 (voc), leftImg8bit and gtFine (cityscapes), or images,
          masks, train.txt, val.txt and classes.txt (folder); `shapes` ignores it"""
    palette, train_id = voc_palette(), None
    if name == "shapes":
        train = [f"train_{i:04d}" for i in range(SHAPES_TRAIN)]
        val = [f"val_{i:04d}" for i in range(SHAPES_VAL)]
        files = dict.fromkeys(train + val, ("drawn", "drawn"))
        return Dataset(name, files, train, val, SHAPES_CLASSES, np.uint8(SHAPES_PALETTE))
    below = {"voc": "VOCdevkit/VOC2012/JPEGImages", "cityscapes": "leftImg8bit", "folder": "images"}[name]
    images, here = Path(data, below), Path(os.path.abspath(data))
    root = images.parent
    if not images.is_dir():
        tops = [top for top in (*here.parents, *here.glob("*")) if (top / below).is_relative_to(here)]
        advice = [f"give --data {top}" for top in tops if (top / below).is_dir()]
        advice += [f"--data must hold {below}" + f" (run python data.py voc --data {data})" * (name == "voc")]
        raise InputError(f"{images} is not a folder: {advice[0]}")
    if name == "voc":
        masks, lists = root / "SegmentationClassAug", root / "ImageSets/Segmentation"
        made = masks.is_dir() and (lists / "trainaug.txt").exists()
        require(made, f"{masks} or trainaug.txt is missing: run python data.py voc --data {data}")
        files, sought = match_files(images, masks)
        train, val = read_list(lists / "trainaug.txt", files), read_list(lists / "val.txt", files)
        classes = VOC_CLASSES
    elif name == "folder":
        files, sought = match_files(images, root / "masks")
        train, val = read_list(root / "train.txt", files), read_list(root / "val.txt", files)
        lines = read_lines(root / "classes.txt")  # CVAT begins with a comment, labelme with its name of void
        classes = [line for line in lines if line != "__ignore__" and not line.startswith("#")]
        require(1 < len(classes) < 256, f"{root / 'classes.txt'} names {len(classes)} classes, not 2 to 255")
        numbers = re.findall(r"^(\d+)[\s:;,=]", "\n".join(classes), re.MULTILINE)
        ordered = len(numbers) < max(2, len(classes) - 1) or numbers == [f"{i}" for i in range(len(classes))]
        require(ordered, f"{root / 'classes.txt'} must name one class a line, from 0 on, without a heading")
    else:
        files, sought = match_files(images, root / "gtFine", "_leftImg8bit", "_gtFine_labelIds")
        train, val = ([k for k in files if images / part in files[k][0].parents] for part in ("train", "val"))
        require(train and val, f"{images} must have images in train and in val")
        entries = sorted((c.train_id, c.id, c.color, c.name) for c in datasets.Cityscapes.classes)
        order, ids, colours, classes = zip(*(entry for entry in entries if 0 <= entry[0] < VOID))
        palette, train_id = np.uint8(colours), np.full(256, VOID, np.uint8)
        train_id[list(ids)] = order
    return Dataset(name, files, train, val, list(classes), palette, name == "cityscapes", train_id, sought)


def image_files(folder, end="", formats=FORMATS, prefix="", above=()):
    """(name, path) of the images below a folder; the name is the path below it, without `end` and ending."""
    above = (*above, folder.resolve())
    for path in sorted(folder.glob("[!.]*")):  # without ._a.jpg of a Mac
        name, ending = os.path.splitext(prefix + unicodedata.normalize("NFC", path.name))
        if ENDINGS.get(ending.lower()) in formats and name.endswith(end):
            yield name.removesuffix(end), path
        elif path.is_dir() and path.resolve() not in above:  # else a link leads in a circle
            yield from image_files(path, end, formats, f"{name}{ending}/", above)


def match_files(images, masks, image_end="", mask_end=""):
    """({id: (image path, mask path or None)}, where masks were looked for) of all files below two folders.

    An id is an image's name or, if others have it too, its path below `images`. InputError for twins."""
    found, files, left = list(image_files(images, image_end)), {}, []
    count = Counter(os.path.basename(name) for name, _ in found)
    for name, path in found:
        key = os.path.basename(name) if count[os.path.basename(name)] == 1 else name
        first, _ = files.setdefault(key, (path, None))
        require(first is path, f"{first} and {path} have the same id, {key}: rename one")
    for name, path in image_files(masks, mask_end, EXACT):
        image, first = files.get(key := find_id(name, files), (None, None))
        require(not first, f"{first} and {path} are both masks of {key}: rename one")
        if image:
            files[key] = (image, path)
        else:
            left.append(path.name)
    rest = f"; {left[0]} fits no image" if left else "" if masks.is_dir() else "; there is no such folder"
    return files, f" of the same name in {masks} ({', '.join(EXACT)}, as JPEG alters classes{rest})"


def find_id(path, files):
    """The id in `files` that a path ends with, behind folders (not ".." or another file's name); or None."""
    name, ending = os.path.splitext(path)
    name = (name if ending.lower() in ENDINGS else path).removesuffix("_leftImg8bit")
    for text in (path, name):
        for start in (0, *(i + 1 for i, letter in enumerate(text) if letter == "/")):
            if text[start:] in files and not re.search(r"\.\.|\.[A-Za-z]\w+[\s,;]", text[:start]):
                return text[start:]


def read_lines(path):
    """The lines of a text file in UTF-8 or UTF-16, without outer blanks, commas and quotes. Or InputError."""
    try:
        content = Path(path).read_bytes()
        text = unicodedata.normalize("NFC", content.decode("utf-16" if b"\0" in content else "utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"list file {path} cannot be read as text in UTF-8 ({error})") from None
    return [line.strip().strip(",;\"'") for line in text.splitlines() if line.strip()]


def read_list(path, files):
    """The ids in a list file, once each. Raises InputError if a line names no image.

    A line is an id, an image's path, or the paths of an image and its mask, of one name."""
    ids = []
    for line in (line.replace("\\", "/")[:999] for line in read_lines(path)):
        pair = re.fullmatch(r"((?:.*/)?(.+?)(?:_leftImg8bit)?\.\w+)[\s,;]+(?:.*/)?\2[._-].*", line)
        ids.append(find_id(line, files) or pair and find_id(pair[1], files))
        require(ids[-1], f"{path} names {line[:80]!r}: no image has this name, or several have")
    require(ids, f"{path} names no image")
    return list(dict.fromkeys(ids))


def voc_palette():
    """PASCAL VOC's colours, (256, 3) uint8: the bits of the class number, spread over red, green and blue."""
    bits = np.arange(256)[:, None, None] >> np.arange(24).reshape(8, 3) & 1  # (256, 8, 3): lowest bits first
    return (bits << np.arange(7, -1, -1)[:, None]).sum(1).astype(np.uint8)


def draw_scene(key):
    """One scene of `shapes`, from its id: image (3, 48, 48) uint8, label (48, 48) uint8 with 255 for void.

    Polygons occlude each other, half of them with a void rim. Where it is brighter than the background tells
    the class: all over, nowhere, in stripes, in checks. Colours are random, the light's too: those of a few
    labelled scenes a network learns by heart, while unlabelled ones and A's jitter show how they vary."""
    rng = np.random.default_rng([int(key.startswith("val")), int(key[-4:])])
    x, y = np.meshgrid(*[np.arange(SHAPES_SIZE)] * 2)
    slope = rng.uniform(-0.5, 0.5, 2)
    grey = rng.uniform(60, 140) + x * slope[0] + y * slope[1]  # the background's brightness
    image, label = grey[..., None] + rng.uniform(-25, 25, 3), np.zeros(grey.shape, np.uint8)
    for _ in range(rng.integers(2, 6)):
        kind, corners = int(rng.integers(1, len(SHAPES_CLASSES))), int(rng.integers(3, 9))
        centre, radius, turn = rng.uniform(0, SHAPES_SIZE, 2), rng.uniform(8, 15), rng.uniform(0, 2 * math.pi)
        angles = turn + np.arange(corners) * 2 * math.pi / corners
        distance = radius * rng.uniform(0.7, 1.2, corners)
        outline = centre + distance[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)
        stencil = Image.new("L", (SHAPES_SIZE, SHAPES_SIZE))
        ImageDraw.Draw(stencil).polygon(outline.flatten().tolist(), fill=255)
        inside = np.asarray(stencil) > 0
        along, across = x * math.cos(turn) + y * math.sin(turn), y * math.cos(turn) - x * math.sin(turn)
        stripes, wave = np.sin(along * 2 * math.pi / rng.uniform(9, 13)) > 0, 2 * math.pi / rng.uniform(5, 7)
        checks = np.sin(along * wave) * np.sin(across * wave) > 0
        tints = np.array([hsv_to_rgb(rng.uniform(), rng.uniform(0.1, 0.7), 1) for _ in range(2)])
        tints /= tints @ [[0.299], [0.587], [0.114]]  # all of the same brightness, 1
        light, dark = grey + rng.uniform(35, 75), grey - rng.uniform(35, 75)
        bright = (inside, ~inside, stripes, checks)[kind - 1][..., None]
        paint = np.where(bright, light[..., None] * tints[0], dark[..., None] * tints[1])
        image[inside], label[inside] = paint[inside], kind
        if rng.random() < 0.5:
            grown = np.asarray(stencil.filter(ImageFilter.MaxFilter(3)))
            shrunk = np.asarray(stencil.filter(ImageFilter.MinFilter(3)))
            label[grown != shrunk] = VOID
    gain = np.exp(rng.uniform(-0.4, 0.4, 3) + rng.uniform(-0.4, 0.2))  # of the light: red, green, blue
    image = (image * gain + rng.normal(0, 6, image.shape)).clip(0, 255).astype(np.uint8)
    return torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(label)


def split_ids(dataset, ratio, number, labeled_list=None, unlabeled_list=None):
    """(labelled ids, unlabelled ids) for training, disjoint; list files replace the draw and the rest.

    ratio, such as "1/20", is the labelled share of all training ids, rounded down; `number` seeds the draw.
    Raises InputError if the ratio is nonsense, masks are too few, or the lists overlap."""
    if labeled_list:
        labeled = read_list(labeled_list, dataset.files)
    else:
        # All are permuted, so that unlabelled masks do not matter, by what is the same in every NumPy.
        order = np.random.RandomState(number).permutation(len(dataset.train))
        with_mask = [i for i in order if dataset.files[dataset.train[i]][1]]
        try:
            share = Fraction(ratio)
        except (ValueError, ZeroDivisionError):
            raise InputError(f"--ratio {ratio} is not a number such as 1/20 or 0.05") from None
        count, most = math.floor(share * len(dataset.train)), f"{len(with_mask)}/{len(dataset.train)}"
        require(0 < share <= 1 and count, f"--ratio {ratio} must be over 0, at most 1, and label an image")
        few = f"--ratio {ratio} asks for {count} labelled images, but only {most} have a mask{dataset.sought}"
        require(count <= len(with_mask), f"{few}: give at most --ratio {most}")
        labeled = [dataset.train[i] for i in sorted(with_mask[:count])]
    known = set(labeled)
    rest = [key for key in dataset.train if key not in known]
    unlabeled = read_list(unlabeled_list, dataset.files) if unlabeled_list else rest
    both = sorted(known.intersection(unlabeled) or known.union(unlabeled).intersection(dataset.val))
    require(not both, f"labelled, unlabelled, validation ids overlap: {len(both)} ids, {' '.join(both[:1])}")
    return labeled, unlabeled


def check_files(dataset, labeled, unlabeled, size):
    """Notes on the data, a list of lines; raises InputError for what would break or mislead the training.

    Decodes labelled and validation images with their masks; of unlabelled images it reads the headers alone.
    Refused are unreadable files, images that a crop of `size` does not fit in, and masks that are missing, of
    another size, of void and one class at most, or whose palettes contradict each other."""
    if dataset.name == "shapes":
        return []
    counts, brightest, colours = dict.fromkeys([*labeled, *dataset.val]), [], {}
    notes = [f"an image's mask is the one{dataset.sought}"] if "fits no image" in dataset.sought else []

    def check(key):
        path, mask = dataset.files[key]
        W, H = open_image(path, lambda image: image.size)
        require(not dataset.crop or H >= size[0] and W >= size[1], f"{path} is {H}x{W}, too small for --size")
        if key not in counts:
            return
        image, label = dataset.read_pair(key)
        brightest.append(int(image.max()))
        counts[key] = np.bincount(label.flatten(), minlength=256)
        palette = open_image(mask, lambda mask: mask.getpalette() if mask.mode == "P" else [])
        grey = palette == [i // 3 for i in range(len(palette))]  # tells nothing
        for value in np.flatnonzero(counts[key][: 0 if grey else min(VOID, len(palette) // 3)]):
            colour = palette[3 * value : 3 * value + 3]
            other, first = colours.setdefault(value, (colour, mask))
            differ = f"value {value} has the colour {other} in {first}, but {colour} in {mask}"
            require(colour == other, f"{differ}: number the classes alike in all masks")

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding releases the interpreter's lock
        list(pool.map(check, [*counts, *unlabeled]))
    for part, keys in (("labelled", labeled), ("validation", dataset.val)):
        count, mask = sum(counts[key] for key in keys), dataset.files[keys[0]][1]
        absent = [name for name, pixels in zip(dataset.classes, count) if not pixels]
        several = not count[VOID] or len(dataset.classes) - len(absent) > 1
        require(several, f"{mask}, like all {part} masks, has one class; 255 is void: paint the foreground 1")
        if absent:
            notes.append(f"no {part} mask has a pixel of {', '.join(absent)}")
    if max(brightest) < 64:
        notes.append(f"brightest value {max(brightest)} of 255 (of 16 bits the upper 8): stretch all alike")
    return notes


def normalize(image):
    """(..., 3, H, W) uint8 -> X: float32 with ImageNet's mean 0 and deviation 1, on the same device."""
    mean, deviation = (x.to(image.device, non_blocking=True) for x in (MEAN, DEVIATION))
    return (image - mean) / deviation


def resize(image, label, size):
    """image (3, H, W) uint8, bilinear; label (H, W) uint8 or None, nearest -> the two at size (H', W')."""
    bilinear, nearest = TF.InterpolationMode.BILINEAR, TF.InterpolationMode.NEAREST_EXACT
    image = TF.resize(image, list(size), bilinear, antialias=True)
    return image, None if label is None else TF.resize(label[None], list(size), nearest)[0]


def perturb(image, rng):
    """A.X, the perturbed view (Sec. 4.2): colour jitter, and grey with probability 0.2; (3, H, W) uint8."""
    adjust = TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue
    factor = *rng.uniform(0.6, 1.4, 3), rng.uniform(-0.1, 0.1)
    for i in rng.permutation(4):
        image = adjust[i](image, factor[i])
    return TF.rgb_to_grayscale(image, num_output_channels=3) if rng.random() < 0.2 else image


class Views(torch.utils.data.Dataset):
    """Training samples: views[index, draw] is image number `index`, augmented by the numbers of `draw`.

    labeled=True   (image, label): X (3, H, W) uint8 and Y (H, W) uint8
    labeled=False  (image_u, image_a): X and A.X, (3, H, W) uint8, of one geometry; no mask is opened
    stream         tuple of ints that keeps the random numbers of stages and of the two kinds apart"""

    def __init__(self, dataset, ids, size, labeled, stream):
        self.dataset, self.ids, self.size, self.labeled, self.stream = dataset, ids, size, labeled, stream

    def __getitem__(self, item):
        index, draw = item
        rng = np.random.default_rng([*self.stream, VIEW, draw])
        key = self.ids[index]
        image, label = self.dataset.read_pair(key) if self.labeled else (self.dataset.read_image(key), None)
        if self.dataset.crop:
            top, left = (int(rng.integers(have - want + 1)) for have, want in zip(image.shape[1:], self.size))
            window = (..., slice(top, top + self.size[0]), slice(left, left + self.size[1]))
            image, label = image[window], label[window] if self.labeled else None
        else:
            image, label = resize(image, label, self.size)
        if rng.random() < 0.5:
            image, label = image.flip(-1), label.flip(-1) if self.labeled else None
        return (image, label) if self.labeled else (image, perturb(image, rng))


def share_of_batch(batch_size, rank, world):
    """The slice of a batch that is process `rank`'s, as even as it goes: 6 on 4 are 2 + 2 + 1 + 1."""
    return slice(*(r * (batch_size // world) + min(r, batch_size % world) for r in (rank, rank + 1)))


class IndexStream:
    """Batch sampler: for each step of start .. stop-1, this process's part of the batch, (index, draw) pairs.

    Draw d is place d of an endless sequence of permutations: a batch depends on stream and step alone."""

    def __init__(self, length, batch_size, stream, start, stop, rank=0, world=1):
        self.length, self.batch_size, self.stream = length, batch_size, stream
        self.steps, self.share = range(start, stop), share_of_batch(batch_size, rank, world)

    def __iter__(self):
        for step in self.steps:
            draws = range(step * self.batch_size, (step + 1) * self.batch_size)[self.share]
            seeds = {draw // self.length: [*self.stream, ORDER, draw // self.length] for draw in draws}
            order = {e: np.random.default_rng(seed).permutation(self.length) for e, seed in seeds.items()}
            yield [(int(order[draw // self.length][draw % self.length]), draw) for draw in draws]


def be_quiet(worker_id):
    """For loader processes: when Ctrl-C ends them their threads need not say so. Errors come with batches."""
    sys.excepthook = lambda *error: None


def make_loader(dataset, ids, size, labeled, batch_size, stream, start, stop, rank=0, world=1, workers=0):
    """Batches of Views for the steps start .. stop-1, in order: this process's share of batch_size."""
    views = Views(dataset, ids, size, labeled, stream)
    batches = IndexStream(len(ids), batch_size, stream, start, stop, rank, world)
    pin = torch.cuda.is_initialized()  # not for training on a CPU beside an unused GPU
    return torch.utils.data.DataLoader(
        views, batch_sampler=batches, num_workers=workers, worker_init_fn=be_quiet, pin_memory=pin
    )


def prepare_voc(data, counts=(10582, 1449)):
    """Make SegmentationClassAug and trainaug.txt of VOC and SBD, downloaded unless unpacked below `data`.

    Training ids are SBD's less VOC's val, plus VOC's train, which keep their masks. Raises InputError unless
    there are `counts` training and validation ids, and OSError or RuntimeError if a download fails."""
    root = next(Path(data).glob("**/VOC2012"), Path(data, "VOCdevkit/VOC2012"))
    sbd = next(Path(data).glob("**/cls"), Path(data, "sbd/cls"))
    masks, lists = root / "SegmentationClassAug", root / "ImageSets/Segmentation"
    parts = [datasets.SBDataset(sbd.parent, p, "segmentation", not sbd.is_dir()) for p in ("train", "val")]
    if not (root / "JPEGImages").is_dir():  # behind SBD, for which torchvision asks for scipy
        datasets.VOCSegmentation(data, "2012", "trainval", download=True)
    shutil.copytree(root / "SegmentationClass", masks, dirs_exist_ok=True)
    train, val = (set(read_lines(lists / f"{part}.txt")) for part in ("train", "val"))
    own = train | val
    for part in parts:
        for number, key in enumerate(Path(image).stem for image in part.images):
            if key not in own:
                part[number][1].save(masks / f"{key}.png")
                train.add(key)
    require((len(train), len(val)) == counts, f"{data} lacks images: {len(train)}, {len(val)} of {counts}")
    with replacing(lists / "trainaug.txt") as file:
        file.write("".join(f"{key}\n" for key in sorted(train)).encode())


def main():
    parser = argparse.ArgumentParser(description="Merge PASCAL VOC 2012 and SBD; download what lacks.")
    parser.add_argument("dataset", choices=["voc"])
    parser.add_argument("--data", default="datasets", metavar="DIR", help="where VOCdevkit and sbd are or go")
    try:
        prepare_voc(parser.parse_args().data)
    except (OSError, RuntimeError, InputError) as error:
        parser.exit(2, f"data.py: cannot merge VOC 2012 and SBD: {error}\n")
    print("10,582 training and 1,449 validation images")


if __name__ == "__main__":
    main()

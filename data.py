"""Data sets, splits, views and batches (Sec. 4.2).

    python data.py voc --data DIR      download and merge PASCAL VOC 2012 and SBD (10,582 + 1,449 images)

Four data sets: `shapes` (drawn from a seed, no file), `voc`, `cityscapes`, `folder` (your own images). An
unlabelled image needs no mask, and its mask is never opened for training. Which images a step sees, and how
they are augmented, is a function of the seed and the step alone: not of the number of processes or workers,
nor of being interrupted.
"""

import argparse
import atexit
import contextlib
import math
import multiprocessing
import os
import signal
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from torchvision.transforms.v2 import functional as TF

VOID = 255
ORDER, VIEW = 0, 1  # parts of the seeds, behind a stream's: of IndexStream, of Views
CITYSCAPES_IDS = 34  # values of a labelIds mask, mapped to 19 classes and void
MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None] * 255  # ImageNet's, of R, G, B
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None] * 255
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF")  # whatever the name's ending; no EPS: it is a program
DATASETS = ("shapes", "voc", "cityscapes", "folder")
VOC_CLASSES = (
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike "
    "person pottedplant sheep sofa train tvmonitor"
).split()
SHAPES_CLASSES = "background disk ring square striped_square triangle cross".split()
SHAPES_TRAIN, SHAPES_VAL, SHAPES_SIZE = 800, 100, 96

warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # open_image refuses such images


class InputError(ValueError):
    """The user's input cannot be used; the one-line message names the file or option and the remedy."""


def one_line(error):
    """What an error says; a loader process wraps it in its traceback, whose last line is the message."""
    return str(error).strip().splitlines()[-1].removeprefix("data.InputError: ")


@contextlib.contextmanager
def replacing(path):
    """A binary file to write, which becomes `path` once all of it is on the disk.

    Raises OSError, naming `path`, if it cannot be written; what was at `path` then stays.
    """
    aside = Path(f"{path}.part")
    try:
        with open(aside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        if isinstance(error.__context__, OSError):  # torch.save hides a full disk behind a RuntimeError
            error = error.__context__
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise OSError(f"{path} cannot be written ({reason})") from None


@dataclass
class Dataset:
    """A data set's files and names, as load_dataset finds them.

    files    {id: (image path, mask path or None)} of all that is on disk; for `shapes` the paths are None
    train    ids for training, labelled or not; val: ids for evaluation
    classes  C names; palette (256, 3) uint8 RGB; void is 255 in masks
    crop     training cuts a random window of the training size (Cityscapes) instead of resizing to it
    train_id None, or (256,) uint8: what each value of a mask stands for
    """

    name: str
    files: dict
    train: list
    val: list
    classes: list
    palette: np.ndarray
    crop: bool = False
    train_id: np.ndarray = None

    def has_mask(self, key):
        """Whether `key` could be a labelled image."""
        return self.name == "shapes" or self.files[key][1] is not None

    def read_image(self, key):
        """The image `key` -> (3, H, W) uint8 RGB, turned upright. Raises InputError if it cannot be read."""
        if self.name == "shapes":
            return draw_scene(key)[0]
        return read_rgb(self.files[key][0])

    def read_label(self, key):
        """The mask of `key` -> (H, W) uint8, 0 .. C-1 or 255. Raises InputError if it is anything else."""
        if self.name == "shapes":
            return draw_scene(key)[1]
        image, path = self.files[key]
        if path is None:
            raise InputError(f"{image} has no mask")
        mask = open_image(path)
        if mask.mode not in ("L", "P", "1", "I;16", "I"):
            raise InputError(f"mask {path} has mode {mask.mode}; it must be grey or indexed by class")
        label = np.asarray(mask)
        known = len(self.classes) if self.train_id is None else CITYSCAPES_IDS
        wrong = label[(label < 0) | (label >= known) & (label != VOID)]
        if wrong.size:
            raise InputError(
                f"mask {path} has the value {wrong[0]}: neither one of {known} classes nor 255 (void)"
            )
        label = label if self.train_id is None else self.train_id[label]
        return torch.from_numpy(label.astype(np.uint8))

    def read_pair(self, key):
        """read_image and read_label of `key`. Raises InputError also if the two differ in size."""
        if self.name == "shapes":
            return draw_scene(key)
        image, label = self.read_image(key), self.read_label(key)
        if image.shape[1:] != label.shape:
            (path, mask), have, want = self.files[key], tuple(label.shape), tuple(image.shape[1:])
            raise InputError(f"mask {mask} is {have} (H, W), but its image {path} is {want}")
        return image, label


def open_image(path, read=ImageOps.exif_transpose):
    """read(image) of an opened PIL image: by default the image, decoded and turned upright as EXIF says.

    Raises InputError, naming the file, if it cannot be read or is unreasonably large.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            if math.prod(image.size) > Image.MAX_IMAGE_PIXELS:
                raise ValueError(f"it has more than {Image.MAX_IMAGE_PIXELS} pixels: cut it into tiles")
            return read(image)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except Exception as error:  # damaged bytes reach Pillow's readers as errors of many kinds
        raise InputError(f"{path} cannot be read as an image ({error})") from None


def read_rgb(path):
    """An image file -> (3, H, W) uint8 RGB, turned upright. Raises InputError as open_image.

    Of 16 bits the upper 8 count; transparency does not.
    """
    image = open_image(path)
    if image.mode == "F":
        raise InputError(f"{path} holds fractions; it must have 8 or 16 bits a channel")
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    image.info.pop("transparency", None)
    return TF.pil_to_tensor(image.convert("RGB"))


def upright_size(image):
    """(H, W) of a PIL image as it will be when turned upright; reads its header alone."""
    on_its_side = image.getexif().get(0x0112, 1) > 4  # the EXIF entry "orientation"
    return image.size if on_its_side else image.size[::-1]


def within(low, high=math.inf, kind=int):
    """An argparse type, for all scripts: a number of this kind, low <= number <= high."""

    def number(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value

    return number


def load_dataset(name, data="datasets"):
    """Find a data set's files.

    name  one of DATASETS
    data  the folder that holds VOCdevkit/VOC2012 (voc), leftImg8bit and gtFine (cityscapes), or images,
          masks, train.txt, val.txt and classes.txt (folder); `shapes` ignores it
    Returns a Dataset. Raises InputError if something is missing.
    """
    if name == "shapes":
        train = [f"train_{i:04d}" for i in range(SHAPES_TRAIN)]
        val = [f"val_{i:04d}" for i in range(SHAPES_VAL)]
        files = {key: (None, None) for key in train + val}
        return Dataset(name, files, train, val, SHAPES_CLASSES, voc_palette())
    root = Path(data)
    if name == "voc":
        root = root / "VOCdevkit" / "VOC2012"
        files = match_files(root / "JPEGImages", root / "SegmentationClassAug")
        lists = root / "ImageSets" / "Segmentation"
        train, val = read_list(lists / "trainaug.txt", files), read_list(lists / "val.txt", files)
        dataset = Dataset(name, files, train, val, VOC_CLASSES, voc_palette())
    elif name == "folder":
        files = match_files(root / "images", root / "masks")
        train, val = read_list(root / "train.txt", files), read_list(root / "val.txt", files)
        classes = read_lines(root / "classes.txt")
        if len(classes) < 2 or len(classes) > 255:
            raise InputError(
                f"{root / 'classes.txt'} names {len(classes)} classes; it must name 2 to 255, one a line"
            )
        dataset = Dataset(name, files, train, val, classes, voc_palette())
    else:
        train, val = (
            match_files(
                root / "leftImg8bit" / part, root / "gtFine" / part, "_leftImg8bit", "_gtFine_labelIds"
            )
            for part in ("train", "val")
        )
        palette, train_id = np.zeros((256, 3), np.uint8), np.full(256, VOID, np.uint8)
        entries = [c for c in torchvision.datasets.Cityscapes.classes if 0 <= c.train_id < VOID]
        for entry in entries:
            palette[entry.train_id], train_id[entry.id] = entry.color, entry.train_id
        classes = [entry.name for entry in sorted(entries, key=lambda entry: entry.train_id)]
        dataset = Dataset(name, {**train, **val}, list(train), list(val), classes, palette, True, train_id)
    for part in ("train", "val"):
        if not getattr(dataset, part):
            raise InputError(f"the {part} split of {root} is empty")
    return dataset


def match_files(images, masks, image_end="", mask_end=""):
    """{id: (image path, mask path or None)} of all files below two folders; id = file name."""
    if not images.is_dir():
        raise InputError(f"{images} is not a folder; --data must name the one above it (README, Data)")
    found = (path for path in masks.rglob(f"*{mask_end}.*") if path.suffix.lower() == ".png")
    mask_of = {path.stem.removesuffix(mask_end): path for path in found}
    files = {}
    for path in sorted(images.rglob(f"*{image_end}.*")):
        if path.suffix.lower() not in (".jpg", ".jpeg", ".png"):
            continue
        key = path.stem.removesuffix(image_end)
        if key in files:
            raise InputError(f"{files[key][0]} and {path} have the same id, {key}: rename one")
        files[key] = (path, mask_of.get(key))
    return files


def read_lines(path):
    """The lines of a text file that are not blank, stripped. Raises InputError if it cannot be read."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"list file {path} cannot be read ({error})") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def read_list(path, files):
    """The ids that a list file names, each once, in its order.

    A line is an id, or an "image mask" pair of paths as other projects ship them: the image's name counts.
    Raises InputError if the file cannot be read or an id has no image.
    """
    ids = []
    for line in read_lines(path):
        name = Path(line.split()[0]).name
        candidates = (line, name, Path(name).stem, Path(name).stem.removesuffix("_leftImg8bit"))
        key = next((c for c in candidates if c in files), None)
        if key is None or ".." in Path(line.split()[0]).parts:
            raise InputError(f"{path} names {line[:80]!r}, of which there is no image")
        ids.append(key)
    return list(dict.fromkeys(ids))


def voc_palette():
    """PASCAL VOC's colours, (256, 3) uint8: the bits of the class number, spread over red, green and blue."""
    value, palette = np.arange(256), np.zeros((256, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            palette[:, channel] |= (((value >> (3 * bit + channel)) & 1) << (7 - bit)).astype(np.uint8)
    return palette


def draw_scene(key):
    """One scene of `shapes`, drawn from its id alone.

    Objects of six classes occlude each other. Colours are random, so that only form or texture tells the
    class; rings and crosses are thin; half of the objects have a void rim.
    Returns image (3, 96, 96) uint8, label (96, 96) uint8 with 255 for void.
    """
    part, number = key.split("_")
    rng = np.random.default_rng([("train", "val").index(part), int(number)])
    size = SHAPES_SIZE
    y, x = np.mgrid[:size, :size]
    slope = rng.uniform(-0.5, 0.5, (2, 3))
    image = rng.uniform(40, 215, 3) + x[..., None] * slope[0] + y[..., None] * slope[1]  # (96, 96, 3)
    label = np.zeros((size, size), np.uint8)
    for _ in range(rng.integers(3, 8)):
        kind = int(rng.integers(1, len(SHAPES_CLASSES)))
        name = SHAPES_CLASSES[kind]
        centre, radius, turn = rng.uniform(0, size, 2), rng.uniform(8, 20), rng.uniform(0, 2 * math.pi)
        stencil = Image.new("L", (size, size))
        draw = ImageDraw.Draw(stencil)

        def polygon(angles, scale=1.0, fill=255):
            points = [
                centre + radius * scale * np.array([math.cos(a + turn), math.sin(a + turn)]) for a in angles
            ]
            draw.polygon([tuple(p) for p in points], fill=fill)

        if name in ("disk", "ring"):
            circle = np.linspace(0, 2 * math.pi, 33)[:-1]
            polygon(circle)
            if name == "ring":
                polygon(circle, 1 - 4 / radius, fill=0)
        elif name == "triangle":
            polygon(np.array([0, 2, 4]) * math.pi / 3)
        elif name == "cross":
            for arm in (0, math.pi / 2):
                polygon([arm - 0.18, arm + 0.18, arm + math.pi - 0.18, arm + math.pi + 0.18])
        else:
            polygon(np.array([1, 3, 5, 7]) * math.pi / 4)
        inside = np.asarray(stencil) > 0
        colour = np.broadcast_to(rng.uniform(20, 235, 3), image.shape)
        if name == "striped_square":
            stripes = np.sin((x * math.cos(turn) + y * math.sin(turn)) * 2 * math.pi / 6) > 0
            colour = np.where(stripes[..., None], colour, rng.uniform(20, 235, 3))
        image[inside], label[inside] = colour[inside], kind
        if rng.random() < 0.5:
            grown = np.asarray(stencil.filter(ImageFilter.MaxFilter(3)))
            shrunk = np.asarray(stencil.filter(ImageFilter.MinFilter(3)))
            label[grown != shrunk] = VOID
    image = (image + rng.normal(0, 12, image.shape)).clip(0, 255).astype(np.uint8)
    return torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(label)


def split_ids(dataset, ratio, number, labeled_list=None, unlabeled_list=None):
    """Which training images are labelled, and which are used without a label.

    ratio           labelled share of all training ids, rounded down: a string such as "1/20", "0.05", "1"
    number          which of the seeded subsets (0, 1, 2 for the paper's averages)
    labeled_list    a list file instead of ratio and number
    unlabeled_list  a list file instead of all other ids
    Returns (labelled ids, unlabelled ids), disjoint. Labelled ids are drawn from those that have a mask.
    Raises InputError if the ratio is nonsense or leaves no image, masks are too few, or the lists overlap.
    """
    if labeled_list:
        labeled = read_list(labeled_list, dataset.files)
        if not labeled:
            raise InputError(f"--labeled-list {labeled_list} names no image")
        bare = [key for key in labeled if not dataset.has_mask(key)]
        if bare:
            raise InputError(f"--labeled-list {labeled_list} names {bare[0]}, which has no mask")
    else:
        try:
            share = Fraction(ratio)
        except (ValueError, ZeroDivisionError):
            raise InputError(f"--ratio {ratio} is not a number such as 1/20 or 0.05") from None
        if not 0 < share <= 1:
            raise InputError(f"--ratio {ratio} is not above 0 and at most 1")
        with_mask = [key for key in dataset.train if dataset.has_mask(key)]
        count = math.floor(share * len(dataset.train))
        if count == 0:
            raise InputError(
                f"--ratio {ratio} of {len(dataset.train)} training images leaves no labelled one"
            )
        if count > len(with_mask):
            raise InputError(
                f"--ratio {ratio} asks for {count} labelled images, but only {len(with_mask)} of the "
                f"{len(dataset.train)} training images have a mask"
            )
        # All ids are permuted, so that deleting an unlabelled image's mask changes nothing. RandomState's
        # stream is frozen, so that a split is the same with every version of NumPy.
        order = [dataset.train[i] for i in np.random.RandomState(number).permutation(len(dataset.train))]
        drawn = set([key for key in order if dataset.has_mask(key)][:count])
        labeled = [key for key in dataset.train if key in drawn]
    if unlabeled_list:
        unlabeled = read_list(unlabeled_list, dataset.files)
        both = set(labeled).intersection(unlabeled)
        if both:
            raise InputError(
                f"the labelled and unlabelled lists overlap: {len(both)} ids, {sorted(both)[0]} is one"
            )
    else:
        known = set(labeled)
        unlabeled = [key for key in dataset.train if key not in known]
    leak = set(dataset.val).intersection([*labeled, *unlabeled])
    if leak:
        raise InputError(f"training and validation lists overlap: {len(leak)} ids, {sorted(leak)[0]} is one")
    return labeled, unlabeled


def check_files(dataset, labeled, unlabeled, size):
    """Refuse before the first step what would break in mid-run.

    Decodes labelled and validation images with their masks; of unlabelled images it reads the headers alone.
    Raises InputError for what cannot be read, a mask whose size is not its image's or whose values are not
    classes, a validation image without a mask, and images that a crop of `size` does not fit in.
    """
    if dataset.name == "shapes":
        return

    def check(key, with_mask):
        path = dataset.files[key][0]
        have = dataset.read_pair(key)[0].shape[1:] if with_mask else open_image(path, upright_size)
        if dataset.crop and (have[0] < size[0] or have[1] < size[1]):
            raise InputError(f"{path} is {have[0]}x{have[1]}, smaller than --size {size[0]} {size[1]}")

    keys = [*labeled, *dataset.val, *unlabeled]
    with_mask = [True] * (len(labeled) + len(dataset.val)) + [False] * len(unlabeled)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoding releases the interpreter's lock
        list(pool.map(check, keys, with_mask))


def normalize(image):
    """(..., 3, H, W) uint8 -> X: float32 with ImageNet's mean 0 and deviation 1, on the same device."""
    return (image - MEAN.to(image.device, non_blocking=True)) / STD.to(image.device, non_blocking=True)


def resize(image, label, size):
    """image (3, H, W) uint8, bilinear; label (H, W) uint8 or None, nearest -> the two at size (H', W')."""
    image = TF.resize(image, list(size), TF.InterpolationMode.BILINEAR, antialias=True)
    if label is not None:
        label = TF.resize(label[None], list(size), TF.InterpolationMode.NEAREST_EXACT)[0]
    return image, label


def perturb(image, rng):
    """A.X, the perturbed view (Sec. 4.2): colour jitter, and grey with probability 0.2; (3, H, W) uint8."""
    factor = rng.uniform(0.6, 1.4, 3)
    jitter = [
        (TF.adjust_brightness, factor[0]),
        (TF.adjust_contrast, factor[1]),
        (TF.adjust_saturation, factor[2]),
        (TF.adjust_hue, rng.uniform(-0.1, 0.1)),
    ]
    for i in rng.permutation(4):
        adjust, amount = jitter[i]
        image = adjust(image, amount)
    if rng.random() < 0.2:
        image = TF.rgb_to_grayscale(image, num_output_channels=3)
    return image


class Views(torch.utils.data.Dataset):
    """Training samples: views[index, draw] is image number `index`, augmented by the numbers of `draw`.

    labeled=True   (image, label): X (3, H, W) uint8 and Y (H, W) uint8
    labeled=False  (image_u, image_u_strong): X and A.X, (3, H, W) uint8, of one geometry; no mask is opened
    stream         tuple of ints that keeps the random numbers of stages and of the two kinds apart
    """

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
    bounds = [r * (batch_size // world) + min(r, batch_size % world) for r in (rank, rank + 1)]
    return slice(*bounds)


class IndexStream:
    """Batch sampler: for each step of start .. stop-1, this process's part of the batch, (index, draw) pairs.

    Draw number d is place d of an endless sequence of permutations of the `length` images, so that a step's
    batch depends on the seed (in `stream`) and the step alone.
    """

    def __init__(self, length, batch_size, stream, start, stop, rank=0, world=1):
        self.length, self.batch_size, self.stream = length, batch_size, stream
        self.steps, self.share = range(start, stop), share_of_batch(batch_size, rank, world)

    def __len__(self):
        return len(self.steps)

    def __iter__(self):
        current, order = None, None
        for step in self.steps:
            batch = []
            for draw in range(step * self.batch_size, (step + 1) * self.batch_size):
                epoch, place = divmod(draw, self.length)
                if epoch != current:
                    current = epoch
                    order = np.random.default_rng([*self.stream, ORDER, epoch]).permutation(self.length)
                batch.append((int(order[place]), draw))
            yield batch[self.share]


def ignore_signals(worker_id):
    """For loader processes: SIGTERM and Ctrl-C are the training process's, which may still need a batch."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@atexit.register
def end_loaders():
    """Python ends loader processes by SIGTERM, which they ignore, and waits for them: so kill them before."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler would report a crash
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def make_loader(dataset, ids, size, labeled, batch_size, stream, start, stop, rank=0, world=1, workers=0):
    """Batches of Views for the steps start .. stop-1, in order.

    Labelled: (b, 3, H, W) and (b, H, W) uint8; unlabelled: two (b, 3, H, W) uint8. batch_size is over all
    processes; b is this one's part of it.
    """
    return torch.utils.data.DataLoader(
        Views(dataset, ids, size, labeled, stream),
        batch_sampler=IndexStream(len(ids), batch_size, stream, start, stop, rank, world),
        num_workers=workers,
        worker_init_fn=ignore_signals,
        pin_memory=torch.cuda.is_initialized(),  # not for training on a CPU beside an unused GPU
    )


def prepare_voc(data, counts=(10582, 1449)):
    """Download VOC 2012 and SBD below `data`, and write SegmentationClassAug and trainaug.txt.

    Training ids are SBD's train and val less VOC's val, plus VOC's train, whose masks are VOC's own. Raises
    InputError unless there are `counts` training and validation ids in the end.
    """
    try:
        sbd_root = Path(data) / "sbd"
        parts = [  # before VOC, for torchvision asks for scipy here
            torchvision.datasets.SBDataset(
                sbd_root, image_set=part, mode="segmentation", download=not (sbd_root / "cls").is_dir()
            )
            for part in ("train", "val")
        ]
        torchvision.datasets.VOCSegmentation(data, year="2012", image_set="trainval", download=True)
    except (OSError, RuntimeError) as error:
        raise InputError(f"cannot download VOC 2012 and SBD to {data} ({error})") from None
    root = Path(data) / "VOCdevkit" / "VOC2012"
    lists, masks = root / "ImageSets" / "Segmentation", root / "SegmentationClassAug"
    voc_train, val = read_lines(lists / "train.txt"), read_lines(lists / "val.txt")
    masks.mkdir(exist_ok=True)
    for key in voc_train + val:
        with Image.open(root / "SegmentationClass" / f"{key}.png") as mask:
            mask.save(masks / f"{key}.png")
    train, taken = set(voc_train), set(voc_train + val)
    for part in parts:
        for number, path in enumerate(part.images):
            key = Path(path).stem
            if key not in taken:
                mask = part[number][1].convert("P")
                mask.putpalette(voc_palette().tobytes())
                mask.save(masks / f"{key}.png")
                train.add(key)
    if (len(train), len(val)) != counts:
        raise InputError(
            f"found {len(train)} training and {len(val)} validation ids instead of {counts}: the download in "
            f"{data} is incomplete; delete it and start again"
        )
    with replacing(lists / "trainaug.txt") as file:
        file.write("".join(f"{key}\n" for key in sorted(train)).encode())


def main():
    parser = argparse.ArgumentParser(description="Download and merge PASCAL VOC 2012 and SBD.")
    parser.add_argument("dataset", choices=["voc"])
    parser.add_argument("--data", default="datasets", metavar="DIR", help="where VOCdevkit and sbd go")
    args = parser.parse_args()
    try:
        prepare_voc(args.data)
    except (InputError, OSError) as error:
        print(f"data.py: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
    print(f"{args.data}: 10,582 training and 1,449 validation images")


if __name__ == "__main__":
    main()

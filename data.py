"""Data sets, splits, views and batches (Sec. 4.2).

    python data.py voc --data DIR      merge PASCAL VOC 2012 and SBD; download what is missing

There are four data sets: `shapes` (drawn from a seed), `voc`, `cityscapes` and `folder` (your
own images). An unlabelled image's mask is never opened for training. Which images a step sees,
and in which views, follows from --seed, stage, step, batch size, --size and the list of ids;
not from the number of processes, nor from interruptions.
"""

import argparse
import contextlib
import functools
import math
import os
import re
import shutil
import sys
import unicodedata
import zlib
from colorsys import hsv_to_rgb
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageOps, UnidentifiedImageError
from torchvision import datasets
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

VOID = 255  # the label of pixels that have no class

# ---- Views (Sec. 4.2) ----

MEAN = 255 * torch.tensor([0.485, 0.456, 0.406])[:, None, None]  # ImageNet's, of 0 to 255
DEVIATION = 255 * torch.tensor([0.229, 0.224, 0.225])[:, None, None]
# The seed of an order or a view is a tuple of ints: a stream, (--seed, stage, 0 for labelled or
# 1 for unlabelled images), then ORDER or VIEW, then a number. Other seeds: seed_step (dropout),
# draw_labeled (the subset), train_stage2.pixels_of_V.
ORDER = 0  # (*stream, ORDER, epoch) gives the order of the images in an epoch
VIEW = 1  # (*stream, VIEW, draw) gives the window, flip and perturbation of one draw

# A: "color jittering and random grayscale with the probability of 0.2"; strengths as released
PERTURBATION = v2.Compose([v2.ColorJitter(0.4, 0.4, 0.4, 0.1), v2.RandomGrayscale(0.2)])


@dataclass
class Views(torch.utils.data.Dataset):
    """Training samples: views[index, draw] is image number `index` in the random view `draw`.

    A labelled sample is image X (3, H, W) uint8 and label Y (H, W) uint8. An unlabelled one is
    image_u X and image_a A.X, both (3, H, W) uint8 and of one geometry; no mask is opened.
    """

    dataset: "SegmentationData"
    ids: list  # of the images
    size: tuple  # (H, W) of the views
    labeled: bool
    stream: tuple  # begins the seed of a view's random numbers, see above

    def __getitem__(self, item):
        index, draw = item
        rng = np.random.default_rng([*self.stream, VIEW, draw])
        if self.labeled:
            pair = self.dataset.read_pair(self.ids[index])
            return random_geometry(pair, self.size, self.dataset.crop, rng)
        image = self.dataset.read_image(self.ids[index])
        (image,) = random_geometry([image], self.size, self.dataset.crop, rng)
        return image, perturb(image, seed=int(rng.integers(2**63)))


def random_geometry(tensors, size, crop, rng):
    """A random view of tensors [image (3, H0, W0) uint8] or [image, label (H0, W0) uint8].

    With `crop` it is a window of `size` (H, W), else the whole at this size; half are flipped.
    """
    height, width = size
    if crop:
        top = int(rng.integers(tensors[0].shape[-2] - height + 1))
        left = int(rng.integers(tensors[0].shape[-1] - width + 1))
        tensors = [x[..., top : top + height, left : left + width] for x in tensors]
    else:
        tensors = [resize(x, size) for x in tensors]
    if rng.random() < 0.5:
        tensors = [x.flip(-1) for x in tensors]
    return tensors


def resize(x, size):
    """Image (3, H0, W0) uint8, bilinear, or label (H0, W0) uint8, nearest, at `size` (H, W)."""
    if x.ndim == 3:
        return TF.resize(x, list(size), TF.InterpolationMode.BILINEAR, antialias=True)
    return TF.resize(x[None], list(size), TF.InterpolationMode.NEAREST_EXACT)[0]


def perturb(image, seed):
    """A.X, the perturbed view of an image (3, H, W) uint8; its numbers follow from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # the CPU's alone, which v2 draws from
        return PERTURBATION(image)


def normalize(image):
    """(..., 3, H, W) uint8 -> X: float32 with ImageNet's mean 0 and deviation 1."""
    mean = MEAN.to(image.device, non_blocking=True)
    deviation = DEVIATION.to(image.device, non_blocking=True)
    return (image - mean) / deviation


def to_device(batch, device):
    """uint8 tensors of a batch: images (B, 3, H, W) are normalised, labels become int64."""
    moved = [x.to(device, non_blocking=True) for x in batch]
    return [normalize(x) if x.ndim == 4 else x.long() for x in moved]


# ---- Batches ----


@dataclass(frozen=True)
class Process:
    """One of the processes that train together; torchrun starts several."""

    rank: int = 0  # its number
    world: int = 1  # how many there are
    device: torch.device = torch.device("cpu")

    def sum(self, tensor):
        """Add up what the processes have of a tensor, in place; every process gets the sum."""
        if self.world > 1:
            torch.distributed.all_reduce(tensor)
        return tensor


def images_of_process(batch_size, process):
    """Which images of a batch are this process's, (b,) int: 6 on 4 are 2 + 2 + 1 + 1."""
    return np.array_split(np.arange(batch_size), process.world)[process.rank]


def weight_of_process(batch_size, process):
    """The factor of this process's losses, which are means over its own images.

    DistributedDataParallel averages the gradients over processes as if all had equally many
    images. With this factor the average becomes the mean over the images of the batch.
    """
    return process.world * len(images_of_process(batch_size, process)) / batch_size


def seed_step(seed, stage, step, process):
    """Seed a step's dropout, so that a resumed run repeats it; no random state is stored."""
    sequence = np.random.SeedSequence([seed, stage, step, process.rank])
    torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))


class IndexStream:
    """Batch sampler: this process's (index, draw) pairs of the batches start .. stop-1.

    Batches count from 0: after `start` steps the next one is batch number `start`. Its samples
    have the running numbers start * batch_size and following, called draws. Draw d is in epoch
    d // length, and each epoch has its own permutation of all images. So nothing is stored: a
    resumed run computes where it goes on.
    """

    def __init__(self, length, batch_size, stream, start, stop, process=Process()):
        self.length = length
        self.batch_size = batch_size
        self.stream = stream
        self.numbers = range(start, stop)
        self.mine = images_of_process(batch_size, process)

    def __iter__(self):
        for number in self.numbers:
            batch = []
            for draw in number * self.batch_size + self.mine:
                epoch, position = divmod(int(draw), self.length)
                order = permutation(self.length, (*self.stream, ORDER, epoch))
                batch.append((int(order[position]), int(draw)))
            yield batch


@functools.lru_cache(maxsize=4)  # two kinds of images, and two epochs where one ends
def permutation(length, seed):
    """The numbers 0 .. length-1 in the random order that `seed`, a tuple of ints, gives."""
    return np.random.default_rng(seed).permutation(length)


def make_loader(
    dataset, ids, size, labeled, batch_size, stream, start, stop, process=Process(), workers=0
):
    """Batches of Views, start .. stop-1 of IndexStream: this process's share of each."""
    return torch.utils.data.DataLoader(
        Views(dataset, ids, size, labeled, stream),
        batch_sampler=IndexStream(len(ids), batch_size, stream, start, stop, process),
        num_workers=workers,
        worker_init_fn=be_quiet,
        pin_memory=process.device.type == "cuda",
    )


def be_quiet(worker_id):
    """Loader processes say nothing when Ctrl-C ends them; their errors come with batches."""
    sys.excepthook = lambda *error: None


# ---- What is labelled ----


def labeled_ids(dataset, ratio, split, labeled_list=None):
    """The ids of D_L.

    ratio         the labelled share of all training ids, such as "1/20", rounded down; None
                  takes every training image that has a mask
    split         seed of the random choice
    labeled_list  path of a list of ids that replaces ratio and split
    Raises InputError if the ratio is nonsense or masks are too few.
    """
    if labeled_list:
        return read_list(labeled_list, dataset.files)
    if ratio is not None:
        return draw_labeled(dataset, ratio, split)
    labeled = [key for key in dataset.train if dataset.has_mask(key)]
    require(labeled, f"no training image has a mask {dataset.mask_rule}")
    return labeled


def unlabeled_ids(dataset, labeled, unlabeled_list=None):
    """The ids of D_U: those of a list, or all training ids that are not labelled.

    Raises InputError if an id is in two of D_L, D_U and the validation set.
    """
    known = set(labeled)
    unlabeled = [key for key in dataset.train if key not in known]
    if unlabeled_list:
        unlabeled = read_list(unlabeled_list, dataset.files)
    both = known.intersection(unlabeled) or {*labeled, *unlabeled}.intersection(dataset.val)
    if both:
        ids = f"{len(both)} ids, such as {min(both)}"
        remedy = "take them out of one list (those of val.txt out of train.txt)"
        raise InputError(f"labelled, unlabelled and validation ids overlap: {ids}; {remedy}")
    return unlabeled


def draw_labeled(dataset, ratio, split):
    """A random subset of the training ids that have a mask, in the order of the list."""
    try:
        share = Fraction(ratio)
    except (ValueError, ZeroDivisionError):
        raise InputError(f"--ratio {ratio} is not a number such as 1/20 or 0.05") from None
    total = len(dataset.train)
    number = math.floor(share * total)
    require(0 < share <= 1, f"--ratio {ratio} must be over 0 and at most 1")
    require(number > 0, f"--ratio {ratio} of {total} images does not label an image")
    # All ids are permuted, not only those with a mask: so the subset stays if masks of images
    # outside it are taken away. RandomState gives the same numbers in every version of NumPy.
    order = np.random.RandomState(split).permutation(total)
    with_mask = [i for i in order if dataset.has_mask(dataset.train[i])]
    most = f"{len(with_mask)}/{total}"
    few = f"--ratio {ratio} asks for {number} labelled images, but only {most} have a mask"
    require(number <= len(with_mask), f"{few} {dataset.mask_rule}: give at most --ratio {most}")
    return [dataset.train[i] for i in sorted(with_mask[:number])]


# ---- The data sets ----


@dataclass
class SegmentationData:
    """A data set's files and names, as load_dataset finds them."""

    name: str
    files: dict  # {id: (image path, mask path or None)} of all that is on disk
    train: list  # ids for training, labelled or not
    val: list  # ids for evaluation
    classes: list  # C names
    palette: np.ndarray  # (C or more, 3) uint8 RGB, one colour a class
    crop: bool = False  # training cuts a random window instead of resizing (Cityscapes)
    train_id: np.ndarray = None  # (256,) uint8: the class of a mask's value, if it is another
    mask_rule: str = ""  # where masks are looked for, for messages

    def has_mask(self, key):
        return self.files[key][1] is not None

    def read_image(self, key):
        """The image `key` -> (3, H, W) uint8 RGB, turned upright. Raises InputError."""
        return read_rgb(self.files[key][0])

    def read_label(self, key):
        """The mask of `key` -> (H, W) uint8, 0 .. C-1 or 255. Raises InputError for another."""
        image, path = self.files[key]
        require(path is not None, f"{image} has no mask {self.mask_rule}")
        with open_image(path, MASK_FORMATS) as mask:
            mode = mask.mode
            label = np.asarray(upright(mask))
        require(label.ndim == 2 and mode != "F", f"{path} has mode {mode}; it must be indexed")
        # Cityscapes has 34 label ids for its 19 classes.
        last = len(self.classes) - 1 if self.train_id is None else 33
        wrong = label[((label < 0) | (label > last)) & (label != VOID)]
        if wrong.size > 0:
            raise InputError(f"mask {path} has the value {wrong.max()}, not 0 to {last} or 255")
        if self.train_id is not None:
            label = self.train_id[label]
        return torch.from_numpy(label.astype(np.uint8))

    def read_pair(self, key):
        """Image and label of `key`. Raises InputError also if the two differ in size."""
        image = self.read_image(key)
        label = self.read_label(key)
        path, mask = self.files[key]
        have, want = tuple(label.shape), tuple(image.shape[1:])
        differ = f"mask {mask} is {have} (H, W), but {path} is {want}, its EXIF applied"
        require(have == want, differ)
        return image, label


class Shapes(SegmentationData):
    """`shapes`: every scene is drawn from its id, so there are no files."""

    def read_image(self, key):
        return draw_scene(key)[0]

    def read_label(self, key):
        return draw_scene(key)[1]

    def read_pair(self, key):
        return draw_scene(key)


def load_dataset(name, data="datasets"):
    """The SegmentationData called `name`, one of DATASETS.

    data  the folder that holds VOCdevkit/VOC2012 (voc), leftImg8bit and gtFine (cityscapes), or
          images, masks, train.txt, val.txt and classes.txt (folder); `shapes` ignores it
    Raises InputError if something is missing or ambiguous.
    """
    return DATASETS[name](Path(data))


def load_folder(data):
    """The user's own images."""
    images = find_folder(data, "images", "--data must hold images")
    files, rule = match_files(images, data / "masks")
    path = data / "classes.txt"
    classes = read_lines(path)
    number = f"{path} must name 2 to 255 classes, and has {len(classes)}"
    require(1 < len(classes) < 256, f"{number}; the background is one too, mostly the first")
    form = "name one class a line, from 0 on, without numbers, comments or a heading"
    for i, name in enumerate(classes):  # labelme, CVAT and spreadsheets write other lines too
        number = re.match(r"(\d+)\s", name)
        is_another = number and int(number[1]) != i
        is_none = re.match(r"#|__ignore__|\d+\s*[:;,=]|(name|class|id)s?$", name)
        require(not is_another and not is_none, f"{path} must {form}; it has the line {name!r}")
    train = read_list(data / "train.txt", files)
    val = read_list(data / "val.txt", files)
    return SegmentationData("folder", files, train, val, classes, voc_palette(), mask_rule=rule)


VOC_CLASSES = """background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable
    dog horse motorbike person pottedplant sheep sofa train tvmonitor""".split()


def load_voc(data):
    """PASCAL VOC 2012, with the masks of SBD (python data.py voc)."""
    remedy = f"run python data.py voc --data {data}"
    below = "VOCdevkit/VOC2012/JPEGImages"
    advice = f"--data must hold {below} ({remedy})"
    for found in (*data.glob("JPEGImages"), *data.glob("*/JPEGImages")):
        name = "must be called VOCdevkit/VOC2012 (a link will do)"
        advice = f"{os.path.abspath(found.parent)} {name}, and --data be the folder above it"
    images = find_folder(data, below, advice)
    masks = images.parent / "SegmentationClassAug"
    lists = images.parent / "ImageSets/Segmentation"
    is_merged = masks.is_dir() and (lists / "trainaug.txt").exists()
    require(is_merged, f"{masks} or trainaug.txt is missing: {remedy}")
    files, rule = match_files(images, masks)
    train = read_list(lists / "trainaug.txt", files)
    val = read_list(lists / "val.txt", files)
    palette = voc_palette()
    return SegmentationData("voc", files, train, val, VOC_CLASSES, palette, mask_rule=rule)


def voc_palette():
    """PASCAL VOC's colours, (256, 3) uint8.

    A class's bits, lowest first, go to red, green and blue in turn; there the highest is first.
    """
    palette = np.zeros((256, 3), np.uint8)
    for bit in range(8):
        is_set = np.arange(256) >> bit & 1
        palette[:, bit % 3] |= (is_set << (7 - bit // 3)).astype(np.uint8)
    return palette


def load_cityscapes(data):
    """Cityscapes: label ids become the 19 train ids; training cuts windows (Sec. 4.2)."""
    images = find_folder(data, "leftImg8bit", "--data must hold leftImg8bit")
    files, mask_rule = match_files(images, data / "gtFine", "_leftImg8bit", "_gtFine_labelIds")
    train = [key for key in files if key.startswith("train/")]
    val = [key for key in files if key.startswith("val/")]
    require(train and val, f"{images} must have images in train and in val")
    classes, palette = [], []
    train_id = np.full(256, VOID, np.uint8)
    for entry in sorted(datasets.Cityscapes.classes, key=lambda entry: entry.train_id):
        if 0 <= entry.train_id < VOID:
            classes.append(entry.name)
            palette.append(entry.color)
            train_id[entry.id] = entry.train_id
    return SegmentationData(
        "cityscapes", files, train, val, classes, np.uint8(palette),
        crop=True, train_id=train_id, mask_rule=mask_rule,
    )


SHAPES_SIZE = 48
SHAPES_CLASSES = {  # and their colours in figures
    "background": (70, 70, 70), "pale": (229, 57, 57), "dark": (143, 229, 57),
    "striped": (57, 229, 229), "checked": (143, 57, 229),
}


def load_shapes(data):
    """400 + 200 scenes that are drawn from their ids."""
    train = [f"train_{i:04d}" for i in range(400)]
    val = [f"val_{i:04d}" for i in range(200)]
    files = dict.fromkeys(train + val, ("drawn", "drawn"))
    palette = np.uint8(list(SHAPES_CLASSES.values()))
    return Shapes("shapes", files, train, val, list(SHAPES_CLASSES), palette)


def draw_scene(key):
    """One scene of `shapes`: image (3, 48, 48) uint8, label (48, 48) uint8 with 255 for void.

    Polygons occlude each other; half of them have a void rim. A polygon's class tells where it
    is brighter than the background: all over (pale), nowhere (dark), in stripes, in checks.
    Colours and light are random. A network learns those of a few labelled scenes by heart,
    while unlabelled scenes and A's jitter show how they vary.
    """
    part, number = key.split("_")
    rng = np.random.default_rng([int(part == "val"), int(number)])
    y, x = np.mgrid[:SHAPES_SIZE, :SHAPES_SIZE]
    slope = rng.uniform(-0.3, 0.3, 2)
    grey = rng.uniform(60, 140) + x * slope[0] + y * slope[1]  # the background's brightness
    image = grey[..., None] + rng.uniform(-25, 25, 3)
    label = np.zeros(grey.shape, np.uint8)
    for _ in range(rng.integers(2, 6)):
        kind = int(rng.integers(1, len(SHAPES_CLASSES)))
        polygon, turn = draw_polygon(rng)
        is_bright = draw_pattern(kind, turn, rng)
        tints = [random_tint(rng) for _ in range(2)]
        light = (grey + rng.uniform(45, 85))[..., None] * tints[0]
        dark = (grey - rng.uniform(45, 85))[..., None] * tints[1]
        paint = np.where(is_bright[..., None], light, dark)
        inside = np.asarray(polygon) > 0
        image[inside] = paint[inside]
        label[inside] = kind
        if rng.random() < 0.5:
            grown = np.asarray(polygon.filter(ImageFilter.MaxFilter(3)))
            shrunk = np.asarray(polygon.filter(ImageFilter.MinFilter(3)))
            label[grown != shrunk] = VOID
    lamp = np.exp(rng.uniform(-0.4, 0.4, 3) + rng.uniform(-0.4, 0.2))  # red, green, blue
    image = (image * lamp + rng.normal(0, 6, image.shape)).clip(0, 255).astype(np.uint8)
    return torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(label)


def draw_polygon(rng):
    """A random polygon: a PIL image of mode L, 255 inside, and the angle it is turned by."""
    corners = int(rng.integers(3, 9))
    centre = rng.uniform(0, SHAPES_SIZE, 2)
    radius = rng.uniform(8, 15)
    turn = rng.uniform(0, 2 * math.pi)
    angle = turn + np.arange(corners) * 2 * math.pi / corners
    distance = radius * rng.uniform(0.7, 1.2, corners)
    outline = np.stack([np.cos(angle), np.sin(angle)], axis=1) * distance[:, None] + centre
    polygon = Image.new("L", (SHAPES_SIZE, SHAPES_SIZE))
    ImageDraw.Draw(polygon).polygon(outline.flatten().tolist(), fill=255)
    return polygon, turn


def draw_pattern(kind, turn, rng):
    """Where class `kind` is bright, (48, 48) bool; stripes and checks are turned."""
    y, x = np.mgrid[:SHAPES_SIZE, :SHAPES_SIZE]
    along = x * math.cos(turn) + y * math.sin(turn)
    across = y * math.cos(turn) - x * math.sin(turn)
    stripes = np.sin(along * (2 * math.pi / rng.uniform(9, 13))) > 0
    check = 2 * math.pi / rng.uniform(5, 7)
    everywhere = np.ones(x.shape, bool)
    checks = np.sin(along * check) * np.sin(across * check) > 0
    return [None, everywhere, ~everywhere, stripes, checks][kind]  # of SHAPES_CLASSES


def random_tint(rng):
    """Factors of red, green and blue, of a random hue and saturation but of brightness 1."""
    tint = np.array(hsv_to_rgb(rng.uniform(), rng.uniform(0.1, 0.7), 1))
    return tint / (tint @ [0.299, 0.587, 0.114])


DATASETS = {
    "shapes": load_shapes, "voc": load_voc,
    "cityscapes": load_cityscapes, "folder": load_folder,
}

# ---- Files and lists ----

MASK_FORMATS = ("PNG", "TIFF", "BMP", "PPM")  # those that keep a mask's values
FORMATS = (*MASK_FORMATS, "JPEG", "JPEG2000", "WEBP", "GIF")  # no EPS: it is a program
# {".png": "PNG", ...}
ENDINGS = {end: kind for end, kind in Image.registered_extensions().items() if kind in FORMATS}
ANY_ENDING = "|".join(re.escape(ending) for ending in ENDINGS)
# A line of a list: an image's path with its ending, and perhaps behind it its mask's path
PATHS = re.compile(rf"(.+?)(?:{ANY_ENDING})(?:[\s,;]+(.+))?", re.IGNORECASE)


@contextlib.contextmanager
def open_image(path, formats=FORMATS):
    """An open PIL image. Raises InputError for whatever goes wrong until it is closed."""
    require_regular(path)
    try:
        with Image.open(path, formats=formats) as image:
            pages = count_pages(image)
            require(pages == 1, f"{path} has {pages} pages: write each to a file of its own")
            yield image
    except (InputError, MemoryError):
        raise
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except UnidentifiedImageError:
        known = ", ".join(formats)
        raise InputError(f"{path} cannot be read as {known}: convert it") from None
    except Exception as error:  # damaged bytes reach Pillow's readers as errors of many kinds
        raise InputError(f"{path} cannot be read as {', '.join(formats)} ({error})") from None


def count_pages(image):
    """Pages or frames of a PIL image, without the previews that photos and GeoTIFFs have."""
    frames = getattr(image, "n_frames", 1)
    if frames == 1 or image.format == "MPO":
        return 1
    if image.format != "TIFF":
        return frames
    pages = 0
    for frame in range(frames):
        image.seek(frame)
        if image.tag_v2.get(254, 0) == 0:  # not a smaller copy, and no transparency mask
            pages += 1
    image.seek(0)
    return pages


def read_rgb(path):
    """An image file -> (3, H, W) uint8 RGB, upright; of 16 bits the upper 8. InputError."""
    with open_image(path) as image:
        require_rgb_or_grey(image, path)
        image = upright(image)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    image.info.pop("transparency", None)
    return TF.pil_to_tensor(image.convert("RGB"))


def require_rgb_or_grey(image, path):
    """Raises InputError for a PIL image whose pixels are not 8 or 16 bits of RGB or grey."""
    usable = image.mode not in ("F", "LAB")
    require(usable, f"{path} has mode {image.mode}; it must be RGB or grey integers")


def upright(image):
    """A PIL image turned as its EXIF says."""
    image.getexif()  # is kept
    for key in ("exif", "Raw profile type exif"):
        image.info.pop(key, None)  # else Pillow writes all tags anew, and fails at odd ones
    return ImageOps.exif_transpose(image)


def find_folder(data, below, advice):
    """The folder DATA/below. If it is missing, InputError names the --data that is meant."""
    if (data / below).is_dir():
        return data / below
    here = Path(os.path.abspath(data))
    for other in (*here.parents, *here.glob("*")):
        if (other / below).is_dir() and (other / below).is_relative_to(here):
            advice = f"give --data {other}"
    raise InputError(f"{data / below} is not a folder: {advice}")


def image_files(folder, formats, suffix=""):
    """{id: path} of the images below a folder, and of other files. InputError for twins.

    An id is the path below the folder without its ending and `suffix`, as in "day/0007". Hidden
    files are left out. The other files may be in formats that are not read.
    """
    is_closed = folder.exists() and not os.access(folder, os.R_OK | os.X_OK)
    require(not is_closed, f"{folder} cannot be read: its permissions forbid it")
    files, others = {}, {}
    for path in sorted(folder.rglob("*")):
        below = unicodedata.normalize("NFC", path.relative_to(folder).as_posix())
        key, ending = os.path.splitext(below)
        if "/." in f"/{below}" or not key.endswith(suffix):
            continue
        key = key.removesuffix(suffix)
        if ENDINGS.get(ending.lower()) in formats:
            first = files.setdefault(key, path)
            require(first == path, f"{first} and {path} have the same id, {key}: rename one")
        elif ending and not suffix and not path.is_dir():
            others[key.removesuffix(".nii")] = path  # .nii.gz
            others[below] = path  # as a list may name it
    return files, others


def match_files(images, masks, image_suffix="", mask_suffix=""):
    """{id: (image path, mask path or None)} of all images below a folder, and a text.

    A mask has its image's id; it may keep the image's ending, as in 0007.jpg.png. The text says
    where masks are looked for, as in "an image has no mask ...". A file in a format that is not
    read stands where no other has its id: whoever opens it tells its name. Raises InputError
    for twins.
    """
    readable, others = image_files(images, FORMATS, image_suffix)
    files = {key: (path, None) for key, path in {**others, **readable}.items()}
    name = "the same name"
    if mask_suffix:
        name += f" and the ending {mask_suffix}"
    rule = f"of {name} in {masks} ({', '.join(MASK_FORMATS)}, as JPEG alters classes)"
    if not masks.is_dir():
        rule += "; there is no such folder"
    readable, others = image_files(masks, MASK_FORMATS, mask_suffix)
    for name, path in readable.items():
        key = name if name in files else os.path.splitext(name)[0]
        image, first = files.get(key, (None, None))
        require(first is None, f"{first} and {path} are both masks of {key}: rename one")
        if image is not None:
            files[key] = (image, path)
        elif "fits no image" not in rule:
            rule += f"; {path.name} fits no image"
    for key, path in others.items():
        image, mask = files.get(key, (None, None))
        if image is not None and mask is None:
            files[key] = (image, path)
    return files, rule


def read_lines(path):
    """The lines of a text file in UTF-8 without blanks around them. Raises InputError."""
    require_regular(path)
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"{path} does not exist (README, Your own images)") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"list {path} cannot be read as text in UTF-8 ({error})") from None
    lines = unicodedata.normalize("NFC", text).splitlines()
    return [line.strip() for line in lines if line.strip()]


def read_list(path, files):
    """The ids that a list file names, once each; a line is as for find_id. InputError."""
    ids = []
    for line in read_lines(path):
        key = find_id(line, files)
        require(key is not None, f"{path} names {line[:80]!r}: there is no such image")
        ids.append(key)
    require(ids, f"{path} names no image")
    return list(dict.fromkeys(ids))


def find_id(line, files):
    """The id of the image that a line of a list names, or None.

    A line is an id, or the image's path with any folders in front, or this and the mask's path.
    """
    if line in files:
        return line
    line = line.replace("\\", "/")
    paths = PATHS.fullmatch(line)
    image = (paths[1] if paths else line).removesuffix("_leftImg8bit")
    if paths and paths[2]:
        name = image.rpartition("/")[2]
        if not paths[2].rpartition("/")[2].startswith((f"{name}.", f"{name}_", f"{name}-")):
            return None  # the mask of another image
    while image not in files and "/" in image:
        image = image.partition("/")[2]  # without the first folder
    return image if image in files else None


# ---- Checks before training ----


def check_files(dataset, labeled, unlabeled, size):
    """Look for what would break or mislead the training, before it begins.

    Of unlabelled images the headers are read alone. Refused (InputError) are unreadable files,
    images that a crop of `size` does not fit in, masks that are missing, of another size or of
    contradictory palettes, and a training or validation set whose masks together show void and
    one class at most. Returns notes on the data, a list of lines.
    """
    notes = []
    if not unlabeled:
        remedy = "give --ratio, or name more images in train.txt"
        notes.append(f"stage 2 will find no unlabelled image, as all are labelled: {remedy}")
    if isinstance(dataset, Shapes):
        return notes
    unused = sum(dataset.has_mask(key) for key in unlabeled)
    if dataset.name == "folder" and unused > 0:
        notes.append(f"{unused} unlabelled images have a mask, which training does not use")
    if "fits no image" in dataset.mask_rule:
        notes.append(f"an image's mask is the one {dataset.mask_rule}")
    for key in (*labeled, *dataset.val, *unlabeled):
        path = dataset.files[key][0]
        with open_image(path) as image:
            W, H = image.size
            require_rgb_or_grey(image, path)
        fits = H >= size[0] and W >= size[1]
        require(fits or not dataset.crop, f"{path} is {H}x{W}, too small for --size")
    brightest, palettes = [], {}

    def decode(key):
        """Pixels of each value: in the mask, and in its view."""
        image, label = dataset.read_pair(key)
        brightest.append(int(image.max()))
        pixels = np.bincount(label.flatten(), minlength=256)
        check_palette(dataset.files[key][1], pixels, palettes)
        view = label if dataset.crop else resize(label, size)
        return pixels, np.bincount(view.flatten(), minlength=256)

    with ThreadPoolExecutor(4) as pool:  # decoding releases the interpreter's lock
        for part, keys in (("labelled", labeled), ("validation", dataset.val)):
            pixels, in_view = np.array(list(pool.map(decode, keys))).sum(0)
            mask = dataset.files[keys[0]][1]
            notes += check_classes(dataset.classes, pixels, in_view, part, mask, size)
    if max(brightest) < 64:
        top = f"brightest value {max(brightest)} of 255"
        notes.append(f"{top} (of 16 bits the upper 8): stretch them")
    return notes


def check_classes(classes, pixels, in_view, part, mask, size):
    """Notes on classes that no mask of a `part` of the images shows. InputError for one alone.

    pixels, in_view  (256,) int: pixels of each value in all its masks, and at --size
    mask             the path of one of them
    """
    notes = []
    absent = [name for name, n in zip(classes, pixels) if n == 0]
    is_single = pixels[VOID] > 0 and len(absent) >= len(classes) - 1
    advice = "255 is void: paint the foreground 1"
    require(not is_single, f"{mask}, like all {part} masks, has one class; {advice}")
    if absent:
        notes.append(f"no {part} mask has a pixel of {some_of(absent)}")
    is_lost = (pixels > 0) & (in_view == 0)
    vanished = [name for name, lost in zip(classes, is_lost) if lost]
    if vanished:
        small = f"at --size {size[0]} {size[1]}, which is too small for it"
        notes.append(f"no {part} mask keeps a pixel of {some_of(vanished)} {small}")
    return notes


def some_of(names):
    """The first five names, and how many there are if there are more."""
    return ", ".join(names[:5]) + (f", ... ({len(names)} classes)" if len(names) > 5 else "")


def masks_checksum(dataset, keys):
    """A number that changes if somebody repaints one of these images' masks."""
    value = 0
    for key in keys:
        path = dataset.files[key][1]
        if dataset.name != "shapes" and path is not None:
            value = zlib.crc32(path.read_bytes(), value)
    return value


def check_palette(path, pixels, palettes):
    """Raises InputError if two masks paint one value in two colours: their classes differ.

    The mask at `path` has pixels[value] pixels of a value; without a palette, or with a grey
    one, it tells nothing. `palettes`, {value: (colour, path of its first mask)}, is added to.
    """
    with open_image(path, MASK_FORMATS) as mask:
        palette = mask.getpalette() if mask.mode == "P" else []
    if palette == [i // 3 for i in range(len(palette))]:
        return
    for value in np.flatnonzero(pixels[: min(VOID, len(palette) // 3)]):
        colour = palette[3 * value : 3 * value + 3]
        other, first = palettes.setdefault(value, (colour, path))
        differ = f"value {value} has the colour {other} in {first}, but {colour} in {path}"
        require(colour == other, f"{differ}: number the classes alike in all masks")


# ---- python data.py voc ----


def prepare_voc(data, expected=(10582, 1449)):
    """Make SegmentationClassAug and trainaug.txt of VOC and SBD; download what is missing.

    Training ids are SBD's without VOC's validation ids, and VOC's own, which keep their masks.
    Raises InputError unless `expected` ids are found, OSError or RuntimeError of a download.
    """
    root = next(Path(data).glob("**/VOC2012"), Path(data, "VOCdevkit/VOC2012"))
    sbd = next(Path(data).glob("**/cls"), Path(data, "sbd/cls")).parent
    masks = root / "SegmentationClassAug"
    lists = root / "ImageSets/Segmentation"
    sbd_train = datasets.SBDataset(sbd, "train", "segmentation", not (sbd / "cls").is_dir())
    sbd_val = datasets.SBDataset(sbd, "val", "segmentation", False)
    if not (root / "JPEGImages").is_dir():  # behind SBD, for which torchvision asks for scipy
        datasets.VOCSegmentation(data, "2012", "trainval", download=True)
    shutil.copytree(root / "SegmentationClass", masks, dirs_exist_ok=True)
    train = set(read_lines(lists / "train.txt"))
    val = set(read_lines(lists / "val.txt"))
    for part in (sbd_train, sbd_val):
        for i, image in enumerate(part.images):
            key = Path(image).stem
            if key not in train and key not in val:
                part[i][1].save(masks / f"{key}.png")
                train.add(key)
    found = (len(train), len(val))
    require(found == expected, f"{data} lacks images: {found[0]}, {found[1]} of {expected}")
    with replacing(lists / "trainaug.txt") as file:
        file.write("".join(f"{key}\n" for key in sorted(train)).encode())


def main():
    parser = argparse.ArgumentParser(description="Merge PASCAL VOC 2012 and SBD.")
    parser.add_argument("dataset", choices=["voc"])
    where = "where VOCdevkit and sbd are or go"
    parser.add_argument("--data", default="datasets", metavar="DIR", help=where)
    try:
        prepare_voc(parser.parse_args().data)
    except (OSError, RuntimeError, InputError) as error:
        parser.exit(2, f"data.py: cannot merge VOC 2012 and SBD: {error}\n")
    print("10,582 training and 1,449 validation images")


# ---- Errors and arguments ----


class InputError(ValueError):
    """The user's input cannot be used; the message is one line with the remedy."""


def require(condition, message):
    """Raises InputError with this message unless the condition holds."""
    if not condition:
        raise InputError(message)


def require_regular(path):
    """Raises InputError for a folder, a pipe or a device: reading a pipe would never end."""
    is_other = os.path.exists(path) and not os.path.isfile(path)
    require(not is_other, f"{path} is not a regular file")


def one_line(error):
    """What an error says. A loader process wraps its in a traceback, which ends with it."""
    line = (str(error).strip() or type(error).__name__).splitlines()[-1]
    return printable(line.removeprefix("data.InputError: "))


def printable(text):
    """A text from a file, with escapes for what would steer the terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def tolerant_output():
    """Letters that the terminal's encoding lacks are printed as ?."""
    if hasattr(sys.stdout, "reconfigure"):  # not so in a notebook
        sys.stdout.reconfigure(errors="replace")


def is_out_of_memory(error):
    """Whether an exception tells of too little memory, of a CPU or a GPU."""
    texts = ("out of memory", "allocate memory")
    return isinstance(error, MemoryError) or any(text in str(error) for text in texts)


@contextlib.contextmanager
def replacing(path):
    """A binary file to write, which becomes `path` once it is whole. Raises OSError."""
    part = Path(f"{path}.part")
    try:
        part.unlink(missing_ok=True)
        with open(part, "xb") as file:  # x: never through a link that somebody left there
            yield file
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        part.unlink(missing_ok=True)
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None  # torch.save hides Ctrl-C
        if isinstance(error, RuntimeError):  # torch.save hides a full disk behind one
            error = error.__context__ or error
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"{path} cannot be written ({reason})") from None


def within(low, high=math.inf, kind=int):
    """An argparse type, for all scripts: a number of this kind, low <= number <= high."""

    def number(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value

    return number


if __name__ == "__main__":
    main()

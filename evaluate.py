"""Measure and look at a run (Sec. 4.3), also while it is still in training.

python evaluate.py RUN                       IoU of every class and mIoU, after both stages
python evaluate.py RUN --figures 4           the same, a word on how ELN does, and Fig. 5
python evaluate.py RUN --error-localization  how well ELN finds errors (Table 4), in unlabelled
                                             images that have a mask, else in validation images
python evaluate.py RUN --predict PATH ...    masks of images and folders; needs no data set
python evaluate.py RUN RUN ... --figures 4   the runs' predictions side by side
python evaluate.py RUN RUN ... --compare     a table; runs that differ in split and seed alone
                                             make one row; with --csv FILE also a line a run
"""

import argparse
import copy
import csv
import io
import os
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import nn
from torch.utils.data import DataLoader
from torchvision.utils import make_grid

from data import (
    ENDINGS, VOID, InputError, Process, is_out_of_memory, load_dataset, normalize, one_line,
    printable, read_list, read_rgb, replacing, require, resize, tolerant_output, within,
)
from eln import ErrorLocalizationNetwork, eln_input, valid_logit_of
from losses import correctness, cross_entropy
from model import BACKBONES, DeepLabV3Plus, load_tensors, resize_bilinear

# ---- Validation: mIoU (Sec. 4.2) ----


@torch.no_grad()
def score(network, dataset, size, process=Process(), workers=0, own_size=True):
    """Confusion matrices of the validation images, each counted once by one of the processes.

    Returns {"resized": (C, C), "original": (C, C)} int64, [true, predicted] pixels: against
    labels resized to `size` (Sec. 4.2 resizes the images and is silent on labels), and against
    labels as they are, to whose size the logits are resized (zeros without own_size).
    """
    C = len(dataset.classes)
    resized = torch.zeros(C, C, dtype=torch.int64, device=process.device)
    original = torch.zeros_like(resized)
    was_training = network.training
    network.eval()
    mine = dataset.val[process.rank :: process.world]
    for X, label, full_label in images_with_masks(dataset, mine, size, process.device, workers):
        logits = network(X)[0]
        resized += confusion_matrix(logits[0].argmax(0), label, C)
        if own_size:
            prediction = resized_argmax(logits, full_label.shape)
            original += confusion_matrix(prediction, full_label, C)
    network.train(was_training)
    return {"resized": process.sum(resized), "original": process.sum(original)}


def validate(network, dataset, args, process):
    """mIoU in percent on the validation images, against the labels that score resizes."""
    matrices = score(network, dataset, args.size, process, args.workers, own_size=False)
    return mean_iou(matrices["resized"])


def images_with_masks(dataset, keys, size, device, workers=0):
    """Images one by one: X (1, 3, H, W) float, label (H, W) int64, full_label (H0, W0) uint8.

    (H, W) is `size`; if the data set is trained on crops, it is the image's own (H0, W0).
    """
    pairs = DataLoader(keys, batch_size=None, collate_fn=dataset.read_pair, num_workers=workers)
    for done, (image, full_label) in enumerate(pairs, start=1):
        if dataset.crop:
            size = image.shape[1:]
        X = normalize(resize(image, size).to(device))[None]
        yield X, resize(full_label, size).to(device).long(), full_label.to(device)
        if sys.stderr is not None and sys.stderr.isatty():
            print(f"{done}/{len(keys)} images\033[K", end="\r", file=sys.stderr, flush=True)


def confusion_matrix(prediction, label, C):
    """(C, C) int64, [true, predicted] pixels, of two integer tensors; void is left out."""
    known = label != VOID
    pair = C * label[known].int() + prediction[known].int()
    return torch.bincount(pair, minlength=C * C).reshape(C, C)


def resized_argmax(logits, size):
    """Classes of logits (1, C, h, w) that are resized to (H, W) -> (H, W) uint8.

    All classes at once would need gigabytes for a photo of many megapixels.
    """
    best = torch.full(size, -torch.inf, device=logits.device)
    index = torch.zeros(size, dtype=torch.uint8, device=logits.device)
    for first, part in zip(range(0, 255, 8), logits.split(8, dim=1)):
        value, of_part = resize_bilinear(part, size)[0].max(0)
        is_better = value > best
        index[is_better] = (first + of_part[is_better]).byte()
        best = best.maximum(value)
    return index


def iou(matrix):
    """IoU of each class in percent, (C,) float64; nan where it neither is nor is predicted."""
    intersection = matrix.double().diagonal()
    union = matrix.sum(0) + matrix.sum(1) - intersection
    return 100 * intersection / union


def mean_iou(matrix):
    """mIoU in percent: the mean of iou(matrix) over the classes that have one. InputError."""
    require(matrix.any(), "there is nothing to score: all pixels of the masks are void (255)")
    return float(iou(matrix).nanmean())


# ---- Error localization (Table 4) ----

BINS = 20000  # of error scores from -30 to 30; pixels in one bin are tied


def error_localization(network, eln, images, threshold):
    """Table 4: does ELN, or a threshold on the softmax's confidence, find the wrong pixels?

    eln        ELN or the s-ECN, or None
    images     as images_with_masks gives them
    threshold  the method "confidence" rejects pixels of a softmax maximum <= threshold
    Returns {(method, positive, over): values}. The values are precision, recall and F1 of the
    positive class, "correct" or "error"; over is "image", their mean over the images where they
    are defined, or "pooled", those of all pixels together. With over = "AP" the one value is
    the average precision of finding errors. The method "none" rejects nothing.
    The paper names neither the positive class nor the networks; its figures look like those of
    (method, "correct", "image"), which tests/RESULTS.md takes after stage 1.
    """
    matrices, histograms = {}, {}
    for X, label, _ in images:
        wrong, methods = judge_pixels(network, eln, X, label, threshold)
        for method, (error_score, rejected) in methods.items():
            matrices.setdefault(method, []).append(confusion_matrix(rejected, wrong, 2))
            histograms[method] = histograms.get(method, 0) + error_histogram(error_score, wrong)
    table = {}
    for method in matrices:
        # Pixels of each image, (images, 2, 2): row 0 right, 1 wrong; column 1 rejected.
        of_images = torch.stack(matrices[method]).double()
        pooled = of_images.sum(0, keepdim=True)  # (1, 2, 2)
        for positive, name in enumerate(["correct", "error"]):
            rates = precision_recall_f1(of_images, positive)
            table[method, name, "image"] = rates.nanmean(0).tolist()
            table[method, name, "pooled"] = precision_recall_f1(pooled, positive)[0].tolist()
        table[method, "error", "AP"] = [average_precision(histograms[method])]
    return table


def judge_pixels(network, eln, X, label, threshold):
    """Which of an image's n non-void pixels are wrong, and which ones each method rejects.

    Returns wrong (n,) bool and {method: (error_score (n,) float, rejected (n,) bool)}; a high
    score means that the method suspects the pixel.
    """
    logits = network(X)[0]
    known = label != VOID
    wrong = (logits[0].argmax(0) != label)[known]
    methods = {}
    if eln is not None:
        output = eln(eln_input(X, logits))
        valid_logit = valid_logit_of(output, logits)[0][known]
        methods["ELN" if output.ndim == 3 else "s-ECN"] = (-valid_logit, valid_logit <= 0)
    confidence = logits[0].double().softmax(0).amax(0)[known]
    # The logit keeps the order of the confidences and spreads those near 1 over the bins.
    methods["confidence"] = (-confidence.logit(eps=1e-12), confidence <= threshold)
    methods["none"] = (torch.zeros_like(confidence), torch.zeros_like(wrong))
    return wrong, methods


def precision_recall_f1(matrices, positive):
    """Precision, recall and F1 of a class -> (n, 3); nan where there is no pixel.

    matrices  (n, 2, 2) float: pixels of n images, row 0 right, 1 wrong, column 1 rejected
    positive  1: errors, which should be rejected; 0: correct pixels, which should be accepted
    """
    hits = matrices[:, positive, positive]
    predicted = matrices[:, :, positive].sum(1)  # rejected (accepted) pixels
    actual = matrices[:, positive, :].sum(1)  # wrong (right) pixels
    precision = hits / predicted
    recall = hits / actual
    f1 = 2 * hits / (predicted + actual)
    return torch.stack([precision, recall, f1], dim=1)


def error_histogram(error_score, wrong):
    """(2, BINS) int64: how many right and wrong pixels have an error score in each bin."""
    bins = ((error_score + 30) / 60 * BINS).long().clamp(0, BINS - 1)
    return torch.stack([bins[part].bincount(minlength=BINS) for part in (~wrong, wrong)])


def average_precision(histogram):
    """The area under precision over recall, 1 at best, of an error_histogram.

    Pixels are rejected bin by bin, from the highest error score down. The area is the sum over
    bins of the precision (wrong pixels among the rejected ones) times the gain in recall.
    """
    right, wrong = histogram.flip(1).double()  # (BINS,) each, most suspicious first
    rejected = (right + wrong).cumsum(0)
    precision = wrong.cumsum(0) / rejected.clamp(min=1)
    gain = wrong / wrong.sum().clamp(min=1)
    return float((precision * gain).sum())


@torch.no_grad()
def diagnosis(logits, aux_logits, valid_logits, label, process):
    """How wrong the decoders are and how well ELN finds it: columns of the log, of one batch.

    ce_k_over_ce_0  mean cross-entropy of decoder k over the main one's, as in Eq. (3)
    wrong_k         share of wrong pixels that decoder k (0: the main one) gives ELN
    eln_precision, eln_recall  of ELN (or the s-ECN) at finding them in all K+1 predictions
    """
    known = label != VOID
    sums = []
    for logits_k, output_k in zip([logits, *aux_logits], valid_logits):
        wrong = correctness(logits_k, label) == 0
        rejected = known & (valid_logit_of(output_k, logits_k) <= 0)
        counts = [known.sum(), wrong.sum(), rejected.sum(), (wrong & rejected).sum()]
        sums.append(torch.stack([cross_entropy(logits_k, label).sum(), *counts]).double())
    sums = process.sum(torch.stack(sums))  # (K+1, 5)
    ce, known, wrong, rejected, hits = sums.T.tolist()  # K+1 each
    row = {f"ce_{k}_over_ce_0": ce[k] / max(ce[0], 1e-12) for k in range(1, len(ce))}
    for k in range(len(ce)):
        row[f"wrong_{k}"] = wrong[k] / max(known[k], 1)
    row["eln_precision"] = sum(hits) / max(sum(rejected), 1)
    row["eln_recall"] = sum(hits) / max(sum(wrong), 1)
    return row


# ---- Figures (Fig. 3 to 6) ----

RIGHT_OR_WRONG = ((210, 210, 210), (255, 0, 255))  # light grey, magenta


def panels(networks, eln, X, image, label, palette):
    """An image, its truth and each network's prediction: {caption: (H, W, 3) uint8}.

    networks  {caption: network}
    eln       judges the last network's prediction, which adds the panels of Fig. 5; or None
    X, image, label  (1, 3, H, W) float; the same as (3, H, W) uint8; (H, W) int64
    """
    row = {"image": image.permute(1, 2, 0).numpy(), "truth": colour(label, palette)}
    for caption, network in networks.items():
        logits = network(X)[0]
        prediction = logits[0].argmax(0)
        row[caption] = colour(prediction, palette)
    if eln is None:
        return row
    output = eln(eln_input(X, logits))
    rejected = valid_logit_of(output, logits)[0] <= 0
    name = "ELN" if output.ndim == 3 else "s-ECN"
    for caption, mask in (("its errors", prediction != label), (f"{name} rejects", rejected)):
        row[caption] = colour(mask.byte().masked_fill(label == VOID, VOID), RIGHT_OR_WRONG)
    row["filtered"] = colour(prediction.masked_fill(rejected, VOID), palette)
    return row


def colour(index, palette):
    """(H, W) integer -> (H, W, 3) uint8 by the palette (C, 3); void (255) becomes white."""
    table = np.full((256, 3), 255, np.uint8)
    table[: len(palette)] = palette
    return table[index.cpu().numpy()]


def sheet(rows, legend):
    """A PIL image of rows of panels, which have the same captions and sizes.

    legend  {name: (r, g, b)}, shown below them
    """
    H, W = rows[0]["image"].shape[:2]
    zoom = max(1, round(192 / W))  # small panels are enlarged
    tiles = []
    for row in rows:
        for panel in row.values():
            tile = torch.from_numpy(panel).permute(2, 0, 1)
            tiles.append(tile.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2))
    grid = make_grid(tiles, nrow=len(rows[0]), padding=4, pad_value=255)
    top = W * zoom // 8
    whole = Image.new("RGB", (grid.shape[2], top + grid.shape[1]), "white")
    whole.paste(Image.fromarray(grid.permute(1, 2, 0).numpy()), (0, top))
    for column, caption in enumerate(rows[0]):
        text = Image.new("RGB", (W * zoom, top), "white")  # which cuts a long caption
        ImageDraw.Draw(text).text((2, 0), caption, fill="black", font_size=top * 0.75)
        whole.paste(text, (4 + column * (W * zoom + 4), 0))
    return add_legend(whole, legend, font_size=top * 0.75)


def add_legend(picture, legend, font_size):
    """The PIL image with names and their colours below it, in as many columns as fit."""
    line = round(1.5 * font_size)
    width = round(0.6 * font_size * max(map(len, legend))) + 2 * line
    columns = max(1, picture.width // width)
    lines = -(-len(legend) // columns)
    whole = Image.new("RGB", (picture.width, picture.height + lines * line), "white")
    whole.paste(picture)
    draw = ImageDraw.Draw(whole)
    for i, (name, fill) in enumerate(legend.items()):
        x = 4 + i % columns * width
        y = picture.height + i // columns * line
        draw.rectangle((x, y, x + font_size, y + font_size), fill=fill, outline="black")
        draw.text((x + line, y), printable(name), fill="black", font_size=font_size)
    return whole


def spread(keys, number):
    """That many of the keys, spread evenly over them: the first of a video are one street."""
    number = min(number, len(keys))
    return [keys[i * len(keys) // number] for i in range(number)]


# ---- Prediction ----


def predict(network, record, paths, folder, device):
    """Segment images, and all images in folders, whatever their size. Returns the exit code.

    Writes STEM_class.png (class numbers), STEM_colour.png and STEM_overlay.png into `folder`.
    An image that is broken or too large does not end the others: its line goes to stderr, and
    the code is 2.
    """
    code = 0
    for path in image_paths(paths):
        try:
            pictures = segment(network, record, path, device)
        except (InputError, MemoryError, RuntimeError) as error:
            if not isinstance(error, InputError) and not is_out_of_memory(error):
                raise
            line = f"{path} does not fit into memory" if is_out_of_memory(error) else f"{error}"
            print(f"evaluate.py: {printable(line)}", file=sys.stderr)
            code = 2
            continue
        folder.mkdir(parents=True, exist_ok=True)
        for name, picture in pictures.items():
            with replacing(folder / f"{path.stem}_{name}.png") as file:
                Image.fromarray(picture).save(file, "PNG")
        print(printable(f"{folder / path.stem}_overlay.png"))
    return code


@torch.no_grad()
def segment(network, record, path, device="cpu"):
    """Segment an image file, whatever its size, by a network of load_student.

    Returns {"class": (H, W) uint8, "colour", "overlay": (H, W, 3) uint8} NumPy arrays. Raises
    InputError for a file that is no image.
    """
    image = read_rgb(path)
    if image.max() < 64:
        line = f"{path}: its brightest value is {int(image.max())} of 255"
        print(printable(line), file=sys.stderr)
    size = image.shape[1:] if record["crop"] else record["size"]
    X = normalize(resize(image, size).to(device))[None]
    index = resized_argmax(network(X)[0], image.shape[1:])
    painted = colour(index, record["palette"])
    overlay = image.permute(1, 2, 0).numpy()
    overlay = np.where(painted.any(2, keepdims=True), overlay // 2 + painted // 2, overlay)
    return {"class": index.cpu().numpy(), "colour": painted, "overlay": overlay}


def image_paths(paths):
    """The files in `paths`, and the images in the folders in it. InputError for twins."""
    files = {}  # {stem: path}
    for path in paths:
        inside, others = [], []
        for file in sorted(path.glob("[!.]*")):
            kind = inside if file.suffix.lower() in ENDINGS else others
            kind.append(file)
        others = [file for file in others if file.is_file()]
        if others:
            line = f"{len(others)} files of {path} are in formats that are not read"
            print(printable(f"{line}, such as {others[0].name}"), file=sys.stderr)
        for file in inside or [path]:
            first = files.setdefault(file.stem, file)
            require(first == file, f"--predict: {file} and {first} would give the same files")
    return list(files.values())


# ---- Comparison of runs ----

# A run may be resumed with other values of these options: they do not change the weights, but
# for the device (its rounding and dropout). Lists and data are compared by their ids.
CHANGEABLE = (
    "data", "out", "device", "workers", "save_every", "eval_every", "log_every", "run",
    "labeled_list", "unlabeled_list",
)


RESULTS = ("stage_1", "mIoU", "best", "teacher", "teacher_best", "accepted")


def compare(runs):
    """A Markdown table of runs (settings, results), as run_results gives them.

    Runs that differ in split and seed alone make one row, named by the settings in which it
    differs from the other rows of its stage. It gives the number of splits (sets of labelled
    images), and over them mean ± standard deviation (n - 1); runs of one split are averaged
    before.
    """
    groups = {}  # {settings of a row: [(split, results), ...]}
    for settings, results in runs:
        row = dict(settings)
        split = row.pop("labeled_images")
        del row["split"], row["seed"]
        options = tuple(f"{key} {value}" for key, value in row.items())
        groups.setdefault(options, []).append((split, results))
    head = ["run", "splits", *RESULTS, "steps"]
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for options, members in groups.items():
        stage = options[0]
        peers = [set(other) for other in groups if other[0] == stage]
        common = set.intersection(*peers)
        own = [option for option in options if option not in common]
        splits = f"{len({split for split, _ in members})}"
        if len(members) > int(splits):
            splits += f" ({len(members)} runs)"
        cells = [", ".join([stage, *own]), splits]
        cells += [mean_and_deviation(members, column) for column in RESULTS]
        cells.append(", ".join({results["steps"]: None for _, results in members}))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def mean_and_deviation(members, column):
    """A cell of the table: over splits, of the means of the runs (split, results) of each."""
    values = {}  # {split: of its runs}
    for split, results in members:
        if column in results:
            values.setdefault(split, []).append(results[column])
    means = [np.mean(of_split) for of_split in values.values()]
    cell = f"{np.mean(means):.2f}" if means else ""
    if len(means) > 1:
        cell += f" ± {np.std(means, ddof=1):.2f}"
    return cell


def run_results(checkpoint):
    """What --compare tells of a run: two dictionaries.

    settings  its stage, the options that change its result, numbers of images and classes, and
              checksums of the data's ids and classes, and of the labelled ids (the split)
    results   of RESULTS those that the log has (mIoU of stage 1, of student and teacher at the
              last and at the best validation, mean share of accepted pixels), and its steps
    """
    settings = {"stage": checkpoint["stage"], **checkpoint["args"]}
    for key in CHANGEABLE:
        settings.pop(key, None)
    if settings.get("filter") != "threshold":
        settings.pop("threshold", None)
    for key, value in settings.items():
        if isinstance(value, list):
            settings[key] = " ".join(map(str, value))
    labeled, unlabeled, classes = [checkpoint[k] for k in ("labeled", "unlabeled", "classes")]
    settings.update(labeled=len(labeled), unlabeled=len(unlabeled), classes=len(classes))
    data = Path(checkpoint["args"]["data"]).name
    settings["data"] = f"{data} {name_hash([*classes, *sorted(labeled + unlabeled)])}"
    settings["labeled_images"] = name_hash(labeled)
    results = {"steps": steps_done(checkpoint)}
    rows = checkpoint["rows"]
    if rows and rows[0]["step"] == 0:  # stage 2 begins with what stage 1 reached
        results["stage_1"] = rows[0]["mIoU"]
        rows = rows[1:]
    for column, last, best in (
        ("mIoU", "mIoU", "best"), ("mIoU_teacher", "teacher", "teacher_best"),
    ):
        values = [row[column] for row in rows if column in row]
        if values:
            results[last] = values[-1]
            results[best] = max(values)
    accepted = [row["accepted"] for row in rows if "accepted" in row]
    if accepted:
        results["accepted"] = float(np.mean(accepted))
    return settings, results


def name_hash(names):
    """Eight letters that tell lists of names apart."""
    return f"{zlib.crc32(repr(names).encode()):08x}"


def csv_text(rows):
    """Dictionaries, of which each may lack some columns, as CSV."""
    text = io.StringIO()
    columns = dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def steps_done(checkpoint):
    """"120", or "100 of 120" of a run that is still in training."""
    args = checkpoint["args"]
    steps = args["pretrain_iters"] + args["eln_iters"]
    if checkpoint["stage"] == 2:
        steps = args["iters"]
    return f"{steps}" if checkpoint["step"] == steps else f"{checkpoint['step']} of {steps}"


# ---- Reading checkpoints ----

CHECKPOINT = dict(  # what is in stageN.pt, and its types; optimizer and scaler besides
    stage=int, args=dict, step=int, rows=list, networks=dict, classes=list, labeled=list,
    unlabeled=list, masks=int,
)
STUDENT = dict(  # what is in student_stageN.pt
    network=dict, backbone=str, width=int, classes=list, palette=list, size=list, crop=bool,
    step=int,
)


def read_checkpoint(path, types=CHECKPOINT, stage=None):
    """A dict of tensors and plain values with entries of these types, as the scripts write it.

    Raises InputError if the file is missing, damaged, of another stage, or no checkpoint.
    """
    try:
        checkpoint = load_tensors(path)
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path} does not exist") from None
    except (MemoryError, OSError) as error:
        raise InputError(f"{path} cannot be read ({str(error) or 'out of memory'})") from None
    except Exception:  # damaged bytes reach the readers as errors of many kinds
        raise InputError(f"{path} is damaged, or no dict of tensors and plain values") from None
    require(isinstance(checkpoint, dict), f"{path} is no checkpoint")
    for key, kind in types.items():
        what = f"it has no {key} of type {kind.__name__}"
        is_right = isinstance(checkpoint.get(key), kind)
        require(is_right, f"{path} is not the file that is needed here: {what}")
    rows = checkpoint.get("rows", [])
    require(all(isinstance(row, dict) for row in rows), f"{path} has no log")
    if stage is not None and checkpoint["stage"] != stage:
        raise InputError(f"{path} is not a checkpoint of stage {stage}")
    return checkpoint


def load_state(network, state, path, prefix=""):
    """Load a state dict's entries below `prefix`, strictly.

    Raises InputError if they do not fit, or if a weight or statistic is not finite.
    """
    state = {str(name): value for name, value in state.items()}
    below = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    try:
        network.load_state_dict(below)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()[:80]
        raise InputError(f"{path} holds other networks than are needed: {reason} ...") from None
    values = [value for value in network.state_dict().values() if value.is_floating_point()]
    norm = torch.nn.utils.get_total_norm(values)
    require(norm.isfinite(), f"{path} has weights that are not finite")


def load_student(path, device="cpu"):
    """The network of student_stage1.pt or student_stage2.pt, in eval mode, and what it needs.

    Returns network and a dict: classes (names), palette (C RGB triples), size (H, W) of
    training images, crop (True: trained on crops, so that images go in as they are), backbone,
    width, step. Raises InputError if the file is missing, broken, or of something else.
    """
    record = read_checkpoint(path, STUDENT)
    backbone = record["backbone"]
    require(backbone in BACKBONES, f"{path} has the backbone {backbone}, unknown here")
    is_size = len(record["size"]) == 2 and min(record["size"]) > 0 and record["width"] > 0
    require(is_size, f"{path} has the size {record['size']}, the width {record['width']}")
    network = DeepLabV3Plus(len(record["classes"]), backbone, "none", record["width"])
    load_state(network, record.pop("network"), path)
    return network.to(device, memory_format=torch.channels_last).eval(), record


def load_eln(path, checkpoint, device="cpu"):
    """ELN or the s-ECN of a checkpoint read from `path`, in eval mode; None if it has none."""
    args = checkpoint["args"]
    is_trained = checkpoint["stage"] == 2 or checkpoint["step"] > args["pretrain_iters"]
    is_there = any(name.startswith("auxiliary.eln.") for name in checkpoint["networks"])
    if not (is_trained and is_there):
        return None
    C = len(checkpoint["classes"])
    out_channels = 1 if args["corrector"] == "eln" else C
    eln = ErrorLocalizationNetwork(C, args["eln_backbone"], "none", args["width"], out_channels)
    load_state(eln, checkpoint["networks"], path, "auxiliary.eln.")
    return eln.to(device, memory_format=torch.channels_last).eval()


@dataclass
class LoadedRun:
    """A run's latest networks, or those of --stage."""

    path: Path  # its stage1.pt or stage2.pt
    checkpoint: dict  # None where the student's file suffices
    network: nn.Module  # the student, with --teacher the teacher
    record: dict  # as from load_student


def load_run(folder, args, device):
    """The run in a folder -> LoadedRun. Raises InputError for what cannot be read."""
    path = checkpoint_path(folder, args.stage)
    network, record = load_student(path.with_name(f"student_{path.name}"), device)
    run = LoadedRun(path, None, network, record)
    if args.teacher or not args.predict:
        run.checkpoint = read_checkpoint(path, stage=int(path.stem[-1]))
    if args.teacher:
        has_teacher = run.checkpoint["stage"] == 2
        require(has_teacher, f"--teacher: {path} is of stage 1, which has none")
        load_state(network, run.checkpoint["networks"], path, "teacher.")
    return run


def checkpoint_path(folder, stage):
    """stageN.pt in a run's folder; without a stage, the latest that has a student."""
    if stage is None:
        stage = 2 if (folder / "student_stage2.pt").exists() else 1
    return folder / f"stage{stage}.pt"


# ---- Command line: one function a mode ----


@torch.no_grad()
def main(args):
    """Do what the command line asks. Returns the exit code; raises InputError."""
    device = choose_device(args.device)
    require(args.compare or not args.csv, "--csv goes with --compare")
    if args.compare:
        others = args.list or args.teacher
        require(not others, "--compare reads the logs: --list and --teacher do not change it")
        compare_runs(args)
        return 0
    single = len(args.run) == 1
    require(single or args.figures, "several runs go with --compare, or with --figures N")
    runs = [load_run(folder, args, device) for folder in args.run]
    if args.predict:
        folder = args.out or runs[0].path.with_name("predictions") / output_name(runs[0], args)
        print_better_network(runs[0], args)
        return predict(runs[0].network, runs[0].record, args.predict, folder, device)
    dataset = load_data(runs, args)
    if args.error_localization:
        print_error_localization(runs[0], dataset, args, device)
    elif single:
        if args.figures:
            print_average_precision(runs[0], dataset, args, device)
        print_scores(runs[0], dataset, args, device)
    if args.figures:
        draw_figures(runs, dataset, args, device)
    return 0


def choose_device(name):
    is_gpu = torch.cuda.is_available()
    require(is_gpu or name != "cuda", "--device cuda: PyTorch sees no GPU; use --device cpu")
    return torch.device("cuda" if is_gpu and name != "cpu" else "cpu")


def compare_runs(args):
    """Print the table of --compare, and write --csv."""
    runs = {}  # {folder: (settings, results)}
    for folder in args.run:
        path = checkpoint_path(folder, args.stage)
        if path.exists():
            runs[folder] = run_results(read_checkpoint(path))
        else:
            print(f"{path} does not exist: {folder} is left out", file=sys.stderr)
    require(runs, "there is no checkpoint to compare")
    print(compare(runs.values()))
    if args.csv:
        rows = [{"run": folder, **runs[folder][1], **runs[folder][0]} for folder in runs]
        with replacing(args.csv) as file:
            file.write(csv_text(rows).encode())
        print(f"a line a run: {args.csv}")


def caption_of(run, args):
    """What the run's network is called in tables, figures and names of files."""
    if run.path.stem == "stage1":
        return "stage 1"
    return "teacher" if args.teacher else "student"


def output_name(run, args):
    return caption_of(run, args).replace(" ", "")


def print_better_network(run, args):
    """Say if the log of stage 2 knows a better network than the one that predicts."""
    path = run.path.with_name("log_stage2.csv")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = [row for row in csv.DictReader(lines) if row.get("mIoU")]
    if not rows:
        return
    known = {"student": rows[-1]["mIoU"], "teacher": rows[-1]["mIoU_teacher"]}
    if path.with_name("student_stage1.pt").exists():
        known["stage 1"] = rows[0]["mIoU"]  # with which the log begins
    options = {"stage 1": "--stage 1", "student": "--stage 2 without --teacher"}
    options["teacher"] = "--stage 2 --teacher"
    used = caption_of(run, args)
    best = max(known, key=lambda caption: float(known[caption]))
    if best != used and used in known:
        line = f"{used} has mIoU {float(known[used]):.1f} in the log, {best} has"
        print(f"{line} {float(known[best]):.1f}: {options[best]} takes it", file=sys.stderr)


def load_data(runs, args):
    """The data set of the first run, which must fit the others. Raises InputError.

    Its validation images are those of --list, if that is given.
    """
    first = runs[0]
    settings = first.checkpoint["args"]
    dataset = load_dataset(settings["dataset"], args.data or settings["data"])
    if args.list:
        dataset.val = read_list(args.list, dataset.files)
    for run in runs:
        same_classes = run.checkpoint["classes"] == list(dataset.classes)
        same_size = run.record["size"] == first.record["size"]
        others = f"other classes than the data set, or another --size than {first.path}"
        require(same_classes and same_size, f"{run.path} has {others}")
    return dataset


def title(run, args):
    kind = "teacher" if args.teacher else "student"
    step = run.checkpoint["step"] if args.teacher else run.record["step"]
    return f"{run.path.stem}, step {step}, {kind}:"


def print_scores(run, dataset, args, device):
    """The IoU of each class, of stage 1, student and teacher."""
    process = Process(device=device)
    columns = {}  # {caption: (C, C)}
    for caption, network in networks_of_run(run, args, device).items():
        matrices = score(network, dataset, run.record["size"], process, args.workers)
        columns[caption] = matrices["resized"]
        if network is run.network:
            own_size = matrices["original"]
    if not torch.equal(columns[caption_of(run, args)], own_size):
        columns["own size"] = own_size
    kind = "listed" if args.list else "validation"
    images = f"{len(dataset.val)} {kind} images of {dataset.name}"
    print(f"{title(run, args)} IoU in percent, {images}")
    print(f"{'class':20}" + "".join(f"{caption:>10}" for caption in columns))
    table = torch.stack([iou(matrix) for matrix in columns.values()], dim=1)  # (C, columns)
    means = [mean_iou(matrix) for matrix in columns.values()]
    for name, values in zip([*dataset.classes, "mean"], [*table.tolist(), means]):
        print(f"{printable(name):20}" + "".join(f"{value:10.2f}" for value in values))
    have_iou = table.isfinite().sum(0).tolist()
    if min(have_iou) < len(table):
        classes = f"{have_iou} of {len(table)} classes"
        print(f"means over {classes}: the others are neither there nor predicted")


def networks_of_run(run, args, device):
    """{caption: network}: stage 1's, if it is there, then stage 2's student and teacher."""
    if run.checkpoint["stage"] == 1:
        return {"stage 1": run.network}
    networks = {}
    before = run.path.with_name("student_stage1.pt")
    if before.exists():
        networks["stage 1"], _ = load_student(before, device)
    for caption in ("student", "teacher"):
        network = run.network
        if caption != caption_of(run, args):
            network = copy.deepcopy(run.network)
            load_state(network, run.checkpoint["networks"], run.path, f"{caption}.")
        networks[caption] = network
    return networks


def print_error_localization(run, dataset, args, device):
    """Print Table 4: how well ELN and a threshold find the wrong pixels."""
    kind, keys = images_to_judge([run], dataset, args)
    images = images_with_masks(dataset, keys, run.record["size"], device, args.workers)
    eln = load_eln(run.path, run.checkpoint, device)
    table = error_localization(run.network, eln, images, args.threshold)
    rule = f"confidence rejects up to {args.threshold}"
    print(f"{title(run, args)} errors, {len(keys)} {kind} images; {rule}")
    print(f"{'method':12}{'positive':12}{'over':12}{'precision':>10}{'recall':>10}{'F1':>10}")
    for (method, positive, over), values in table.items():
        print(f"{method:12}{positive:12}{over:12}" + "".join(f"{x:10.4f}" for x in values))


def print_average_precision(run, dataset, args, device):
    """Say in two sentences whether ELN (the s-ECN) or confidence finds errors better."""
    eln = load_eln(run.path, run.checkpoint, device)
    if eln is None:
        return
    kind, keys = images_to_judge([run], dataset, args)
    keys = spread(keys, 100)
    images = images_with_masks(dataset, keys, run.record["size"], device, args.workers)
    table = error_localization(run.network, eln, images, args.threshold)
    precision = {}  # {method: average precision}
    for (method, _, over), values in table.items():
        if over == "AP":
            precision[method] = values[0]
    chance = precision.pop("none")
    (name, of_eln), (rival, of_rival) = precision.items()  # "ELN" or "s-ECN", "confidence"
    better = name if of_eln > of_rival else rival
    print(f"{name} and plain {rival} each order the pixels of {len(keys)} {kind} images by how")
    print("much they suspect them; the average precision of such an order is 1 where all wrong")
    print(f"pixels of the {caption_of(run, args)} come first, and {chance:.3f} by chance.")
    have = f"{name} has {of_eln:.3f} and {rival} {of_rival:.3f}"
    print(f"{have}: here {better} finds errors better.")


def images_to_judge(runs, dataset, args):
    """Unlabelled images of a run that have a mask, else validation images: kind and ids."""
    unlabeled = runs[0].checkpoint["unlabeled"]
    with_mask = [key for key in unlabeled if key in dataset.files and dataset.has_mask(key)]
    if args.list:
        return "listed", dataset.val
    if len(runs) == 1 and with_mask:
        return "unlabelled", with_mask
    return "validation", dataset.val


def draw_figures(runs, dataset, args, device):
    """Fig. 5 of one run, or several runs side by side as in Fig. 3."""
    _, keys = images_to_judge(runs, dataset, args)
    size = runs[0].record["size"]
    eln = None
    folders = [str(run.path.parent).replace("/", "-") for run in runs]
    shared = os.path.commonprefix(folders).rfind("-") + 1  # it would fill the space
    networks = {folder[shared:]: run.network for folder, run in zip(folders, runs)}
    name = "compare"
    if len(runs) == 1:
        networks = networks_of_run(runs[0], args, device)
        networks.pop("student" if args.teacher else "teacher", None)
        eln = load_eln(runs[0].path, runs[0].checkpoint, device)
        name = output_name(runs[0], args)
    rows = []
    keys = spread(keys, args.figures)
    for key, (X, label, _) in zip(keys, images_with_masks(dataset, keys, size, device)):
        image = resize(dataset.read_image(key), label.shape)
        rows.append(panels(networks, eln, X, image, label, runs[0].record["palette"]))
    palette = runs[0].record["palette"]
    legend = {name: tuple(colour) for name, colour in zip(dataset.classes, palette)}
    legend["void"] = (255, 255, 255)
    if eln is not None:
        legend["void, rejected"] = legend.pop("void")
        legend["wrong or rejected"] = RIGHT_OR_WRONG[1]
    folder = args.out or runs[0].path.with_name("figures")
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / f"{name}.png") as file:
        sheet(rows, legend).save(file, "PNG")
    print(f"figures: {folder / name}.png")


def parse_args(argv=None):
    """The command line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("run", type=Path, nargs="+", metavar="RUN", help="a run's folder: runs/shapes-1_20-0")
    add("--stage", type=int, choices=(1, 2), help="of the networks (default: the latest)")
    add("--teacher", action="store_true", help="stage 2's teacher instead of its student")
    add("--data", metavar="DIR", help="of the data set (default: where the run found it)")
    add("--list", metavar="FILE", help="of ids to score and draw, instead of val.txt's")
    add("--out", type=Path, metavar="DIR", help="of predictions, figures (default: in RUN)")
    add("--csv", metavar="FILE", help="with --compare: the results and options of each run")
    add("--threshold", type=within(0, 1, float), default=0.9, help="of Table 4 (default: 0.9)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if any")
    add("--workers", type=within(0), default=0, help="processes that load data (default: 0)")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--figures", type=within(0), default=0, metavar="N", help="draw N images, see above")
    add("--error-localization", action="store_true", help="Table 4, see above")
    add("--predict", type=Path, nargs="+", metavar="PATH", help="segment images, see above")
    add("--compare", action="store_true", help="print a Markdown table of the runs' results")
    return parser.parse_args(argv)


if __name__ == "__main__":
    tolerant_output()
    try:
        sys.exit(main(parse_args()))
    except (InputError, OSError) as error:
        print(f"evaluate.py: {one_line(error)}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        print("evaluate.py: out of memory", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)

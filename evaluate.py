"""Measure and look at a run (Sec. 4.3).

python evaluate.py RUN                        mIoU and the IoU of every class, of the run's latest student
python evaluate.py RUN --figures 4            the paper's Fig. 5 for the first unlabelled images
python evaluate.py RUN --error-localization   how well ELN finds errors on the unlabelled images (Table 4)
python evaluate.py RUN --predict IMAGE ...    masks of any images; needs no data set
python evaluate.py RUN RUN ... --figures 4    the runs' predictions for the same images, side by side
python evaluate.py RUN RUN ... --compare      a table; runs that differ in split and seed make one row
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw

from data import (
    VOID, InputError, ignore_signals, load_dataset, normalize, one_line, read_rgb, replacing, resize, within,
)
from eln import ErrorLocalizationNetwork, doubt, eln_input, rejected
from model import BACKBONES, DeepLabV3Plus, load_tensors

# A run may be resumed with other values of these options; all others change its result.
FREE = ("data", "out", "device", "workers", "save_every", "eval_every", "log_every", "stage1")
PIXELS = 2**22  # that are counted at a time: bounds memory for very large images


def read_checkpoint(path, needed=("args", "step", "networks", "classes", "labeled", "unlabeled"), stage=None):
    """A dict of tensors and plain values that torch.save wrote, with `needed` among its keys; runs no code.

    Raises InputError, naming the file, if it is missing, damaged, of another stage, or something else.
    """
    try:
        checkpoint = load_tensors(path)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except Exception:  # damaged bytes reach the readers as errors of many kinds
        raise InputError(
            f"{path} cannot be read: it is damaged, or holds something else than tensors and plain values"
        ) from None
    missing = set(needed).difference(checkpoint if isinstance(checkpoint, dict) else ())
    if missing:
        raise InputError(f"{path} is not the file that is needed here: it has no {sorted(missing)[0]}")
    if stage and checkpoint.get("stage") != stage:
        raise InputError(f"{path} is not a checkpoint of stage {stage}")
    return checkpoint


def read_result(path):
    """The entries of result.json, {} if there is none. Raises InputError if it is damaged."""
    try:
        results = json.loads(path.read_text()) if path.exists() else {}
        for entry in results.values():
            float(entry["mIoU"]), float(entry["best_mIoU"]), entry["arguments"].items(), entry["steps"]
        return results
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputError(f"{path} is damaged: move it away") from None


def fill(network, state, path):
    """network.load_state_dict(state), strictly. Raises InputError, naming the file, if they do not fit."""
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise InputError(f"{path} holds other networks than are needed: {reason[:80]} ...") from None


def load_student(path, device="cpu"):
    """A trained segmentation network from student_stage1.pt or student_stage2.pt.

    Returns (network in eval mode, record). The record is a dict with classes (C names), palette (C RGB
    triples), size (H, W) of training images, and crop (True: trained on crops, images go in as they are).
    Raises InputError if the file is missing, broken, or of something else.
    """
    record = read_checkpoint(path, ("network", "backbone", "width", "classes", "palette", "size", "crop"))
    if record["backbone"] not in BACKBONES:
        raise InputError(f"{path} holds a network with the backbone {record['backbone']}, unknown here")
    network = DeepLabV3Plus(len(record["classes"]), record["backbone"], "none", record["width"])
    fill(network, record.pop("network"), path)
    return network.to(device, memory_format=torch.channels_last).eval(), record


def load_eln(path, checkpoint, device="cpu"):
    """ELN, or the s-ECN, in eval mode from a checkpoint that was read from `path`; None if it has none."""
    networks = checkpoint["networks"]
    state = {key.split("eln.", 1)[1]: value for key, value in networks.items() if "eln." in key}
    if not state:
        return None
    args, C = checkpoint["args"], len(checkpoint["classes"])
    outputs = C if args["corrector"] == "ecn" else 1
    eln = ErrorLocalizationNetwork(C, args["eln_backbone"], "none", args["width"], outputs)
    fill(eln, state, path)
    return eln.to(device, memory_format=torch.channels_last).eval()


class Scenes(torch.utils.data.Dataset):
    """Images with masks for measuring: scenes[i] = image and label at the network's size, label as it is.

    keys  ids of the data set
    size  (H, W); if the data set is trained on crops, images stay as they are
    All three are uint8: (3, H, W), (H, W), (H0, W0).
    """

    def __init__(self, dataset, keys, size):
        self.dataset, self.keys, self.size = dataset, keys, size

    def __len__(self):
        return len(self.keys)

    def __getitem__(self, i):
        image, label = self.dataset.read_pair(self.keys[i])
        size = image.shape[1:] if self.dataset.crop else self.size
        return *resize(image, label, size), label


def scenes_of(dataset, keys, size, device, workers):
    """Scenes one by one, on the device: X (1, 3, H, W) float, label (H, W) int64, original (H0, W0) uint8."""
    scenes = Scenes(dataset, keys, size)
    loader = torch.utils.data.DataLoader(scenes, None, num_workers=workers, worker_init_fn=ignore_signals)
    for done, (image, label, original) in enumerate(loader, start=1):
        yield normalize(image.to(device))[None], label.to(device).long(), original.to(device)
        if sys.stderr.isatty():
            end = "\r\033[K" if done == len(keys) else ""
            print(f"\r{done}/{len(keys)} images", end=end, file=sys.stderr, flush=True)


def count(prediction, label, C):
    """Confusion matrix (C, C) int64, [true, predicted] pixels, of two (H, W) integer; void is left out."""
    matrix = torch.zeros(C * C, dtype=torch.int64, device=label.device)
    for Y, P in zip(label.flatten().split(PIXELS), prediction.flatten().split(PIXELS)):
        known = Y != VOID
        matrix += torch.bincount(Y[known].long() * C + P[known].long(), minlength=C * C)
    return matrix.reshape(C, C)


def resized_argmax(logits, size):
    """argmax over the classes of logits (1, C, h, w), resized to `size` (H, W) -> (H, W) uint8.

    One class after the other, so that memory does not grow with their number.
    """
    highest = torch.full(tuple(size), -torch.inf, dtype=logits.dtype, device=logits.device)
    winner = torch.zeros(tuple(size), dtype=torch.uint8, device=logits.device)
    for c in range(logits.shape[1]):
        one = F.interpolate(logits[:, c : c + 1], tuple(size), mode="bilinear", align_corners=False)[0, 0]
        winner.masked_fill_(one > highest, c)
        highest = torch.maximum(highest, one)
    return winner


@torch.no_grad()
def score(network, dataset, size, device, rank=0, world=1, workers=0):
    """Confusion matrices of the validation split, every image counted once whatever the number of processes.

    Returns {"resized": (C, C), "original": (C, C)} int64, [true, predicted]: against labels resized to `size`
    (the paper's, Sec. 4.2), and against labels as they are, with the logits resized to them.
    """
    C = len(dataset.classes)
    matrices = torch.zeros(2, C, C, dtype=torch.int64, device=device)
    network.eval()
    for X, label, original in scenes_of(dataset, dataset.val[rank::world], size, device, workers):
        logits = network(X)[0]
        matrices[0] += count(logits[0].argmax(0), label, C)
        matrices[1] += count(resized_argmax(logits, original.shape), original, C)
    if world > 1:
        dist.all_reduce(matrices)
    return {"resized": matrices[0], "original": matrices[1]}


def iou(matrix):
    """IoU of each class in percent, (C,) float64; nan where a class is neither there nor predicted."""
    matrix = matrix.double()
    hit = matrix.diagonal()
    return 100 * hit / (matrix.sum(0) + matrix.sum(1) - hit)


def mean_iou(matrix):
    """mIoU in percent: the mean of iou(matrix) over the classes that have one."""
    return float(iou(matrix).nanmean())


class Ranking:
    """Average precision of a score that should be high where a prediction is wrong, over all pixels.

    Scores are counted in `bins` equal steps from low to high, so that memory stays bounded; pixels within
    one step count as ties.
    """

    def __init__(self, low, high, device, bins=20000):
        self.low, self.high, self.counts = low, high, torch.zeros(2, bins, dtype=torch.int64, device=device)

    def add(self, score, wrong):
        """score (n,) float, wrong (n,) bool."""
        bins = self.counts.shape[1]
        place = ((score - self.low) / (self.high - self.low) * bins).long().clamp(0, bins - 1)
        self.counts += torch.bincount(place + bins * wrong, minlength=2 * bins).reshape(2, bins)

    def average_precision(self):
        """sum over score steps, from high to low, of precision times the gain in recall."""
        right, wrong = self.counts.flip(1).double().cumsum(1)
        precision = wrong / (wrong + right).clamp(min=1)
        return float((precision * self.counts[1].flip(0)).sum() / wrong[-1].clamp(min=1))


def rates(hits, claimed, positive):
    """Precision, recall and F1 from numbers of pixels, float64: (3, ...), nan where undefined."""
    return torch.stack([hits / claimed, hits / positive, 2 * hits / (claimed + positive)])


@torch.no_grad()
def error_localization(network, eln, scenes, threshold):
    """Table 4: does ELN (or s-ECN), or a threshold on the softmax's confidence, tell wrong pixels from right?

    eln        ELN, s-ECN or None; scenes  an iterable as from scenes_of
    threshold  pixels of at most this confidence are taken for wrong
    Returns {method: {"correct": ..., "error": ..., "AP": number}}. "correct" and "error", as the positive
    class, hold {"image": (3,), "pooled": (3,)}: precision, recall and F1 averaged over images (where
    defined), and over all pixels. AP is the average precision at ranking errors first. Void is left out.
    The method "none" rejects nothing; the others should do better than that.
    """
    rankings, counts = {}, {}
    for X, label, _ in scenes:
        logits = network(X)[0]
        known = label != VOID
        wrong = (logits[0].argmax(0) != label)[known]  # (n,) bool
        log_P = logits[0].double().log_softmax(0)[:, known]  # (C, n)
        confidence = log_P.max(0).values.exp()
        entropy = -(log_P.exp() * log_P).sum(0)
        # how much each method doubts a pixel, and which pixels it rejects
        methods = {
            "confidence": (-torch.logit(confidence, eps=1e-12), confidence <= threshold),
            "entropy": (entropy.clamp(min=1e-12).log(), None),
            "none": (torch.zeros_like(entropy), torch.zeros_like(wrong)),
        }
        if eln is not None:
            output = eln(eln_input(X, logits))
            name = "ELN" if output.ndim == 3 else "s-ECN"
            methods = {name: [f(output, logits)[0][known] for f in (doubt, rejected)], **methods}
        for method, (amount, refused) in methods.items():
            rankings.setdefault(method, Ranking(-30, 30, X.device)).add(amount, wrong)
            if refused is None:
                continue
            for kind, positive, claimed in (("correct", ~wrong, ~refused), ("error", wrong, refused)):
                row = torch.stack([(positive & claimed).sum(), claimed.sum(), positive.sum()]).double()
                counts.setdefault((method, kind), []).append(row)
    table = {method: {"AP": ranking.average_precision()} for method, ranking in rankings.items()}
    for (method, kind), rows in counts.items():
        rows = torch.stack(rows)  # (images, 3)
        table[method][kind] = {
            "image": rates(*rows.T).nanmean(1).tolist(), "pooled": rates(*rows.sum(0)).tolist()
        }
    return table


def save_png(image, path):
    """Write a PIL image, aside and then into place."""
    with replacing(path) as file:
        image.save(file, "PNG")


def colour(index, palette):
    """(H, W) int64 -> (H, W, 3) uint8 by the palette (C, 3); void (255) becomes white."""
    table = np.full((256, 3), 255, np.uint8)
    table[: len(palette)] = palette
    return table[index.cpu().numpy()]


@torch.no_grad()
def fig5(network, eln, X, image, label, palette):
    """The paper's Fig. 5 for one image, with its input and truth: a PIL image of six panels with captions.

    X (1, 3, H, W); image (3, H, W) uint8; label (H, W) int64; eln may be None (two panels fewer)
    """
    logits = network(X)[0]
    prediction = logits[0].argmax(0)
    wrong = (prediction != label) & (label != VOID)

    def binary(mask):
        shown = np.where(mask.cpu().numpy()[..., None], np.uint8([220, 40, 40]), np.uint8([225, 225, 225]))
        return np.where((label == VOID).cpu().numpy()[..., None], np.uint8([128, 128, 128]), shown)

    panels = [
        ("image", image.permute(1, 2, 0).cpu().numpy()),
        ("ground truth", colour(label, palette)),
        ("(a) prediction", colour(prediction, palette)),
        ("(b) errors", binary(wrong)),
    ]
    if eln is not None:
        refused = rejected(eln(eln_input(X, logits)), logits)[0]
        panels.append(("(c) errors found by ELN", binary(refused)))
        panels.append(("(d) prediction, filtered", colour(prediction.masked_fill(refused, VOID), palette)))
    return sheet(panels)


def sheet(panels):
    """A PIL image of (caption, (H, W, 3) uint8) side by side, small ones enlarged."""
    H, W = panels[0][1].shape[:2]
    zoom = max(1, round(192 / W))
    H, W = H * zoom, W * zoom
    image = Image.new("RGB", (len(panels) * (W + 4) - 4, H + 14), "white")
    for i, (caption, panel) in enumerate(panels):
        image.paste(Image.fromarray(panel).resize((W, H), Image.Resampling.NEAREST), (i * (W + 4), 14))
        ImageDraw.Draw(image).text((i * (W + 4) + 2, 1), caption, fill="black")
    return image


@torch.no_grad()
def predict(network, record, path, folder, device):
    """Segment an image file: STEM_class.png (class numbers), STEM_colour.png, STEM_overlay.png in folder."""
    image = read_rgb(path)
    size = image.shape[1:] if record["crop"] else record["size"]
    logits = network(normalize(resize(image, None, size)[0].to(device))[None])[0]
    index = resized_argmax(logits, image.shape[1:])
    painted = colour(index, record["palette"])
    overlay = image.permute(1, 2, 0).numpy() // 2 + painted // 2
    folder.mkdir(exist_ok=True)
    stem = folder / Path(path).stem
    for name, array in (
        ("class", index.cpu().numpy()),
        ("colour", painted),
        ("overlay", overlay),
    ):
        save_png(Image.fromarray(array), f"{stem}_{name}.png")
    return f"{stem}_overlay.png"


def latest_stage(run):
    """2 if stage 2's student is there, else 1."""
    return 2 if (run / "student_stage2.pt").exists() else 1


def compare(runs, stage=None):
    """A Markdown table from result.json; runs that differ in split, seed and FREE options alone are one row.

    A row is named by the options in which it differs from the others of its stage. mIoU in percent: mean and
    standard deviation (n - 1) of the student and of the teacher, each at the last and at its best step.
    Raises InputError for a run without a result.
    """
    groups = {}
    for run in runs:
        results = read_result(run / "result.json")
        name = f"stage{stage}" if stage else max(results, default="result")
        if name not in results:
            raise InputError(f"{run} has no {name}: let its training end")
        arguments = results[name]["arguments"].items()
        settings = {key: value for key, value in arguments if key not in (*FREE, "split", "seed")}
        groups.setdefault((name, json.dumps(settings)), []).append(results[name])

    def shown(entries, key):
        values = [entry[key] for entry in entries if key in entry]
        deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.2f}{deviation}" if values else ""

    lines = ["| run | number | mIoU | best | teacher | its best | steps |", "| --- " * 7 + "|"]
    for (name, settings), entries in groups.items():
        peers = [json.loads(other) for stage_name, other in groups if stage_name == name]
        differing = [
            f"{key} {value}" for key, value in json.loads(settings).items()
            if any(peer.get(key) != value for peer in peers)
        ]
        scores = [shown(entries, key) for key in ("mIoU", "best_mIoU", "mIoU_teacher", "best_mIoU_teacher")]
        cells = [", ".join([name, *differing]), str(len(entries)), *scores, str(entries[0]["steps"])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


@torch.no_grad()
def side_by_side(runs, stage, data, number, device):
    """The students' predictions for the first `number` validation images: a PIL image, a row for each.

    stage as in --stage, data as in --data. Raises InputError if the runs are of different data sets.
    """
    rows = []
    for run in runs:
        of_run = stage or latest_stage(run)
        path = run / f"stage{of_run}.pt"
        checkpoint = read_checkpoint(path, stage=of_run)
        network, record = load_student(run / f"student_stage{of_run}.pt", device)
        name, classes = checkpoint["args"]["dataset"], checkpoint["classes"]
        if not rows:
            dataset = load_dataset(name, data or checkpoint["args"]["data"])
        if (name, classes) != (dataset.name, list(dataset.classes)):
            raise InputError(f"{path} is of another data set, or has other classes, than {runs[0]}")
        keys = dataset.val[:number]
        for i, (X, label, original) in enumerate(scenes_of(dataset, keys, record["size"], device, 0)):
            size = rows[i][0][1].shape[:2] if run != runs[0] else label.shape
            if run == runs[0]:
                image, truth = resize(dataset.read_image(keys[i]), original.cpu(), size)
                truth = colour(truth.long(), record["palette"])
                rows.append([("image", image.permute(1, 2, 0).numpy()), ("ground truth", truth)])
            prediction = resized_argmax(network(X)[0], size)
            rows[i].append((run.name, colour(prediction.long(), record["palette"])))
    sheets = [sheet(panels) for panels in rows]
    whole = Image.new("RGB", (max(s.width for s in sheets), sum(s.height + 4 for s in sheets)), "white")
    top = 0
    for row in sheets:
        whole.paste(row, (0, top))
        top += row.height + 4
    return whole


def parse_args(argv=None):
    """The command line. --help tells more."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("run", type=Path, nargs="+", metavar="RUN", help="a run's folder, such as runs/shapes-1_20-0")
    add("--stage", type=int, choices=(1, 2), help="which stage's networks (default: the latest)")
    add("--data", metavar="DIR", help="where the data set lies (default: where the run found it)")
    add("--figures", type=within(0), default=0, metavar="N", help="draw Fig. 5 for N unlabelled images; of "
        "several runs, the predictions for N validation images")
    add("--compare", action="store_true", help="print a Markdown table of the runs' results")
    add("--predict", nargs="+", metavar="IMAGE", help="segment image files; scores nothing")
    add("--error-localization", action="store_true", help="Table 4, on the unlabelled images")
    add("--threshold", type=within(0, 1, float), default=0.9, help="on the confidence, Table 4 (0.9)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda if there is one")
    add("--workers", type=within(0), default=0, help="processes that load data (default: 0, none)")
    return parser.parse_args(argv)


def main(args):
    """Do what the command line asks. Raises InputError for a run or data that cannot be used."""
    for folder in args.run:
        if not folder.is_dir():
            raise InputError(f"{folder} is not a run's folder")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch sees no GPU here; use --device cpu")
    device = "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"
    if args.compare:
        return print(compare(args.run, args.stage))
    if len(args.run) > 1:
        if not args.figures:
            raise InputError("several runs go with --compare, or with --figures N")
        path = args.run[0] / "figures" / "compare.png"
        path.parent.mkdir(exist_ok=True)
        save_png(side_by_side(args.run, args.stage, args.data, args.figures, device), path)
        return print(f"figure: {path}")
    run, = args.run
    stage = args.stage or latest_stage(run)
    network, record = load_student(run / f"student_stage{stage}.pt", device)
    if args.predict:
        if len({Path(path).stem for path in args.predict}) < len(args.predict):
            raise InputError("--predict: two images have the same name, and so would their predictions")
        for path in args.predict:
            print(predict(network, record, path, run / "predictions", device))
        return
    path = run / f"stage{stage}.pt"
    checkpoint = read_checkpoint(path, stage=stage)
    size = record["size"]
    dataset = load_dataset(checkpoint["args"]["dataset"], args.data or checkpoint["args"]["data"])
    if list(dataset.classes) != checkpoint["classes"]:
        raise InputError(
            f"{path} has the classes {checkpoint['classes']}, but the data set {dataset.classes}"
        )
    eln = load_eln(path, checkpoint, device)
    # training images that were used without their mask; it is read for measuring only
    masked = [key for key in checkpoint["unlabeled"] if key in dataset.files and dataset.has_mask(key)]
    if (args.figures or args.error_localization) and not masked:
        raise InputError(f"none of the unlabelled images of {run} has a mask to measure with")

    if args.error_localization:
        scenes = scenes_of(dataset, masked, size, device, args.workers)
        table = error_localization(network, eln, scenes, args.threshold)
        print(
            f"errors of the stage {stage} student on {len(masked)} unlabelled images, "
            f"confidence rejects up to {args.threshold}"
        )
        print(f"{'method':12}{'positive':10}{'over':8}{'precision':>10}{'recall':>8}{'F1':>8}")
        for name, entry in table.items():
            for positive in ("correct", "error"):
                for over, values in entry.get(positive, {}).items():
                    print(f"{name:12}{positive:10}{over:8}{values[0]:10.4f}{values[1]:8.4f}{values[2]:8.4f}")
        for name, entry in table.items():
            print(f"{name:12}average precision at finding errors {entry['AP']:.4f}")
        return

    matrices = score(network, dataset, size, device, workers=args.workers)
    resized, original = iou(matrices["resized"]).tolist(), iou(matrices["original"]).tolist()
    print(f"stage {stage} student on {len(dataset.val)} validation images of {dataset.name}; IoU in percent")
    print(f"{'class':20}{'resized':>10}{'original':>10}")
    for row in zip(dataset.classes, resized, original):
        print(f"{row[0]:20}{row[1]:10.2f}{row[2]:10.2f}")
    print(f"{'mean':20}{mean_iou(matrices['resized']):10.2f}{mean_iou(matrices['original']):10.2f}")
    if args.figures:
        folder = run / "figures"
        folder.mkdir(exist_ok=True)
        keys = masked[: args.figures]
        for key, (X, label, _) in zip(keys, scenes_of(dataset, keys, size, device, 0)):
            image = resize(dataset.read_image(key), None, label.shape)[0]
            save_png(fig5(network, eln, X, image, label, record["palette"]), folder / f"{key}.png")
            print(f"figure: {folder / key}.png")
    known = read_result(run / "result.json")
    print("   ".join(f"{name}: student's mIoU {entry['mIoU']:.2f}" for name, entry in sorted(known.items())))


if __name__ == "__main__":
    try:
        main(parse_args())
    except (InputError, OSError) as error:
        print(f"evaluate.py: {one_line(error)}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)

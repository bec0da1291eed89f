"""Measure and look at a run (Sec. 4.3), also while it is still in training.

python evaluate.py RUN                        mIoU and the IoU of every class, of the run's latest student
python evaluate.py RUN --figures 4            the same, and how ELN does on unlabelled images: a line, Fig. 5
python evaluate.py RUN --error-localization   how well ELN finds errors on these (Table 4): those that have a
                                              mask, or if none has, validation images
python evaluate.py RUN --predict PATH ...     masks of images, or of all in a folder; needs no data set
python evaluate.py RUN RUN ... --figures 4    the runs' predictions for the same images, side by side
python evaluate.py RUN RUN ... --compare      a table; runs that differ in split and seed make one row
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from data import (
    ENDINGS, VOID, InputError, load_dataset, normalize, one_line, read_rgb, replacing, require, resize,
    within,
)
from eln import ErrorLocalizationNetwork, eln_input, margin
from model import BACKBONES, DeepLabV3Plus, load_tensors

# A run may be resumed with other values of these options: they change nothing, or their ids are compared.
FREE = ("data", "out", "device", "workers", "save_every", "eval_every", "log_every", "run", "labeled_list",
        "unlabeled_list")
KEYS = ("stage", "args", "step", "rows", "networks", "classes", "labeled", "unlabeled")  # read of stageN.pt
STEPS = 20000  # of a doubt from -30 to 30, in which average precision counts pixels; ties within a step


@torch.no_grad()
def score(network, dataset, size, device, rank=0, world=1, workers=0):
    """Confusion matrices of the validation split, every image counted once whatever the number of processes.
    Returns {"resized": (C, C), "original": (C, C)} int64, [true, predicted]: against labels resized to `size`
    (the paper's, Sec. 4.2), and against labels as they are, with the logits resized to them."""
    C = len(dataset.classes)
    matrices = torch.zeros(2, C, C, dtype=torch.int64, device=device)
    network.eval()
    for X, label, original in scenes_of(dataset, dataset.val[rank::world], size, device, workers):
        logits = network(X)[0]
        matrices[0] += count(logits[0].argmax(0), label, C)
        matrices[1] += count(resized_argmax(logits, original.shape), original, C)
    if world > 1:
        torch.distributed.all_reduce(matrices)
    return {"resized": matrices[0], "original": matrices[1]}


def count(prediction, label, C):
    """Confusion matrix (C, C) int64, [true, predicted] pixels, of two (H, W) integer; void is left out."""
    known = label != VOID
    pairs = label[known].int() * C + prediction[known].int()
    return torch.bincount(pairs, minlength=C * C).reshape(C, C)


def resized_argmax(logits, size):
    """argmax of logits (1, C, h, w) resized to (H, W) -> (H, W) uint8."""
    return F.interpolate(logits, size, mode="bilinear", align_corners=False)[0].argmax(0).byte()


def iou(matrix):
    """IoU of each class in percent, (C,) float64; nan where a class is neither there nor predicted."""
    matrix = matrix.double()
    hit = matrix.diagonal()
    return 100 * hit / (matrix.sum(0) + matrix.sum(1) - hit)


def mean_iou(matrix):
    """mIoU in percent: the mean of iou(matrix) over the classes that have one. InputError if none has."""
    require(matrix.any(), f"there is nothing to score: no pixel of the masks has a class ({VOID} is void)")
    return float(iou(matrix).nanmean())


def error_localization(network, eln, scenes, threshold):
    """Table 4: does ELN (or s-ECN), or a threshold on the softmax's confidence, tell wrong pixels from right?
    eln may be None; scenes as from scenes_of; pixels of a confidence up to `threshold` are taken for wrong.
    Returns {(method, positive, over): [precision, recall, F1]}. The positive class is "correct" or "error";
    over is "image", a mean over the images where it is defined, or "pooled", all pixels. With over "AP" the
    one value is the average precision. The method "none" rejects nothing: others should do better."""
    histograms, counts, table = {}, {}, {}
    for X, label, _ in scenes:
        logits = network(X)[0]
        known = label != VOID
        wrong = (logits[0].argmax(0) != label)[known]  # (n,) bool
        log_P = logits[0].double().log_softmax(0)[:, known]  # (C, n)
        confidence = log_P.max(0).values.exp()
        methods = {}  # how much each doubts a pixel, and which pixels it rejects
        if eln is not None:
            output = eln(eln_input(X, logits))
            doubt = -margin(output, logits)[0][known]
            methods["ELN" if output.ndim == 3 else "s-ECN"] = doubt, doubt >= 0
        methods["confidence"] = -torch.logit(confidence, eps=1e-12), confidence <= threshold
        methods["none"] = torch.zeros_like(confidence), torch.zeros_like(wrong)
        for method, (amount, refused) in methods.items():
            place = ((amount + 30) / 60 * STEPS).long().clamp(0, STEPS - 1)
            counted = torch.bincount(place + STEPS * wrong, minlength=2 * STEPS).reshape(2, STEPS)
            histograms[method] = histograms.get(method, 0) + counted
            counts.setdefault(method, []).append(count(refused, wrong, 2))
    for method, matrices in counts.items():
        each = torch.stack(matrices).double()  # (images, 2, 2), [wrong, rejected] pixels
        for over, matrix in (("image", each), ("pooled", each.sum(0, keepdim=True))):
            hits = matrix.diagonal(dim1=1, dim2=2)  # (images, 2): right pixels accepted, wrong ones rejected
            claimed, there = matrix.sum(1), matrix.sum(2)
            rates = torch.stack([hits / claimed, hits / there, 2 * hits / (claimed + there)])
            table[method, "correct", over], table[method, "error", over] = rates.nanmean(1).T.tolist()
    for method, counted in histograms.items():
        right, wrong = counted.flip(1).double().cumsum(1)  # the most doubted first
        precision, gain = wrong / (wrong + right).clamp(min=1), counted[1].flip(0)
        table[method, "error", "AP"] = [float((precision * gain).sum() / wrong[-1].clamp(min=1))]
    return table


def panels(networks, eln, X, image, label, palette):
    """An image, its truth and each network's prediction: {caption: (H, W, 3) uint8}.
    networks is {caption: network}; eln judges the last, with the panels of the paper's Fig. 5, or is None
    X (1, 3, H, W) float, image (3, H, W) uint8, label (H, W) int64, palette as for colour."""
    row = {"image": image.permute(1, 2, 0).numpy(), "truth": colour(label, palette)}
    for caption, network in networks.items():
        logits = network(X)[0]
        prediction = logits[0].argmax(0)
        row[caption] = colour(prediction, palette)
    if eln is not None:
        shades = [225] * 3, [220, 40, 40], [128] * 3  # right, wrong, void
        wrong = (prediction != label).byte()
        row["its errors"] = colour(wrong.masked_fill(label == VOID, 2), shades)
        output = eln(eln_input(X, logits))
        refused = margin(output, logits)[0] <= 0
        found = colour(refused.byte().masked_fill(label == VOID, 2), shades)
        row[f"{'ELN' if output.ndim == 3 else 's-ECN'} finds"] = found
        row["filtered"] = colour(prediction.masked_fill(refused, VOID), palette)
    return row


def sheet(rows):
    """A PIL image of panels' rows, which have the same captions and sizes; the captions stand on top."""
    H, W = rows[0]["image"].shape[:2]
    zoom = max(1, round(192 / W))  # small panels are enlarged
    H, W, gap, top = H * zoom, W * zoom, 4, W * zoom // 8
    whole = Image.new("RGB", (len(rows[0]) * (W + gap) - gap, top + len(rows) * (H + gap) - gap), "white")
    for i, caption in enumerate(rows[0]):
        text = Image.new("RGB", (W, top), "white")  # which cuts a long caption
        ImageDraw.Draw(text).text((2, 0), caption, fill="black", font_size=top * 0.75)
        whole.paste(text, (i * (W + gap), 0))
        for j, row in enumerate(rows):
            panel = Image.fromarray(row[caption]).resize((W, H), Image.Resampling.NEAREST)
            whole.paste(panel, (i * (W + gap), top + j * (H + gap)))
    return whole


def colour(index, palette):
    """(H, W) integer -> (H, W, 3) uint8 by the palette (C, 3); void (255) becomes white."""
    table = np.full((256, 3), 255, np.uint8)
    table[: len(palette)] = palette
    return table[index.cpu().numpy()]


def predict(network, record, paths, folder, device):
    """Segment images, and all in folders: STEM_class.png (class numbers), STEM_colour.png, STEM_overlay.png.
    A broken image does not end the others: its line goes to stderr. Returns the exit code, then 2."""
    files, code = {}, 0
    for path in paths:
        inside = [file for file in sorted(path.glob("[!.]*")) if file.suffix.lower() in ENDINGS]
        for file in inside or [path]:
            first = files.setdefault(file.stem, file)
            require(first == file, f"--predict: {file} and {first} would give the same files")
    for stem, path in files.items():
        try:
            image = read_rgb(path)
        except InputError as error:
            print(f"evaluate.py: {error}", file=sys.stderr)
            code = 2
            continue
        if image.max() < 64:
            print(f"{path}: its brightest value is {int(image.max())} of 255", file=sys.stderr)
        size = image.shape[1:] if record["crop"] else record["size"]
        X = normalize(resize(image, None, size)[0].to(device))[None]
        index = resized_argmax(network(X)[0], image.shape[1:])
        painted = colour(index, record["palette"])
        overlay = image.permute(1, 2, 0).numpy() // 2 + painted // 2
        folder.mkdir(exist_ok=True)
        for name, array in (("class", index.cpu().numpy()), ("colour", painted), ("overlay", overlay)):
            with replacing(folder / f"{stem}_{name}.png") as file:
                Image.fromarray(array).save(file, "PNG")
        print(folder / f"{stem}_overlay.png")
    return code


def compare(paths):
    """A Markdown table of checkpoints; runs that differ in split, seed and FREE options alone are one row.
    A row is named by the options in which it differs from the others of its stage. mIoU in percent: mean and
    standard deviation (n - 1) of student and teacher, each at the last and at the best validation."""
    groups = {}
    for path in paths:
        checkpoint = read_checkpoint(path)
        stage, step, args = checkpoint["stage"], checkpoint["step"], checkpoint["args"]
        settings = {**args, **{key: len(checkpoint[key]) for key in ("labeled", "unlabeled")}}
        names = [f"{key} {value}" for key, value in settings.items() if key not in (*FREE, "split", "seed")]
        done, *columns = groups.setdefault((stage, *names), ([], [], [], [], []))
        steps = args["iters"] if stage == 2 else args["pretrain_iters"] + args["eln_iters"]
        done.append(f"{step}" if step == steps else f"{step} of {steps}")
        for key, last, best in (("mIoU", *columns[:2]), ("mIoU_teacher", *columns[2:])):
            values = [row[key] for row in checkpoint["rows"] if key in row]
            last += values[-1:]
            best += sorted(values)[-1:]
    lines = ["| run | number | mIoU | best | teacher | its best | steps |", "| --- " * 7 + "|"]
    for (stage, *names), (done, *columns) in groups.items():
        differing = [name for name in names if not all(name in peer for peer in groups if peer[0] == stage)]
        cells = [", ".join([f"stage{stage}", *differing]), str(len(done))]
        for values in columns:
            deviation = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.2f}{deviation}" if values else "")
        lines.append(f"| {' | '.join(cells)} | {', '.join(dict.fromkeys(done))} |")
    return "\n".join(lines)


def read_checkpoint(path, needed=KEYS, stage=None):
    """A dict of tensors and plain values that torch.save wrote, with the keys `needed`; no code is run.
    Raises InputError, naming the file, if it is missing, damaged, of another stage, or something else."""
    try:
        checkpoint = load_tensors(path)
        missing = [key for key in needed if key not in checkpoint.keys()]
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path} does not exist") from None
    except Exception:  # damaged bytes reach the readers as errors of many kinds
        raise InputError(f"{path} is damaged, or no dict of tensors and plain values") from None
    require(not missing, f"{path} is not the file that is needed here: it has no {' '.join(missing[:1])}")
    require(stage in (None, checkpoint.get("stage")), f"{path} is not a checkpoint of stage {stage}")
    return checkpoint


def fill(network, state, path, prefix=""):
    """Load a state dict's entries below `prefix`, strictly. Raises InputError if they do not fit."""
    state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise InputError(f"{path} holds other networks than are needed: {reason[:80]} ...") from None


def load_student(path, device="cpu"):
    """The network of student_stage1.pt or student_stage2.pt, in eval mode, and a dict: classes (names),
    palette (C RGB triples), size (H, W) of training images, crop (True: trained on crops, images go in as
    they are), backbone, width. Raises InputError if the file is missing, broken, or of something else."""
    record = read_checkpoint(path, ("network", "backbone", "width", "classes", "palette", "size", "crop"))
    require(record["backbone"] in BACKBONES, f"{path} has the backbone {record['backbone']}, unknown here")
    network = DeepLabV3Plus(len(record["classes"]), record["backbone"], "none", record["width"])
    fill(network, record.pop("network"), path)
    return network.to(device, memory_format=torch.channels_last).eval(), record


def load_eln(path, checkpoint, device="cpu"):
    """ELN, or the s-ECN, in eval mode from a checkpoint read from `path`; None if none has been trained."""
    args, C, networks = checkpoint["args"], len(checkpoint["classes"]), checkpoint["networks"]
    trained = checkpoint["stage"] == 2 or checkpoint["step"] > args["pretrain_iters"]
    if not trained or not any(name.startswith("auxiliary.eln.") for name in networks):
        return None
    outputs = C if args["corrector"] == "ecn" else 1
    eln = ErrorLocalizationNetwork(C, args["eln_backbone"], "none", args["width"], outputs)
    fill(eln, networks, path, "auxiliary.eln.")
    return eln.to(device, memory_format=torch.channels_last).eval()


def scenes_of(dataset, keys, size, device, workers=0):
    """Images with masks, on the device: X (1, 3, H, W) float, label (H, W) int64, original (H0, W0) uint8.
    H, W is `size`; if the data set is trained on crops, images stay as they are."""
    loader = torch.utils.data.DataLoader(keys, None, collate_fn=dataset.read_pair, num_workers=workers)
    for done, (image, original) in enumerate(loader, start=1):
        image, label = resize(image, original, image.shape[1:] if dataset.crop else size)
        yield normalize(image.to(device))[None], label.to(device).long(), original.to(device)
        if sys.stderr.isatty():
            print(f"{done}/{len(keys)} images\033[K", end="\r", file=sys.stderr, flush=True)


def parse_args(argv=None):
    """The command line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("run", type=Path, nargs="+", metavar="RUN", help="a run's folder, such as runs/shapes-1_20-0")
    add("--stage", type=int, choices=(1, 2), help="which stage's networks (default: the latest)")
    add("--teacher", action="store_true", help="stage 2's teacher instead of its student")
    add("--data", metavar="DIR", help="where the data set lies (default: where the run found it)")
    add("--threshold", type=within(0, 1, float), default=0.9, help="on the confidence, Table 4 (0.9)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda if there is one")
    add("--workers", type=within(0), default=0, help="processes that load data (default: 0, none)")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--figures", type=within(0), default=0, metavar="N", help="draw N images, see above")
    add("--error-localization", action="store_true", help="Table 4, see above")
    add("--predict", type=Path, nargs="+", metavar="PATH", help="segment image files, or all of a folder")
    add("--compare", action="store_true", help="print a Markdown table of the runs' results")
    return parser.parse_args(argv)


@torch.no_grad()
def main(args):
    """Do what the command line asks. Returns the exit code; raises InputError for what cannot be used."""
    gpu = torch.cuda.is_available()
    require(gpu or args.device != "cuda", "--device cuda: PyTorch sees no GPU here; use --device cpu")
    device = "cuda" if gpu and args.device != "cpu" else "cpu"
    single = len(args.run) == 1
    require(single or args.compare or args.figures, "several runs go with --compare, or with --figures N")
    latest = [2 if (run / "student_stage2.pt").exists() else 1 for run in args.run]
    paths = [run / f"stage{args.stage or stage}.pt" for run, stage in zip(args.run, latest)]
    if args.compare:
        return print(compare(paths))

    networks, dataset = {}, None
    for path in paths:
        network, record = load_student(path.with_name(f"student_{path.name}"), device)
        checkpoint = read_checkpoint(path) if args.teacher or not args.predict else None
        if args.teacher:
            require(checkpoint["stage"] == 2, f"--teacher: {path} is of stage 1, which has none")
            fill(network, checkpoint["networks"], path, "teacher.")
        if args.predict:
            return predict(network, record, args.predict, path.with_name("predictions"), device)
        if dataset is None:
            dataset = load_dataset(checkpoint["args"]["dataset"], args.data or checkpoint["args"]["data"])
            size = record["size"]
        same = (checkpoint["classes"], record["size"]) == (list(dataset.classes), size)
        require(same, f"{path} has other classes than the data set, or another --size than {paths[0]}")
        networks[f"stage {checkpoint['stage']}" if single else str(path.parent)] = network
    unlabeled = [key for key in checkpoint["unlabeled"] if dataset.files.get(key, (None, None))[1]]
    kind, keys = ("unlabelled", unlabeled) if single and unlabeled else ("validation", dataset.val)
    eln = load_eln(path, checkpoint, device) if single else None
    who = f"{path.stem}, step {checkpoint['step']}, {'teacher' if args.teacher else 'student'}:"

    if args.error_localization:
        scenes = scenes_of(dataset, keys, size, device, args.workers)
        table = error_localization(network, eln, scenes, args.threshold)
        print(f"{who} errors, {len(keys)} {kind} images; confidence rejects up to {args.threshold}")
        print(f"{'method':12}{'positive':12}{'over':12}{'precision':>10}{'recall':>10}{'F1':>10}")
        for names, values in table.items():
            print("".join(f"{name:12}" for name in names) + "".join(f"{value:10.4f}" for value in values))
    elif single:
        before, columns = path.with_name("student_stage1.pt"), {}
        if checkpoint["stage"] == 2 and before.exists():
            networks = {"stage 1": load_student(before, device)[0], **networks}
        for name, each in networks.items():
            matrices = score(each, dataset, size, device, workers=args.workers)
            columns[name] = matrices["resized"]
        if not torch.equal(*matrices.values()):
            columns["own size"] = matrices["original"]
        means = [mean_iou(matrix) for matrix in columns.values()]
        table = torch.stack([iou(matrix) for matrix in columns.values()], 1)  # (C, columns)
        there = table.isfinite().sum(0).tolist()
        print(f"{who} IoU in percent, {len(dataset.val)} validation images of {dataset.name}")
        print(f"{'class':20}" + "".join(f"{name:>10}" for name in columns))
        for name, values in [*zip(dataset.classes, table.tolist()), ("mean", means)]:
            print(f"{name:20}" + "".join(f"{value:10.2f}" for value in values))
        if min(there) < len(table):
            print(f"means over {there} of {len(table)} classes: the others are neither there nor predicted")
    if args.figures and eln is not None:
        scenes = scenes_of(dataset, keys[:100], size, device, args.workers)
        table = error_localization(network, eln, scenes, args.threshold)
        line = "  ".join(f"{method} {row[0]:.3f}" for (method, _, over), row in table.items() if over == "AP")
        print(f"average precision (1 at best), errors in {len(keys[:100])} {kind} images:  {line}")
    if args.figures:
        rows = []
        for key, (X, label, _) in zip(keys, scenes_of(dataset, keys[: args.figures], size, device)):
            image = resize(dataset.read_image(key), None, label.shape)[0]
            rows.append(panels(networks, eln, X, image, label, record["palette"]))
        target = paths[0].parent / "figures" / (f"{path.stem}.png" if single else "compare.png")
        target.parent.mkdir(exist_ok=True)
        with replacing(target) as file:
            sheet(rows).save(file, "PNG")
        print(f"figures: {target}")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a name that the terminal's encoding lacks
    try:
        sys.exit(main(parse_args()))
    except (InputError, OSError) as error:
        print(f"evaluate.py: {one_line(error)}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)

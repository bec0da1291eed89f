"""Stage 1 (Sec. 3.1): the segmentation network, then auxiliary decoders and ELN with it, on labelled images.

    python train_stage1.py                                                   # `shapes`, on any machine
    torchrun --nproc_per_node=4 train_stage1.py --dataset voc --data DIR --ratio 1/20

First L_sup alone (--pretrain-iters), then L_labeled = L_sup + L_aux + L_ELN (--eln-iters). The same command
resumes an interrupted run. --supervised-only is L_sup alone for --iters steps: the "Baseline" of Table 1.
"""

import argparse
import contextlib
import csv
import io
import json
import math
import os
import shlex
import signal
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torchvision
from torch import nn

from data import (
    DATASETS, InputError, check_files, load_dataset, make_loader, normalize, one_line, replacing,
    share_of_batch, split_ids, within,
)
from eln import ErrorLocalizationNetwork, eln_input, rejected
from evaluate import FREE, fill, mean_iou, read_checkpoint, read_result, score
from losses import auxiliary_loss, correctness, cross_entropy, eln_loss, supervised_loss
from model import BACKBONES, Decoder, DeepLabV3Plus, WeightsError

STAGE, LABELED = 1, 0  # parts of the seeds, see data.Views
SKIPS = 16  # steps in a row with an overflow of float16: they take the scaler from 65,536, its first, to 1
SEED = within(0, 2**32 - 1)

# Defaults that depend on the data set; `iters` are stage 2's. The paper states no number of iterations.
VOC = dict(
    ratio="1/20", size=[512, 512], batch_size=6, pretrain_iters=18620, eln_iters=13300, iters=101080, lr=1e-4,
    backbone="resnet50", weights="imagenet", eln_backbone="resnet34", eln_weights="imagenet", width=256,
    contrast_pixels=4096, workers=min(4, os.cpu_count()), save_every=1000, eval_every=2660, log_every=50,
)
DEFAULTS = {
    "voc": VOC,
    "folder": VOC,
    "cityscapes": dict(
        VOC, ratio="1/8", size=[512, 1024], batch_size=4, pretrain_iters=26600, eln_iters=15428, iters=90972
    ),
    "shapes": dict(
        ratio="1/20", size=[96, 96], batch_size=4, pretrain_iters=800, eln_iters=250, iters=400, lr=1e-3,
        backbone="resnet18", weights="none", eln_backbone="resnet18", eln_weights="none", width=64,
        contrast_pixels=1024, workers=0, save_every=200, eval_every=400, log_every=50,
    ),
}

AMP_TYPES = {"off": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


class AuxiliaryNetworks(nn.Module):
    """What Sec. 3.1 trains beside the main network: K auxiliary decoders and ELN.

    num_classes C; encoder: the main network's, for its channels
    args  eln_backbone, eln_weights, width, alphas, corrector
    """

    def __init__(self, num_classes, encoder, args):
        super().__init__()
        channels = encoder.low_channels, encoder.high_channels
        self.decoders = nn.ModuleList(Decoder(*channels, num_classes, args.width) for _ in args.alphas)
        outputs = num_classes if args.corrector == "ecn" else 1
        self.eln = ErrorLocalizationNetwork(
            num_classes, args.eln_backbone, args.eln_weights, args.width, outputs
        )

    def forward(self, image, logits, low, high):
        """X (B, 3, H, W), and the main network's logits, low, high for it -> aux_logits, valid_logits.

        Lists of K (B, C, H, W) and K+1 (B, H, W); with the s-ECN the latter are K+1 corrections (B, C, H, W).
        No gradient reaches the main network: its outputs are detached here.
        """
        size = image.shape[2:]
        aux_logits = [decoder(low.detach(), high.detach(), size)[0] for decoder in self.decoders]
        judged = torch.cat([eln_input(image, P) for P in (logits, *aux_logits)])  # detached there
        return aux_logits, self.eln(judged).chunk(1 + len(aux_logits))


def make_networks(num_classes, args, auxiliary=True):
    """`main`, the segmentation network, and `auxiliary`, which may be left out, in a ModuleDict."""
    nets = nn.ModuleDict({"main": DeepLabV3Plus(num_classes, args.backbone, args.weights, args.width)})
    if auxiliary:
        nets["auxiliary"] = AuxiliaryNetworks(num_classes, nets.main.encoder, args)
    return nets


def ecn_loss(corrections, label):
    """The s-ECN's loss (Sec. 4.3): cross-entropy of the K+1 corrected predictions, its mean over them.

    corrections  list of K+1 (B, C, H, W) float; label (B, H, W) int64. Returns a scalar.
    """
    return torch.stack([supervised_loss(correction, label) for correction in corrections]).mean()


def add_options(parser):
    """The options of both stages, in two groups, which are returned."""
    paper = parser.add_argument_group("paper", "other values than voc's and cityscapes' leave the paper")
    run = parser.add_argument_group("run", "these leave the result as it is, up to rounding")
    add, rate = paper.add_argument, within(0, 1e9, float)
    add("--ratio", help="labelled share of the training images, rounded down (Sec. 4.2)")
    add("--split", type=SEED, default=0, help="which seeded subset; the paper averages three (Table 1)")
    add("--labeled-list", metavar="FILE", help="ids of the labelled images, instead of --ratio and --split")
    add("--unlabeled-list", metavar="FILE", help="ids of the unlabelled images, instead of all others")
    add("--backbone", choices=BACKBONES, help="of the main network (Sec. 4.1)")
    add("--weights", help="its first weights: imagenet, none, or a torchvision state dict (Sec. 4.1)")
    add("--eln-backbone", choices=BACKBONES, help="of ELN (Sec. 4.1)")
    add("--eln-weights", help="ELN's first weights: imagenet, none, or a torchvision state dict (Sec. 4.1)")
    add("--width", type=within(1), help="channels of ASPP and decoders; 256 in DeepLabv3+ (Sec. 4.1)")
    add("--size", type=within(32), nargs=2, metavar=("H", "W"), help="of training images or crops (Sec. 4.2)")
    add("--batch-size", type=within(1), help="images a step over all processes, of each kind (Sec. 4.2)")
    add("--lr", type=rate, help="learning rate of AdamW (Sec. 4.2)")
    add("--backbone-lr", type=rate, help="of the encoders, if another than --lr (the released code: 1e-5)")
    add("--weight-decay", type=rate, default=1e-5, help="of AdamW (Sec. 4.2)")
    add("--alphas", type=rate, nargs="*", default=[20.0, 50.0], help="one per auxiliary decoder, Eq. (3)")
    add("--corrector", choices=("eln", "ecn"), default="eln", help="ELN, or the s-ECN of Table 3 (Sec. 4.3)")
    add("--seed", type=SEED, default=0, help="of weights, order, augmentation and dropout")
    add("--amp", choices=("auto", *AMP_TYPES), default="auto",
        help="mixed precision; auto: off on a CPU, bfloat16 where the GPU has it, else float16")
    add = run.add_argument
    add("--data", default="datasets", metavar="DIR", help="where the data set lies (README, Data)")
    add("--out", metavar="DIR", help="the run's folder; default runs/DATASET-RATIO-SPLIT")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda if there is one")
    add("--workers", type=within(0), help="processes that load data, per training process")
    add("--save-every", type=within(1), metavar="STEPS", help="between checkpoints")
    add("--eval-every", type=within(1), metavar="STEPS", help="between validations")
    add("--log-every", type=within(1), metavar="STEPS", help="between rows of the log")
    return paper, run


def make_parser(doc):
    """An empty parser that shows the file's docstring and true defaults."""

    class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        def _get_help_string(self, action):
            return action.help if action.default is None else super()._get_help_string(action)

    parser = argparse.ArgumentParser(description=doc, formatter_class=Formatter, allow_abbrev=False)
    parser.add_argument("--dataset", choices=DATASETS, default="shapes", help="sets the other defaults")
    return parser


def parse_args(argv=None):
    """The command line of stage 1. --dataset is parsed first: the other defaults follow from it."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--dataset", choices=DATASETS, default="shapes")
    defaults = DEFAULTS[first.parse_known_args(argv)[0].dataset]
    parser = make_parser(__doc__)
    add = add_options(parser)[0].add_argument
    add("--pretrain-iters", type=within(0), help="steps with L_sup alone (Sec. 3.1)")
    add("--eln-iters", type=within(0), help="steps with L_labeled, Eq. (7)")
    add("--supervised-only", action="store_true", help="L_sup alone for --iters steps: the baseline")
    add("--iters", type=within(1), help="of --supervised-only; by default as many as both stages have")
    parser.set_defaults(**{key: value for key, value in defaults.items() if key != "iters"})
    args = parser.parse_args(argv)
    del args.contrast_pixels  # stage 2's
    if args.iters and not args.supervised_only:
        parser.error("--iters goes with --supervised-only; stage 1 has --pretrain-iters and --eln-iters")
    if args.supervised_only:
        args.iters = args.iters or args.pretrain_iters + args.eln_iters + defaults["iters"]
        args.pretrain_iters, args.eln_iters = args.iters, 0
    elif args.pretrain_iters + args.eln_iters == 0:
        parser.error("there is nothing to train: --pretrain-iters and --eln-iters are 0")
    args.out = args.out or default_out(args) + ("-supervised" if args.supervised_only else "")
    return args


def default_out(args):
    """runs/DATASET-RATIO-SPLIT, with "/" as "_"; a list's name stands for ratio and split; -ecn: s-ECN."""
    subset = Path(args.labeled_list).stem if args.labeled_list else f"{args.ratio}-{args.split}"
    return f"runs/{args.dataset}-{subset.replace('/', '_')}" + ("-ecn" if args.corrector == "ecn" else "")


def start_process(device):
    """Join torchrun's processes, if any. Returns rank, number of processes, and this one's device."""
    rank, world, local = (
        int(os.environ.get(key, value)) for key, value in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    gpus = torch.cuda.device_count()
    if device == "auto":
        device = "cuda" if gpus else "cpu"
    if device == "cuda" and gpus <= local:
        raise InputError(f"--device cuda: {gpus} GPUs for {local + 1} processes; use --device cpu")
    device = torch.device(device, local) if device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return rank, world, device


def resolve_amp(amp, device):
    """--amp auto on this device -> a key of AMP_TYPES."""
    if amp != "auto":
        return amp
    return "off" if device.type == "cpu" else "bfloat16" if torch.cuda.is_bf16_supported() else "float16"


def parallel(module, world):
    """The module, and under several processes one that averages their gradients."""
    return nn.parallel.DistributedDataParallel(module) if world > 1 else module


def same_statistics(nets, world, device):
    """The first process's BatchNorm statistics for all. SyncBatchNorm's, on GPUs, are equal already."""
    if world > 1 and device.type == "cpu":
        for buffer in nets.buffers():
            dist.broadcast(buffer, 0)


def total(tensor, world):
    """The sum of a tensor over all processes."""
    tensor = tensor.clone()
    if world > 1:
        dist.all_reduce(tensor)
    return tensor


def parameter_groups(modules, args):
    """All trainable parameters for the optimizer; encoders at --backbone-lr, the rest at --lr."""
    groups = []
    for module in modules:
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        backbone = [p for name, p in named if "encoder." in name]
        rest = [p for name, p in named if "encoder." not in name]
        groups.append({"params": backbone, "lr": args.lr if args.backbone_lr is None else args.backbone_lr})
        groups.append({"params": rest, "lr": args.lr})
    return groups


def step_seed(seed, stage, step, rank):
    """The seed of torch's global generator (dropout) for one step of one process."""
    return int(np.random.default_rng([seed, stage, 2, step, rank]).integers(2**63))


class Stopped(Exception):
    """A run ends early, its last checkpoint whole. str() is one line for the user; code: the exit status."""

    def __init__(self, line, code=1):
        super().__init__(line)
        self.code = code


class Watch:
    """Looks at each step before the optimizer takes it: is all finite, and has somebody asked to stop?

    skipped  steps that float16's scaler left out, because their gradient overflowed: so far, and in a row
    stop     whether any process has been asked to stop, by SIGTERM or SIGINT (Ctrl-C); set by `look`
    """

    def __init__(self, rank, skipped):
        self.rank, self.skipped, self.stop, self.signal = rank, list(skipped), False, 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.ask)

    def ask(self, number, frame):
        """The signal handler. Under torchrun further signals follow the first: they change nothing."""
        if self.rank == 0 and not self.signal:
            with contextlib.suppress(OSError):  # Ctrl-C may have ended what reads stderr
                os.write(2, b"\nstopping after this step\n")  # print() may not be entered twice
        self.signal = self.signal or number

    def look(self, step, row, optimizer, scaler, world):
        """The step's losses, {name: scalar tensor}, as numbers, averaged over processes.

        The one time in a step that this loop waits for a GPU. PyTorch waits by itself in SyncBatchNorm, where
        train_stage2.contrast_labels copies its random numbers, and where Eq. (10) counts each class's pixels.
        Raises Stopped if a loss is not finite, or the gradient; with float16, SKIPS gradients in a row.
        """
        gradient = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = nn.utils.get_total_norm(gradient)
        values = torch.stack([*row.values(), norm, norm.new_full((), self.signal)])
        *values, norm, asked = (total(values, world) / world).tolist()
        self.stop = asked > 0
        row = dict(zip(row, values))
        wrong = [f"{name} is {value}" for name, value in row.items() if not math.isfinite(value)]
        if not wrong and not math.isfinite(norm) and not scaler.is_enabled():
            wrong = [f"the gradient's norm is {norm}"]
        if wrong:
            raise Stopped(f"step {step + 1}: {', '.join(wrong)}; a smaller --lr or --amp off may help")
        overflow = not math.isfinite(norm)
        self.skipped = [self.skipped[0] + overflow, self.skipped[1] + 1 if overflow else 0]
        if self.skipped[1] == SKIPS:
            raise Stopped(f"step {step + 1}: {SKIPS} gradients in a row overflowed float16; try --amp off")
        return row

    def stopped(self, path, done):
        """The exception that ends the run once `path` holds the steps done."""
        launch = "python" if "RANK" not in os.environ else "torchrun [as before]"
        command = f"{launch} {shlex.join(sys.argv)}"
        code = 128 + (self.signal or signal.SIGTERM)
        return Stopped(f"asked to stop; {path} holds {done} steps; to go on: {command}", code)


def by_first(rank, world, device, write, *args):
    """write(*args) on the first process, which alone writes files. If it fails, all processes stop."""
    failed = None
    if rank == 0:
        try:
            write(*args)
        except (OSError, InputError, Stopped) as error:
            failed = error
    codes = {type(None): 0, InputError: 2}
    code = total(torch.full((), codes.get(type(failed), 1), device=device), world)
    if code:
        raise Stopped(str(failed or ""), int(code))


def save(state, path):
    """torch.save, aside and then moved into place, so that `path` is whole at any moment. Raises OSError."""
    with replacing(path) as file:
        torch.save(state, file)


def untrained(args):
    """The arguments for networks whose weights a checkpoint will replace."""
    return argparse.Namespace(**{**vars(args), "weights": "none", "eln_weights": "none"})


def option(key):
    """The command line's name of an argument."""
    return "--" + key.replace("_", "-")


def open_run(args, stage, device):
    """What a stage, 1 or 2, begins with: its data, and its checkpoint if there is one.

    Sets args.amp to what "auto" means on this device.
    Returns dataset, run, checkpoint or None; run is the part of a checkpoint that never changes: a dict of
    stage, args, labeled and unlabeled (ids), classes. Raises InputError for bad input, or a checkpoint of
    another run.
    """
    args.amp = resolve_amp(args.amp, device)
    dataset = load_dataset(args.dataset, args.data)
    labeled, unlabeled = split_ids(dataset, args.ratio, args.split, args.labeled_list, args.unlabeled_list)
    run = {"stage": stage, "args": vars(args), "labeled": labeled, "unlabeled": unlabeled}
    run["classes"] = list(dataset.classes)
    path = Path(args.out) / f"stage{stage}.pt"
    read_result(path.parent / "result.json")  # to be added to in the end: refused now if it is damaged
    checkpoint = None
    if path.exists():
        needed = (*run, "step", "seconds", "best", "skipped", "networks", "optimizer", "scaler")
        checkpoint = read_checkpoint(path, needed, stage)
        for key in {**run["args"], **checkpoint["args"]}:
            here, there = run["args"].get(key), checkpoint["args"].get(key)
            if key not in FREE and here != there:
                raise InputError(
                    f"{path} was made with {option(key)} {there}, but this command has {here}: give the same "
                    "arguments to go on, or another --out"
                )
        for key in ("labeled", "unlabeled", "classes"):
            if checkpoint[key] != run[key]:
                raise InputError(f"{path} was made with other {key} than {args.data} has; use another --out")
    return dataset, run, checkpoint


def restore(path, checkpoint, nets, optimizer, scaler):
    """Put a checkpoint back. Returns the seconds and skipped steps behind it, and the best mIoUs so far."""
    fill(nets, checkpoint["networks"], path)
    optimizer.load_state_dict(checkpoint["optimizer"])
    scaler.load_state_dict(checkpoint["scaler"])
    return checkpoint["seconds"], checkpoint["skipped"], checkpoint["best"]


def say(text, stream, end="\n"):
    """print() to stdout or stderr; that nobody reads it (Ctrl-C ends `tee` too) is no reason to stop."""
    try:
        print(text, end=end, file=stream, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class Log:
    """log_stageN.csv, and one line of progress: renewed on a terminal, plain elsewhere.

    fields  columns; step  done before; steps in all
    """

    def __init__(self, path, fields, step, steps, rank):
        self.path, self.fields, self.steps, self.rank = path, fields, steps, rank
        self.last = step, time.monotonic()

    def begin(self, step):
        """Write the file without rows beyond `step`. Raises InputError if it cannot be read or written."""
        rows = []
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                whole = self.path.read_text().rpartition("\n")[0]  # a full disk may have cut the last row
                rows = [row for row in csv.DictReader(io.StringIO(whole)) if int(row["step"]) <= step]
            text = io.StringIO()
            writer = csv.DictWriter(text, self.fields)
            writer.writeheader()
            writer.writerows(rows)
            with replacing(self.path) as file:
                file.write(text.getvalue().encode())
        except OSError as error:
            raise InputError(f"--out {self.path.parent} cannot be written to ({error})") from None
        except (ValueError, KeyError, TypeError, csv.Error):
            raise InputError(f"{self.path} is not the log of this run: move it away") from None

    def steps_per_second(self, step):
        """Since the last row, or the beginning."""
        return (step - self.last[0]) / (time.monotonic() - self.last[1])

    def write(self, step, values):
        """Append {field: number} for a step, and show it."""
        row = {"step": step, **{key: f"{value:.6g}" for key, value in values.items()}}
        try:
            with open(self.path, "a", newline="") as file:
                csv.DictWriter(file, self.fields).writerow(row)
        except OSError as error:
            raise OSError(f"{self.path} cannot be written ({error.strerror})") from None
        shown = "  ".join(f"{key} {value:.3g}" for key, value in values.items() if key != "steps/s")
        left = int((self.steps - step) / values["steps/s"])
        self.show(f"{step}/{self.steps}  {shown}  {left // 60}:{left % 60:02d} left", step < self.steps)
        self.last = step, time.monotonic()

    def show(self, line, renew=False):
        if self.rank == 0:
            terminal = sys.stdout.isatty()
            say("\r\033[K" + line if terminal else line, sys.stdout, "" if terminal and renew else "\n")


def judgement_fields(K):
    """The log's columns that `judgement` fills."""
    names = [f"wrong_{k}" for k in range(K + 1)]
    return [*(f"L_aux_{k}/L_sup" for k in range(1, K + 1)), *names, "eln_precision", "eln_recall"]


@torch.no_grad()
def judgement(logits, aux_logits, valid_logits, label, world):
    """What ELN hangs on, over the labelled batch of all processes: {field: number} for judgement_fields.

    L_aux_k/L_sup  decoder k's cross-entropy over the main one's; decoder k trains while it is above alpha^k
    wrong_k        share of wrong pixels that decoder k gives ELN (0: the main one)
    eln_precision, eln_recall  of ELN's (or s-ECN's) "wrong" among all K+1 predictions
    """
    predictions = [logits, *aux_logits]
    ce = total(torch.stack([cross_entropy(P, label).sum() for P in predictions]), world)
    correct = torch.stack([correctness(P, label) for P in predictions])  # (K+1, B, H, W)
    flagged = torch.stack([rejected(B, P) for B, P in zip(valid_logits, predictions)]) & (correct != 255)
    wrong = correct == 0
    counts = [pixels.sum((1, 2, 3)).double() for pixels in (wrong, correct != 255, flagged, wrong & flagged)]
    wrong, counted, flagged, hits = total(torch.stack(counts), world)  # (K+1,) each
    precision, recall = hits.sum() / flagged.sum().clamp(min=1), hits.sum() / wrong.sum().clamp(min=1)
    values = torch.stack([*(ce[1:] / ce[0]), *(wrong / counted.clamp(min=1)), precision, recall])
    return dict(zip(judgement_fields(len(aux_logits)), values.tolist()))


def student_record(network, dataset, args):
    """What evaluate.py needs to rebuild the network: its weights and plain values."""
    classes = list(dataset.classes)
    return {
        "network": network.state_dict(), "backbone": args.backbone, "width": args.width, "classes": classes,
        "palette": dataset.palette[: len(classes)].tolist(), "size": list(args.size), "crop": dataset.crop,
    }


def save_checkpoint(path, state, nets, optimizer, scaler):
    """The dict `state`, and all that training goes on from. Raises OSError."""
    parts = {"networks": nets, "optimizer": optimizer, "scaler": scaler}
    save({**state, **{name: part.state_dict() for name, part in parts.items()}}, path)


def check_finite(nets, optimizer, done):
    """Raises Stopped if a number is not, in networks or optimizer: it must not reach a checkpoint."""
    state = nets.state_dict()
    for number, moments in optimizer.state_dict()["state"].items():
        state.update({f"the optimizer's {name} {number}": value for name, value in moments.items()})
    broken = [name for name, value in state.items() if not value.isfinite().all()]
    if broken:
        raise Stopped(f"{broken[0]} is not finite after step {done}; a smaller --lr may help")


def peak_memory(device):
    """GiB at most so far, on a GPU of tensors, else of this process (None: not Linux, which alone tells)."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**30, 2)
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((round(int(line.split()[1]) / 2**20, 2) for line in lines if line.startswith("VmHWM")), None)


def write_result(out, stage, args, steps, seconds, device, skipped, scores, best):
    """Set result.json's entry `stage`, leaving the others. scores, best: {name: mIoU}, last step and best."""
    path = out / "result.json"
    results = read_result(path)
    results[stage] = {
        **scores, **{f"best_{name}": value for name, value in best.items()}, "skipped": skipped,
        "steps": steps, "images": steps * args.batch_size * (2 if stage == "stage2" else 1),
        "seconds": round(seconds, 1), "peak_memory_gib": peak_memory(device),
        "device": device.type, "torch": torch.__version__, "torchvision": torchvision.__version__,
        "arguments": vars(args),
    }
    with replacing(path) as file:
        file.write(json.dumps(results, indent=2).encode() + b"\n")


def run_script(name, parse, train):
    """Parse, join the other processes, train. Ends in one line on stderr, if not well, and an exit code.

    2: the input cannot be used; 1: see Stopped; 130, 143: asked to stop, by Ctrl-C or SIGTERM.
    """
    code = 0
    try:
        args = parse()
        rank, world, device = start_process(args.device)
        if world > args.batch_size:
            raise InputError(f"--batch-size {args.batch_size} is too small for {world} processes")
        train(args, rank, world, device)
    except (InputError, WeightsError, OSError) as error:
        line, code = one_line(error), 2
    except Stopped as stop:
        line, code = str(stop) if rank == 0 else "", stop.code  # all processes stop; the first one says it
    except KeyboardInterrupt:
        line, code = "interrupted", 130
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it when another process has ended
    if code and line:
        say(f"{name}: {line}", sys.stderr)
    if dist.is_initialized() and code != 2:  # bad input may be one process's alone: it cannot wait for others
        dist.destroy_process_group()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if code:
        sys.exit(code)


def train(args, rank, world, device):
    """Stage 1, Sec. 3.1: each step is batch, forward and backward of each loss, optimizer, log, save."""
    out, steps = Path(args.out), args.pretrain_iters + args.eln_iters
    path = out / "stage1.pt"
    dataset, run, checkpoint = open_run(args, STAGE, device)
    start = checkpoint["step"] if checkpoint else 0
    if start >= steps:
        return print(f"{path} is finished ({steps} steps)") if rank == 0 else None
    check_files(dataset, run["labeled"], run["unlabeled"], args.size)

    torch.manual_seed(args.seed)
    begin = untrained(args) if checkpoint else args
    nets = make_networks(len(dataset.classes), begin, auxiliary=not args.supervised_only)
    nets = nets.to(device, memory_format=torch.channels_last)  # convolutions are faster so
    nets.main.decoder.proj.requires_grad_(False)  # nothing in stage 1 gives it a gradient
    if world > 1 and device.type == "cuda":
        nets = nn.SyncBatchNorm.convert_sync_batchnorm(nets)
    joint = start > args.pretrain_iters
    trained = [nets.main, nets.auxiliary] if joint else [nets.main]
    optimizer = torch.optim.AdamW(parameter_groups(trained, args), weight_decay=args.weight_decay, fused=True)
    amp = AMP_TYPES[args.amp]
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)
    seconds, skipped, best = 0.0, (0, 0), {}
    if checkpoint:
        seconds, skipped, best = restore(path, checkpoint, nets, optimizer, scaler)
        del checkpoint
    main = parallel(nets.main, world)
    auxiliary = parallel(nets.auxiliary, world) if joint else None

    batches = iter(make_loader(
        dataset, run["labeled"], args.size, True, args.batch_size, (args.seed, STAGE, LABELED), start, steps,
        rank, world, args.workers,
    ))
    fields = ["step", "L_sup", "L_aux", "L_eln"]
    if not args.supervised_only:
        fields += judgement_fields(len(args.alphas))
    fields += ["mIoU", *["skipped"] * scaler.is_enabled(), "images/s", "steps/s"]
    log = Log(out / "log_stage1.csv", fields, start, steps, rank)
    by_first(rank, world, device, log.begin, start)
    log.show(f"{out}: {len(run['labeled'])} labelled images, {steps - start} steps on {world} x {device}")
    began = time.monotonic() - seconds
    b = share_of_batch(args.batch_size, rank, world)
    share = world * (b.stop - b.start) / args.batch_size  # makes DDP's mean over processes one over images

    def store(done, scores):
        """Write the checkpoint, and before it, with the last step's scores, what else a run leaves."""
        check_finite(nets, optimizer, done)
        seconds = time.monotonic() - began
        if scores:
            save(student_record(nets.main, dataset, args), out / "student_stage1.pt")
            write_result(out, "stage1", args, done, seconds, device, watch.skipped[0], scores, best)
        state = {**run, "step": done, "seconds": seconds, "best": best, "skipped": watch.skipped}
        save_checkpoint(path, state, nets, optimizer, scaler)

    autocast = partial(torch.autocast, device.type, amp, enabled=amp is not None)
    watch = Watch(rank, skipped)
    for step in range(start, steps):
        if step == args.pretrain_iters:  # pre-training is over: the auxiliary decoders and ELN join
            joint = True
            for group in parameter_groups([nets.auxiliary], args):
                optimizer.add_param_group(group)
            auxiliary = parallel(nets.auxiliary, world)
        image, label = next(batches)
        torch.manual_seed(step_seed(args.seed, STAGE, step, rank))
        image = normalize(image.to(device, non_blocking=True))
        label = label.to(device, non_blocking=True).long()

        nets.train()
        optimizer.zero_grad(set_to_none=True)
        with autocast():
            logits, _, encoded = main(image)
        L_sup = share * supervised_loss(logits, label)  # Eq. (2)
        scaler.scale(L_sup).backward()
        row = {"L_sup": L_sup}
        if joint:  # the rest of Eq. (7): a separate graph, built after the first one has been freed
            with autocast():
                aux_logits, valid_logits = auxiliary(image, logits, *encoded)
            L_aux = share * auxiliary_loss(aux_logits, logits, label, args.alphas)  # Eq. (3)
            if args.corrector == "eln":
                L_eln = share * eln_loss(valid_logits, [logits, *aux_logits], label)  # Eq. (6)
            else:
                L_eln = share * ecn_loss(valid_logits, label)
            scaler.scale(L_aux + L_eln).backward()
            row.update(L_aux=L_aux, L_eln=L_eln)
        scaler.unscale_(optimizer)
        row = watch.look(step, row, optimizer, scaler, world)
        scaler.step(optimizer)
        scaler.update()
        same_statistics(nets, world, device)

        done, scores = step + 1, {}
        last = done == steps
        validate, write = done % args.eval_every == 0 or last, done % args.log_every == 0 or last
        if validate or write:
            rate = log.steps_per_second(done)
            row.update({"images/s": rate * args.batch_size, "steps/s": rate})
            if joint:
                row.update(judgement(logits, aux_logits, valid_logits, label, world))
            if validate:
                matrices = score(nets.main, dataset, args.size, device, rank, world, args.workers)
                scores["mIoU"] = row["mIoU"] = mean_iou(matrices["resized"])
                best["mIoU"] = max(best.get("mIoU", 0.0), scores["mIoU"])
            if scaler.is_enabled():
                row["skipped"] = watch.skipped[0]
            by_first(rank, world, device, log.write, done, row)
        if done % args.save_every == 0 or last or watch.stop:
            by_first(rank, world, device, store, done, last and scores)
        if watch.stop and not last:
            raise watch.stopped(path, done)
        logits = encoded = aux_logits = valid_logits = None  # frees their memory for the next step
    log.show(f"stage 1: mIoU {scores['mIoU']:.2f}  ({out / 'student_stage1.pt'})")


if __name__ == "__main__":
    run_script("train_stage1.py", parse_args, train)

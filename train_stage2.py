"""Stage 2 (Sec. 3.2): semi-supervised training on pixels whose pseudo labels ELN believes.

    python train_stage2.py                                         # after train_stage1.py
    python train_stage2.py runs/voc-1_20-0 --filter threshold      # a rival of Table 3
    torchrun --nproc_per_node=4 train_stage2.py --dataset voc --ratio 1/20

It begins with the networks of stage 1. Options that are not given are stage 1's, but for
--out, --device and --amp (on `shapes` and `folder` the rates too, on `shapes` the batch size).
The teacher labels, ELN rejects, the student learns from labelled images and from perturbed
unlabelled ones.
"""

import copy
import io
import re
import sys
from argparse import Namespace
from contextlib import nullcontext, redirect_stderr
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint as recomputed

from data import (
    VOID, InputError, images_of_process, load_dataset, make_loader, masks_checksum, require,
    seed_step, to_device, unlabeled_ids, weight_of_process, within,
)
from eln import AuxiliaryNetworks, ecn_loss, eln_input
from evaluate import diagnosis, load_state, read_checkpoint, validate
from losses import (
    auxiliary_loss, contrastive_loss, ema_update, eln_loss, labeled_loss, pseudo_label_loss,
    supervised_loss, unlabeled_loss,
)
from model import DeepLabV3Plus
from train_stage1 import parse_args as parse_stage1
from train_stage1 import (
    log_row, make_parser, open_run, prepare, progress, resume, run_script, same_statistics,
    save_when_due,
)


def train(args, process):
    """Sec. 3.2: L_labeled on labelled images, L_unlabeled on those that the teacher labels."""
    dataset, stage1, unlabeled = load_stage1(args)

    # Networks: the student goes on where stage 1 ended, the teacher begins as its copy. The
    # teacher is always in eval mode: fixed BatchNorm statistics, no dropout. Student, D^k and
    # ELN are in train mode, with two exceptions that end at once: evaluate.score puts the
    # student into eval mode to validate it, and judge puts ELN into it to filter labels.
    nets = make_networks(args, stage1)
    # The lock of the run's folder holds until this function ends.
    run, lock = open_run(2, args, dataset, stage1["labeled"], unlabeled, process)
    # student and auxiliary are nets[...], in DDP if there are several processes.
    student, auxiliary, optimizer, scaler, autocast = prepare(nets, args, process)
    nets.train()
    teacher = nets["teacher"].eval()
    eln = nets["auxiliary"].eln if auxiliary is not None else None

    # Table 6, from left to right: --filter threshold (L_pseudo alone), --losses pseudo,
    # --losses contra, both. A loss that is left out has weight 0: it stays in the graph, as DDP
    # needs the gradients of all parameters, if only zeros.
    eln_or_ecn_loss = {"eln": eln_loss, "ecn": ecn_loss}[args.corrector]
    contrast = contrastive_loss if args.contrast_pixels > 0 else contrastive_loss_in_parts
    w_pseudo = 1.0 if "pseudo" in args.losses else 0.0
    w_contra = 1.0 if "contra" in args.losses else 0.0

    start, rows = resume(run, args.iters, nets, optimizer, scaler, process)
    rows = rows or [first_row(nets["student"], dataset, args, process)]
    batches = make_batches(dataset, run, start, args, process)
    weight = weight_of_process(args.batch_size, process)  # of its images; for one process 1

    for step, (batch, batch_u) in progress(batches, rows, start, args.iters, process):
        seed_step(args.seed, 2, step, process)
        image, label = to_device(batch, process.device)  # X, Y
        image_u, image_a = to_device(batch_u, process.device)  # X and A.X, unlabelled

        # 1. The teacher labels X, and ELN says which of these labels to believe.
        with autocast:
            pseudo_label, valid, feature_t = make_pseudo_labels(teacher, eln, image_u, args)

        # 2. Labelled images. The gradients of this backward pass and of the next one add up, so
        #    that together they are those of L_labeled + L_unlabeled. This needs less memory, as
        #    the first graph is freed before the second one is built.
        optimizer.zero_grad()
        with autocast, not_averaged_yet(student, process):
            logits, _, encoded = student(image)  # D(E(X)): P before its softmax
        L_sup = supervised_loss(logits, label)  # Eq. (2)
        L_aux = torch.zeros_like(L_sup)
        L_eln = torch.zeros_like(L_sup)
        if eln is not None:
            with autocast:
                aux_logits, valid_logits = auxiliary(image, logits, *encoded)  # P^k, B^k
            L_aux = auxiliary_loss(aux_logits, logits, label, args.alphas)  # Eq. (3)
            L_eln = eln_or_ecn_loss(valid_logits, [logits, *aux_logits], label)  # Eq. (6)
        L_labeled = labeled_loss(L_sup, L_aux, L_eln)  # Eq. (7)
        scaler.scale(weight * L_labeled).backward()

        # 3. Unlabelled images. The student sees A.X and learns from the labels in V.
        with autocast:
            logits_a, feature_s, _ = student(image_a, embed=True)  # P^a, f
        L_pseudo = w_pseudo * pseudo_label_loss(logits_a, pseudo_label, valid)  # Eq. (9)
        pixels = pixels_of_V(feature_s, feature_t, pseudo_label, valid, args, step, process)
        f, f_teacher, y, y_key, scale_V = pixels
        L_contra = w_contra * scale_V * contrast(f, f_teacher, y, y_key, args.tau)  # Eq. (10)
        L_unlabeled = unlabeled_loss(L_pseudo, L_contra)  # Eq. (11)
        scaler.scale(weight * L_unlabeled).backward()

        # 4. One step of AdamW for student, D^k and ELN. Then the teacher follows the student.
        scaler.step(optimizer)
        scaler.update()
        same_statistics(nets, process)
        ema_update(teacher, nets["student"], args.beta)  # Eq. (8)

        # Log, validate, save.
        is_scored = step % args.eval_every == 0 or step == args.iters
        if is_scored or step % args.log_every == 0:
            terms = dict(L_sup=L_sup, L_aux=L_aux, L_eln=L_eln, L_pseudo=L_pseudo)
            terms["L_contra"] = L_contra
            row = log_row(step, trained(terms, args), weight, process)
            row.update(acceptance(pseudo_label, valid, dataset.classes, process))
            if eln is not None:
                row.update(diagnosis(logits, aux_logits, valid_logits, label, process))
            if is_scored:
                row["mIoU"] = validate(nets["student"], dataset, args, process)
                row["mIoU_teacher"] = validate(teacher, dataset, args, process)
            rows.append(row)
        save_when_due(run, dataset, step, args.iters, rows, nets, optimizer, scaler, process)


@torch.no_grad()
def make_pseudo_labels(teacher, eln, image_u, args):
    """The teacher labels unlabelled images, and a filter says which labels count.

    teacher  in eval mode, as always
    eln      ELN or the s-ECN; None for the filters "threshold" and "none"
    image_u  (B, 3, H, W) float: X
    args     filter: "eln"; a rival of Table 3, "ecn" (its corrections become Y^) or "threshold"
             (on the softmax, above args.threshold); or ours, "none" (all labels count)
    Returns pseudo_label (B, H, W) int64, Y^; valid (B, H, W) bool, the pixels of V: round(B~),
    or what the other filters accept; feature_t (B, D, h, w), f~.
    """
    logits, feature_t, _ = teacher(image_u, embed=True)  # P~
    pseudo_label = logits.argmax(dim=1)
    valid = torch.ones_like(pseudo_label, dtype=torch.bool)
    if args.filter == "eln":
        valid = judge(eln, image_u, logits) > 0  # a sigmoid above 0.5, which rounds to 1
    elif args.filter == "ecn":
        pseudo_label = judge(eln, image_u, logits).argmax(dim=1)
    elif args.filter == "threshold":
        valid = logits.softmax(dim=1).amax(dim=1) > args.threshold
    return pseudo_label, valid, feature_t


def judge(eln, image_u, logits):
    """ELN's (or the s-ECN's) output, in eval mode; afterwards it goes on in train mode."""
    eln.eval()
    output = eln(eln_input(image_u, logits))
    eln.train()
    return output


@torch.no_grad()
def acceptance(pseudo_label, valid, classes, process):
    """Shares of the pixels that the filter accepts: columns of the log, of one batch.

    accepted         of all pixels
    accepted_3_car   of those that the teacher takes for class 3, car; none without such pixels
    """
    counts = []
    for label in (pseudo_label, pseudo_label[valid]):
        counts.append(torch.bincount(label.flatten(), minlength=len(classes)))
    labeled, accepted = process.sum(torch.stack(counts)).tolist()  # pixels of each class
    row = {"accepted": sum(accepted) / sum(labeled)}
    for c, name in enumerate(classes):
        if labeled[c] > 0:
            word = re.sub(r"\W", "_", name)
            row[f"accepted_{c}_{word}"] = accepted[c] / labeled[c]
    return row


def pixels_of_V(feature_s, feature_t, pseudo_label, valid, args, step, process):
    """Draw the pixels that Eq. (10) compares: --contrast-pixels of V at random, or with 0 all.

    Anchors and keys are the same pixels. The draw is the same however the batch is split; each
    process has the anchors of its own images, and all keys.

    feature_s, feature_t  (b, D, h, w): f and f~ of this process's b of the batch's B images
    pseudo_label, valid   (b, H, W)
    Returns f (n, D) of this process, f~ (m, D) of all, their labels (n,) and (m,), and scale_V
    = (n/m) / (b/B), which is 1 for one process, or 0 if V is empty. contrastive_loss is a mean
    over the n own anchors, but the loop weighs it as all losses, by images: b/B. Times scale_V
    it weighs n/m, so that all processes together have the mean over all m anchors.
    """
    h, w = feature_s.shape[2:]
    own_images = images_of_process(args.batch_size, process)

    # 1. The pseudo labels at stride 4, void where a pixel is not in V (float for interpolate).
    own_label = pseudo_label.masked_fill(~valid, VOID).float()[:, None]
    own_label = F.interpolate(own_label, size=(h, w), mode="nearest-exact").long().flatten()

    # 2. The pixels of the whole batch are numbered, image by image; this process has the
    #    numbers first .. end-1. Every process gets the labels of the whole batch.
    first = int(own_images[0]) * h * w
    end = first + len(own_label)
    own_numbers = torch.arange(first, end, device=own_label.device)
    label = gather(own_label, own_numbers, args.batch_size * h * w, process)  # (B h w,)

    # 3. All processes put the numbers into the same random order, and draw the first ones in V.
    #    (The seed's 2 is the stage; 3 keeps it apart from the order of images.)
    order = np.random.default_rng([args.seed, 2, 3, step]).permutation(len(label))
    order = torch.from_numpy(order).to(label.device)
    drawn = order[label[order] != VOID]
    if args.contrast_pixels > 0:
        drawn = drawn[: args.contrast_pixels]  # (m,)

    # 4. f of the process's own pixels, and f~ of all, in the order of `drawn`.
    is_own = (drawn >= first) & (drawn < end)  # (m,) bool
    own = drawn[is_own] - first  # (n,): their rows among this process's features
    f = pixel_rows(feature_s)[own]
    f_teacher = pixel_rows(feature_t)[own]
    f_teacher = gather(f_teacher, is_own.nonzero().squeeze(1), len(drawn), process)
    share_of_V = len(own) / max(len(drawn), 1)
    share_of_images = len(own_images) / args.batch_size
    return f, f_teacher, own_label[own], label[drawn], share_of_V / share_of_images


def pixel_rows(feature):
    """(b, D, h, w) -> (b h w, D)."""
    return feature.permute(0, 2, 3, 1).flatten(0, 2)


def gather(part, places, size, process):
    """(size, ...) in every process: at places[i] is part[i] of the process that has it.

    No gradient flows back.
    """
    whole = part.new_zeros(size, *part.shape[1:])
    whole[places] = part.detach()
    return process.sum(whole)  # at the others' places this process has zeros


def contrastive_loss_in_parts(anchor, key, anchor_label, key_label, tau, size=256):
    """Eq. (10) for `size` anchors at a time, which are computed again in the backward pass.

    This bounds the memory. Arguments as of contrastive_loss.
    """
    n_anchors = (anchor_label != VOID).sum().clamp(min=1)  # |V|
    loss = 0 * anchor.sum()
    for part in anchor_label.argsort().split(size):  # sorted, so that a part has few classes
        label = anchor_label[part]
        mean = recomputed(
            contrastive_loss, anchor[part], key, label, key_label, tau,
            use_reentrant=False, preserve_rng_state=False,
        )
        loss = loss + mean * (label != VOID).sum() / n_anchors
    return loss


def not_averaged_yet(network, process):
    """A context for the first of two forward passes: its gradients stay local for the moment.

    DistributedDataParallel decides this in the forward pass. The second backward pass averages
    the sum of both over the processes.
    """
    return network.no_sync() if process.world > 1 else nullcontext()


def trained(terms, args):
    """Those of the losses, {name: loss}, that this run trains: the log has no others."""
    names = ["L_sup"]
    if args.filter in ("eln", "ecn"):
        names += ["L_aux", "L_eln"]
    names += [f"L_{name}" for name in args.losses]
    return {name: loss for name, loss in terms.items() if name in names}


def first_row(student, dataset, args, process):
    """The log begins with what stage 1 reached, as student and teacher begin there."""
    mIoU = validate(student, dataset, args, process)
    return {"step": 0, "mIoU": mIoU, "mIoU_teacher": mIoU}


# ---- What stage 1 left ----


def load_stage1(args):
    """The data set, stage 1's checkpoint, and the ids of the unlabelled images.

    The labelled images are those of stage 1, with the same masks; the unlabelled ones are read
    anew, as stage 1 did not use them. Raises InputError if the parts do not belong together.
    """
    path = Path(args.run, "stage1.pt")
    stage1 = read_checkpoint(path, stage=1)
    dataset = load_dataset(args.dataset, args.data)
    for key in stage1["labeled"]:
        is_there = key in dataset.files
        require(is_there, f"{path} was made with images that --data {args.data} lacks: {key}")
    same_classes = stage1["classes"] == list(dataset.classes)
    require(same_classes, f"{path} was made with other classes than --data {args.data} has")
    same_masks = stage1["masks"] == masks_checksum(dataset, stage1["labeled"])
    again = "run train_stage1.py again, with another --out"
    require(same_masks, f"the masks of labelled images are no longer those of {path}: {again}")
    unlabeled = unlabeled_ids(dataset, stage1["labeled"], args.unlabeled_list)
    remedy = "run train_stage1.py with --ratio, or name more images in train.txt"
    require(unlabeled, f"there is no unlabelled image: {remedy}")
    return dataset, stage1, unlabeled


def make_networks(args, stage1):
    """Student, teacher and, where the filter needs them, auxiliary decoders and ELN."""
    path = Path(args.run, "stage1.pt")
    num_classes = len(stage1["classes"])
    nets = nn.ModuleDict()
    nets["student"] = DeepLabV3Plus(num_classes, args.backbone, "none", args.width)
    load_state(nets["student"], stage1["networks"], path, prefix="main.")
    if args.filter in ("eln", "ecn"):
        empty = Namespace(**{**vars(args), "eln_weights": "none"})  # stage 1 has better ones
        nets["auxiliary"] = AuxiliaryNetworks(num_classes, nets["student"].encoder, empty)
        load_state(nets["auxiliary"], stage1["networks"], path, prefix="auxiliary.")
    nets["teacher"] = copy.deepcopy(nets["student"]).requires_grad_(False)
    return nets


def make_batches(dataset, run, start, args, process):
    """((image, label), (image_u, image_a)) of each step from start + 1 on."""
    common = dict(size=args.size, batch_size=args.batch_size, workers=args.workers)
    common.update(start=start, stop=args.iters, process=process)
    stream, stream_u = (args.seed, 2, 0), (args.seed, 2, 1)  # stage 2, the kind of images
    labeled = make_loader(dataset, run["labeled"], labeled=True, stream=stream, **common)
    unlabeled = make_loader(dataset, run["unlabeled"], labeled=False, stream=stream_u, **common)
    return zip(labeled, unlabeled)


# ---- Command line ----

VOC = dict(
    iters=101080,  # 380 times the released code's 266 steps
    beta=0.995,  # Sec. 4.2
    contrast_pixels=4096,  # ours: cheap on a CPU, and fits a GPU of 11 GB
)
DEFAULTS = {
    "voc": VOC,
    "folder": dict(
        iters=600,  # ours: what two CPU cores do in half an hour
        beta=0.99,  # in few steps the teacher must follow sooner
        contrast_pixels=1024,
        lr=3e-4,  # less than stage 1's, so that the student swings less
        backbone_lr=3e-5,
    ),
    "cityscapes": dict(VOC, iters=90972),  # 342 times 266 steps
    "shapes": dict(
        iters=170,  # ours: what two CPU cores do in two minutes
        batch_size=8,  # more than stage 1's, so that the student swings less
        beta=0.95,  # in few steps the teacher must follow sooner
        contrast_pixels=1024,
        lr=3e-4,  # less than stage 1's
    ),
}


def parse_args(argv=None):
    """The command line of stage 2. It is parsed twice, as stage 1's options are defaults."""
    argv = sys.argv[1:] if argv is None else argv
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("run", nargs="?", metavar="RUN", help="stage 1's folder; else --out, or stage 1's")
    add("--iters", type=within(1), metavar="STEPS", help="of training")
    add("--beta", type=within(0, 1, float), help="the teacher's share in Eq. (8) (Sec. 4.2)")
    add("--tau", type=within(1e-3, kind=float), default=0.5, help="of Eq. (10) (Sec. 4.2)")
    add("--contrast-pixels", type=within(0), metavar="N", help="of Eq. (10); 0: all of V")
    add(
        "--filter", choices=("eln", "threshold", "ecn", "none"),
        help="which pseudo labels count (Table 3): those that ELN accepts; those of a "
        "confidence above --threshold; all of the s-ECN's; or, ours, all of the teacher's. By "
        "default what stage 1 trained",
    )
    add("--threshold", type=within(0, 1, float), default=0.9, help="for --filter threshold")
    add(
        "--losses", nargs="+", choices=("pseudo", "contra"),
        help="of Table 6; by default both, with --filter threshold pseudo alone",
    )
    words = [word for word in argv if word not in ("-h", "--help")]
    given, unknown = parser.parse_known_args(words)
    options = stage1_options(vars(given), None)  # the defaults
    for word in unknown:
        option = word.partition("=")[0]
        is_known = option.startswith("--") and option[2:].replace("-", "_") in options
        advice = "leave it out, as stage 2 takes what is in stage 1's checkpoint"
        require(not is_known, f"{option} is an option of train_stage1.py alone: {advice}")
    path = Path(given.run or given.out or options["out"], "stage1.pt")
    stage1 = read_checkpoint(path, stage=1) if path.exists() else None
    if stage1 is not None:
        options = stage1_options(stage1["args"], path)
    del options["out"]
    parser.set_defaults(**{**options, **DEFAULTS[options["dataset"]]})
    args = parser.parse_args(argv)
    advice = "run train_stage1.py first, or name its folder"
    require(stage1 is not None, f"{path} does not exist: {advice}")
    args.run = str(path.parent)
    args.filter = args.filter or args.corrector
    default_losses = ["pseudo"] if args.filter == "threshold" else ["contra", "pseudo"]
    args.losses = sorted(set(args.losses or default_losses))
    require_usable(stage1, options, args, path)
    if args.out is None:
        args.out = args.run
        if args.filter != args.corrector:
            args.out += f"-{args.filter}"
        if args.filter == "threshold" and args.threshold != parser.get_default("threshold"):
            args.out += f"-{args.threshold:g}"
        if args.losses != default_losses:
            args.out += f"-{'-'.join(args.losses)}"
    return args


def stage1_options(args, path):
    """Stage 1's options, as its checkpoint has them and as its own command line allows them.

    Raises InputError for others, which a file of another origin might hold.
    """
    words = []
    own = [key for key in vars(parse_stage1([])) if key not in ("device", "amp")]
    for key in own:
        value = args.get(key)
        if value is not None:
            words.append(f"--{key.replace('_', '-')}")
            words += map(str, value if isinstance(value, list) else [value])
    try:
        with redirect_stderr(io.StringIO()):  # without argparse's usage
            options = vars(parse_stage1(words))
    except SystemExit:
        raise InputError(f"{path} has options that train_stage1.py refuses") from None
    return {key: options[key] for key in own}


def require_usable(stage1, before, args, path):
    """Raises InputError if stage 2 cannot start from a stage 1 with the options `before`."""
    for key in ("dataset", "ratio", "split"):
        asked = getattr(args, key)
        same = asked == before[key]
        require(same, f"--{key} {asked}, but {path} was made with {before[key]}")
    step = stage1["step"]
    steps = before["pretrain_iters"] + before["eln_iters"]
    require(step == steps, f"{path} is unfinished (step {step}): let train_stage1.py end")
    is_trained = args.filter == args.corrector and args.eln_iters > 0
    require(
        is_trained or args.filter in ("threshold", "none"),
        f"--filter {args.filter} needs a stage 1 that trained it; {path} has none",
    )


if __name__ == "__main__":
    run_script("train_stage2.py", parse_args, train)

"""Stage 2 (Sec. 3.2): semi-supervised training of the student, on pixels whose pseudo labels ELN believes.

    python train_stage2.py                                                   # after train_stage1.py
    python train_stage2.py runs/voc-1_20-0 --filter threshold                # of that run; a rival of Table 3
    torchrun --nproc_per_node=4 train_stage2.py --dataset voc --ratio 1/20

It begins with the networks of stage 1, whose options count where none are given (but --out, --device, --amp,
and on `shapes` --lr). The teacher labels, ELN rejects, the student learns from perturbed and labelled images.
"""

import copy
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from data import load_dataset, make_loader, normalize, require, share_of_batch, within
from eln import AuxiliaryNetworks, diagnosis, ecn_loss, eln_input
from evaluate import fill, mean_iou, read_checkpoint, score
from losses import (
    auxiliary_loss, contrastive_loss, ema_update, eln_loss, labeled_loss, pseudo_label_loss, supervised_loss,
    unlabeled_loss,
)
from model import DeepLabV3Plus
from train_stage1 import (
    DEFAULTS, make_parser, numbers, open_run, prepare, progress, resume, run_script, same_statistics, save,
)


def train(args, rank, world, device):
    """Sec. 3.2: L_labeled on labelled images, L_unlabeled on those that the teacher labels."""
    path = Path(args.run) / "stage1.pt"
    stage1 = read_checkpoint(path, stage=1)
    dataset = load_dataset(args.dataset, args.data)
    lost = [key for key in stage1["labeled"] + stage1["unlabeled"] if key not in dataset.files]
    require(not lost, f"{path} was made with images that --data {args.data} lacks: {' '.join(lost[:1])}")
    same = stage1["classes"] == list(dataset.classes)
    require(same, f"{path} was made with other classes than --data {args.data} has")
    run = open_run(2, args, dataset, stage1["labeled"], stage1["unlabeled"], rank)
    C, with_eln = len(dataset.classes), args.filter in ("eln", "ecn")  # the other filters need no ELN
    torch.manual_seed(args.seed)
    nets = nn.ModuleDict({"main": DeepLabV3Plus(C, args.backbone, "none", args.width)})  # the student E, D
    fill(nets.main, stage1["networks"], path, "main.")
    if with_eln:
        nets["auxiliary"] = AuxiliaryNetworks(C, nets.main.encoder, args)  # D^k, ELN
        fill(nets.auxiliary, stage1["networks"], path, "auxiliary.")
    del stage1
    nets["teacher"] = copy.deepcopy(nets.main).requires_grad_(False)
    main, auxiliary, optimizer, scaler, autocast = prepare(nets, args, world, device)
    start, rows = resume(run, args.iters, nets, optimizer, scaler, rank)
    student, teacher = nets.main, nets.teacher
    eln = nets.auxiliary.eln if with_eln else None
    mine = share_of_batch(args.batch_size, rank, world)
    share = world * (mine.stop - mine.start) / args.batch_size  # DDP averages: weigh each by its images
    eln_or_ecn_loss = {"eln": eln_loss, "ecn": ecn_loss}[args.corrector]
    contrast = contrastive_loss if args.contrast_pixels else contrastive_loss_in_parts
    size, n, place = args.size, args.batch_size, (start, args.iters, rank, world, args.workers)
    labeled = make_loader(dataset, run["labeled"], size, True, n, (args.seed, 2, 0), *place)
    unlabeled = make_loader(dataset, run["unlabeled"], size, False, n, (args.seed, 2, 1), *place)
    batches = zip(labeled, unlabeled)

    for step, ((image, label), views) in progress(batches, rows, start, args.iters, rank):
        torch.manual_seed(hash((args.seed, 2, step, rank)))  # dropout, the same when resumed
        image, image_u, image_a = (normalize(x.to(device, non_blocking=True)) for x in (image, *views))
        label = label.to(device, non_blocking=True).long()
        nets.eval()  # teacher and ELN label with fixed statistics, before they learn from this step
        with autocast:
            pseudo_label, valid, feature_t = make_pseudo_labels(teacher, eln, image_u, args)  # Y^, V, f~
        nets.train()
        optimizer.zero_grad()

        # A backward pass frees its graph before the next is built; main's second one averages both by DDP.
        with main.no_sync() if world > 1 else nullcontext():
            with autocast:
                logits, _, encoded = main(image)  # D(E(X)): P before its softmax
            L_sup = supervised_loss(logits, label)  # Eq. (2)
            L_aux = L_eln = torch.zeros_like(L_sup)
            if with_eln:
                with autocast:
                    aux_logits, valid_logits = auxiliary(image, logits, *encoded)  # P^k, B^k
                L_aux = auxiliary_loss(aux_logits, logits, label, args.alphas)  # Eq. (3)
                L_eln = eln_or_ecn_loss(valid_logits, [logits, *aux_logits], label)  # Eq. (6)
            L_labeled = labeled_loss(L_sup, L_aux, L_eln)  # Eq. (7)
            scaler.scale(share * L_labeled).backward()

        with autocast:
            logits_a, feature_s, _ = main(image_a, embed=True)  # P^a, f
        L_pseudo = ("pseudo" in args.losses) * pseudo_label_loss(logits_a, pseudo_label, valid)  # Eq. (9)
        *pixels, share_V = pixels_of_V(feature_s, feature_t, pseudo_label, valid, args, step, rank, world)
        L_contra = ("contra" in args.losses) * share_V * contrast(*pixels, args.tau)  # Eq. (10)
        L_unlabeled = unlabeled_loss(L_pseudo, L_contra)  # Eq. (11)
        scaler.scale(share * L_unlabeled).backward()
        scaler.step(optimizer)
        scaler.update()
        same_statistics(nets, world, device)
        ema_update(teacher, student, args.beta)  # Eq. (8)

        scored = step % args.eval_every == 0 or step == args.iters
        if step % args.log_every == 0 or scored:
            row = dict(L_sup=L_sup, L_aux=L_aux, L_eln=L_eln, L_pseudo=L_pseudo, L_contra=L_contra)
            row = numbers(step, {**row, "accepted": valid.float().mean()}, share, world)
            if with_eln:
                row.update(diagnosis(logits, aux_logits, valid_logits, label, world))
            if scored:
                for name, network in (("mIoU", student), ("mIoU_teacher", teacher)):
                    matrices = score(network, dataset, args.size, device, rank, world, args.workers)
                    row[name] = mean_iou(matrices["resized"])
            rows.append(row)
        if rank == 0 and (step % args.save_every == 0 or step == args.iters):
            save(run, dataset, step, rows, nets, optimizer, scaler)


@torch.no_grad()
def make_pseudo_labels(teacher, eln, image_u, args):
    """The teacher labels unlabelled images X (B, 3, H, W), and a filter says which labels count, V.

    eln   ELN or the s-ECN; None where the filter needs none. Networks are in eval mode.
    args  filter: "eln", or a rival of Table 3: "ecn" (its corrections become Y^), "threshold", "none"
    Returns pseudo_label (B, H, W) int64, Y^; valid (B, H, W) bool, round(B~); feature_t (B, D, h, w), f~.
    """
    logits, feature_t, _ = teacher(image_u, embed=True)  # P~
    pseudo_label = logits.argmax(dim=1)
    valid = torch.ones_like(pseudo_label, dtype=torch.bool)
    if args.filter == "eln":
        valid = eln(eln_input(image_u, logits)) > 0  # a sigmoid above 0.5, which rounds to 1
    elif args.filter == "ecn":
        pseudo_label = eln(eln_input(image_u, logits)).argmax(dim=1)
    elif args.filter == "threshold":
        valid = logits.softmax(dim=1).amax(dim=1) > args.threshold
    return pseudo_label, valid, feature_t


def pixels_of_V(feature_s, feature_t, pseudo_label, valid, args, step, rank, world):
    """What Eq. (10) takes: --contrast-pixels of V (0: all) at random, the same however the batch is split.

    feature_s, feature_t (b, D, h, w) of this process's b images; pseudo_label, valid (b, H, W)
    Returns f (n, D) of this process, f~ (m, D) of all, their labels (n,) and (m,), 255 = not drawn,
    and share_V: this process's part of the anchors over its part of the images (of one process 1)."""
    h, w = feature_s.shape[2:]
    label = pseudo_label.masked_fill(~valid, 255).float()[:, None]
    label = F.interpolate(label, size=(h, w), mode="nearest-exact").long().flatten()  # (b h w,)
    mine, B = share_of_batch(args.batch_size, rank, world), args.batch_size
    number = args.contrast_pixels or B * h * w
    lot = np.random.default_rng([args.seed, 2, 3, step]).permutation(B * h * w).reshape(B, h * w)[mine]
    lot = torch.from_numpy(lot).to(label.device, non_blocking=True).flatten()  # its place in a queue for each
    lot = lot.masked_fill(label == 255, B * h * w)  # V first
    rows = min(number, -(-B // world) * h * w)  # of each process, at most
    lot, place = lot.topk(min(rows, len(lot)), largest=False)
    lots = gather(lot, rows, B * h * w, world)
    last = lots.topk(min(number, len(lots)), largest=False).values[-1]
    label = label[place].masked_fill(lot > last, 255)
    f, f_teacher = (x.permute(0, 2, 3, 1).flatten(0, 2)[place] for x in (feature_s, feature_t))
    labels = gather(label, rows, 255, world)
    part_of_V = (label != 255).sum() / (labels != 255).sum().clamp(min=1)
    share_V = part_of_V * B / (mine.stop - mine.start)
    return f, gather(f_teacher, rows, 0, world), label, labels, share_V


def gather(tensor, rows, pad, world):
    """(n, ...) of each process, filled up to `rows` with pad -> (world * rows, ...) of all. No gradient."""
    padded = tensor.new_full((rows, *tensor.shape[1:]), pad)
    padded[: len(tensor)] = tensor
    if world == 1:
        return padded
    parts = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(parts, padded)
    return torch.cat(parts)


def contrastive_loss_in_parts(anchor, key, anchor_label, key_label, tau, rows=256):
    """Eq. (10) for `rows` anchors at a time, computed again in the backward pass: bounds its memory."""
    V = (anchor_label != 255).sum().clamp(min=1)
    loss = 0
    for part in anchor_label.argsort().split(rows):  # a part then has few classes
        pixels = anchor[part], key, anchor_label[part], key_label
        mean = checkpoint(contrastive_loss, *pixels, tau, use_reentrant=False, preserve_rng_state=False)
        loss = loss + mean * (anchor_label[part] != 255).sum() / V
    return loss


def parse_args(argv=None):
    """The command line of stage 2. It is parsed twice: most defaults are the options of stage 1."""
    argv = sys.argv[1:] if argv is None else argv
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("run", nargs="?", metavar="RUN", help="stage 1's folder; else --out, or --dataset --ratio --split")
    add("--iters", type=within(1), metavar="STEPS", help="of training")
    add("--beta", type=within(0, 1, float), help="share of the teacher in Eq. (8) (Sec. 4.2)")
    add("--tau", type=within(1e-3, kind=float), default=0.5, help="temperature, Eq. (10) (Sec. 4.2)")
    add("--contrast-pixels", type=within(0), metavar="N", help="of a batch in Eq. (10); 0: every valid one")
    add("--filter", choices=("eln", "threshold", "ecn", "none"),
        help="which pseudo labels count (Table 3): those that ELN accepts; those of a confidence above "
        "--threshold; all of the s-ECN's corrections; all. By default what stage 1 trained")
    add("--threshold", type=within(0, 1, float), default=0.9, help="on the softmax, for --filter threshold")
    add("--losses", nargs="+", choices=("pseudo", "contra"), help="Table 6; both, but pseudo for threshold")
    given = parser.parse_args([word for word in argv if word not in ("-h", "--help")])
    ratio = given.ratio or DEFAULTS[given.dataset]["ratio"]
    found = f"runs/{given.dataset}-{ratio.replace('/', '_')}-{given.split}"
    folder = Path(given.run or given.out or found)
    path = folder / "stage1.pt"
    stage1 = read_checkpoint(path, stage=1) if path.exists() else {"args": {}}
    known = {key: value for key, value in stage1["args"].items() if key not in ("out", "device", "amp")}
    defaults = DEFAULTS[known.get("dataset", given.dataset)]
    parser.set_defaults(**{key: value for key, value in defaults.items() if hasattr(given, key)})
    rate = defaults.get("lr_stage2", known.get("lr", defaults["lr"]))
    parser.set_defaults(**{**known, "weights": "none", "eln_weights": "none", "lr": rate})
    args = parser.parse_args(argv)
    require(known, f"{path} does not exist: run train_stage1.py first, or name its folder")
    for key in ("dataset", "ratio", "split"):
        asked = getattr(args, key)
        require(asked == known[key], f"--{key} {asked}, but {path} was made with {known[key]}")
    finished = stage1["step"] == args.pretrain_iters + args.eln_iters
    require(finished, f"{path} is unfinished (step {stage1['step']}): let train_stage1.py end")
    require(stage1["unlabeled"], f"every training image of {path} is labelled: nothing is left for stage 2")
    args.filter = args.filter or args.corrector
    trained = args.filter not in ("eln", "ecn") or args.filter == args.corrector and args.eln_iters
    require(trained, f"--filter {args.filter} needs a stage 1 that trained it; {path} has none")
    usual = ["pseudo"] if args.filter == "threshold" else ["contra", "pseudo"]
    args.losses = sorted(set(args.losses or usual))
    variant = [args.filter] * (args.filter != args.corrector) + args.losses * (args.losses != usual)
    args.run, args.out = str(folder), args.out or "-".join([str(folder), *variant])
    return args


if __name__ == "__main__":
    run_script("train_stage2.py", parse_args, train)

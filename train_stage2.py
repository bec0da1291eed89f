"""Stage 2 (Sec. 3.2): semi-supervised training of the student, on pixels whose pseudo labels ELN believes.

    python train_stage2.py                                                   # after train_stage1.py
    torchrun --nproc_per_node=4 train_stage2.py --dataset voc --ratio 1/20

It begins with the networks of --stage1 (default: the run's folder), and takes from there what the options do
not say about data, networks and training. The teacher labels, ELN rejects, the student learns from perturbed
and labelled images.
"""

import argparse
import copy
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from data import DATASETS, InputError, check_files, make_loader, normalize, share_of_batch, within
from eln import eln_input
from evaluate import fill, mean_iou, read_checkpoint, score
from losses import (
    auxiliary_loss, contrastive_loss, ema_update, eln_loss, pseudo_label_loss, supervised_loss,
    unlabeled_loss,
)
from train_stage1 import (
    AMP_TYPES, DEFAULTS, LABELED, SEED, Log, Watch, add_options, by_first, check_finite, default_out,
    ecn_loss, judgement, judgement_fields, make_networks, make_parser, open_run, option, parallel,
    parameter_groups, restore, run_script, same_statistics, save, save_checkpoint, step_seed,
    student_record, total, untrained, write_result,
)

STAGE, UNLABELED, PIXELS = 2, 1, 3  # parts of the seeds, see data.Views and contrast_labels
ROWS = 256  # of Eq. (10)'s matrix at a time: all 98,304 pixels of a batch then take 0.8 GiB; changes no value
# Options that stage 2 may not change: they name the data and the networks of stage 1.
FROM_STAGE1 = (
    "dataset", "ratio", "split", "labeled_list", "unlabeled_list", "backbone", "weights", "eln_backbone",
    "eln_weights", "width", "size", "alphas", "corrector",
)


@torch.no_grad()
def make_pseudo_labels(teacher, eln, image_u, filter, threshold, embed=True):
    """The teacher labels unlabelled images X (B, 3, H, W), and the filter says which labels count.

    eln may be None where the filter needs none. Networks are in eval mode: fixed statistics, no dropout.
    Returns pseudo_label (B, H, W) int64, Y^; valid (B, H, W) bool, round(B~); feature_t (B, D, stride 4), f~,
    or None without embed.
    """
    logits, feature_t, _ = teacher(image_u, embed)
    pseudo_label = logits.argmax(dim=1)
    valid = torch.ones_like(pseudo_label, dtype=torch.bool)
    if filter == "eln":
        valid = eln(eln_input(image_u, logits)) > 0  # round(sigmoid) = 1
    elif filter == "ecn":
        pseudo_label = eln(eln_input(image_u, logits)).argmax(dim=1)
    elif filter == "threshold":
        valid = logits.softmax(dim=1).amax(dim=1) > threshold
    return pseudo_label, valid, feature_t


def gather(tensor, rows, fill, world):
    """(n, ...) of each process, padded to `rows` with `fill` -> (world * rows, ...) of all. No gradient."""
    padded = tensor.new_full((rows, *tensor.shape[1:]), fill)
    padded[: len(tensor)] = tensor
    if world == 1:
        return padded
    parts = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(parts, padded)
    return torch.cat(parts)


def contrast_labels(pseudo_label, valid, shape, pixels, rng, rank, world, batch_size):
    """This process's pixels of Eq. (10): its part of `pixels` valid ones drawn over the batch, or (0) of all.

    pseudo_label (b, H, W) int64, valid (b, H, W) bool; shape (h, w) of the features
    rng  gives the same numbers on every process
    Returns place (n,) int64 in the b*h*w features, and label (n,) int64, 255 where a pixel is not drawn.
    With a limit, n is at most `pixels`, and so is the memory that Eq. (10) takes.
    """
    label = pseudo_label.masked_fill(~valid, 255).float()[:, None]
    label = F.interpolate(label, size=shape, mode="nearest-exact").long().flatten()  # (b*h*w,)
    if pixels == 0:
        return torch.arange(len(label), device=label.device), label
    per_image = shape[0] * shape[1]
    lot = torch.from_numpy(rng.random((batch_size, per_image))[share_of_batch(batch_size, rank, world)])
    lot = lot.to(label.device, non_blocking=True).flatten().masked_fill(label == 255, 2.0)  # valid: in [0, 1)
    lots = gather(lot, -(-batch_size // world) * per_image, 2.0, world)
    last = lots.topk(min(pixels, len(lots)), largest=False).values[-1]
    lot, place = lot.topk(min(pixels, len(lot)), largest=False)
    return place, label[place].masked_fill(lot > last, 255)


def contrast_batch(feature_s, feature_t, pseudo_label, valid, args, step, rank, world):
    """Anchors of this process and keys of all for Eq. (10).

    feature_s, feature_t (b, D, stride 4); pseudo_label, valid (b, H, W)
    Returns f (n, D), f_t (m, D), label_s (n,), label_t (m,) and share_V: Eq. (10) is a mean over anchors
    of all processes: each weighs its own mean by its part of them, times `world` because DDP averages.
    """
    B, shape = args.batch_size, feature_s.shape[2:]
    rng = np.random.default_rng([args.seed, STAGE, PIXELS, step])
    pixels = (pseudo_label, valid, shape, args.contrast_pixels, rng, rank, world, B)
    place, label_s = contrast_labels(*pixels)
    f, f_t = (x.permute(0, 2, 3, 1).flatten(0, 2)[place] for x in (feature_s, feature_t))  # (n, D)
    rows = -(-B // world) * shape.numel()
    rows = min(rows, args.contrast_pixels) if args.contrast_pixels else rows
    V_r = (label_s != 255).sum()
    share_V = world * V_r / total(V_r, world).clamp(min=1)
    return f, gather(f_t, rows, 0, world), label_s, gather(label_s, rows, 255, world), share_V


def parse_args(argv=None):
    """The command line of stage 2. Stage 1's checkpoint is read first: the defaults follow from it."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--dataset", choices=DATASETS)
    for name in ("--ratio", "--labeled-list", "--out", "--stage1", "--corrector"):
        first.add_argument(name)
    first.add_argument("--split", type=SEED, default=0)
    given, _ = first.parse_known_args(argv)
    given.dataset = given.dataset or "shapes"
    given.ratio = given.ratio or DEFAULTS[given.dataset]["ratio"]
    stage1 = Path(given.stage1 or Path(given.out or default_out(given)) / "stage1.pt")
    known = read_checkpoint(stage1, stage=1)["args"] if stage1.exists() else {}
    defaults = DEFAULTS[known.get("dataset", given.dataset)]

    parser = make_parser(__doc__)
    paper, run = add_options(parser)
    run.add_argument("--stage1", metavar="FILE", help="stage 1's checkpoint; default: the run's stage1.pt")
    add = paper.add_argument
    add("--iters", type=within(1), help="steps")
    add("--beta", type=within(0, 1, float), default=0.995, help="share of the teacher in Eq. (8) (Sec. 4.2)")
    add("--tau", type=within(1e-3, kind=float), default=0.5, help="temperature, Eq. (10) (Sec. 4.2)")
    add("--contrast-pixels", type=within(0), metavar="N", help="of a batch in Eq. (10); 0: every valid one")
    add("--filter", choices=("eln", "threshold", "ecn", "none"),
        help="which pseudo labels count (Table 3): those that ELN accepts; those of a confidence above "
        "--threshold; all of s-ECN's corrections; all. Default: eln, or ecn if stage 1 trained that")
    add("--threshold", type=within(0, 1, float), default=0.9, help="on the softmax, for --filter threshold")
    add("--losses", nargs="+", choices=("pseudo", "contra"),
        help="of unlabelled images (Table 6). Default: both; pseudo with --filter threshold")
    names = vars(parser.parse_args([])).keys() - {"out", "iters", "amp", "device"}
    inherited = {key: value for key, value in known.items() if key in names}
    parser.set_defaults(**{key: defaults[key] for key in (*names, "iters") if key in defaults})
    parser.set_defaults(**inherited)
    args = parser.parse_args(argv)
    if not known:
        parser.error(f"{stage1} does not exist: run train_stage1.py first, or name its checkpoint (--stage1)")
    for key in FROM_STAGE1:
        if getattr(args, key) != known.get(key):
            parser.error(f"{option(key)} {getattr(args, key)}, but {stage1} was made with {known.get(key)}")
    args.filter = args.filter or args.corrector
    usual = ["pseudo"] if args.filter == "threshold" else ["contra", "pseudo"]
    args.losses = sorted(set(args.losses or usual))
    if args.filter in ("eln", "ecn") and (known["supervised_only"] or args.filter != args.corrector):
        parser.error(f"--filter {args.filter} needs a stage 1 that trained it; {stage1} has none")
    args.stage1 = str(stage1)
    variant = [args.filter] * (args.filter != args.corrector) + args.losses * (args.losses != usual)
    args.out = args.out or "-".join([str(stage1.parent), *variant])
    return args


def train(args, rank, world, device):
    """Stage 2, Sec. 3.2: a step is batches, pseudo labels, forward and backward of each loss, optimizer, EMA,
    log, save."""
    out, path = Path(args.out), Path(args.out) / "stage2.pt"
    dataset, run, checkpoint = open_run(args, STAGE, device)
    start = checkpoint["step"] if checkpoint else 0
    if start >= args.iters:
        return print(f"{path} is finished ({args.iters} steps)") if rank == 0 else None
    if not run["unlabeled"]:
        raise InputError("there is no unlabelled image: every training image is labelled")
    check_files(dataset, run["labeled"], run["unlabeled"], args.size)
    stage1 = read_checkpoint(args.stage1, stage=1)
    if stage1["step"] != stage1["args"]["pretrain_iters"] + stage1["args"]["eln_iters"]:
        raise InputError(f"{args.stage1} is unfinished (step {stage1['step']}): let train_stage1.py end")
    if stage1["labeled"] != run["labeled"] or stage1["classes"] != run["classes"]:
        raise InputError(f"{args.stage1} was made with other labelled images or classes than {args.data} has")

    torch.manual_seed(args.seed)
    with_eln = args.filter in ("eln", "ecn")  # else auxiliary decoders and ELN are neither built nor trained
    nets = make_networks(len(dataset.classes), untrained(args), with_eln)
    wanted = nets.state_dict().keys()
    state = {key: value for key, value in stage1["networks"].items() if key in wanted}
    fill(nets, state, args.stage1)
    del stage1, state
    nets["teacher"] = copy.deepcopy(nets.main).requires_grad_(False)
    nets = nets.to(device, memory_format=torch.channels_last)
    with_contrast = "contra" in args.losses
    nets.main.decoder.proj.requires_grad_(with_contrast)
    if world > 1 and device.type == "cuda":
        nets = nn.SyncBatchNorm.convert_sync_batchnorm(nets)
    student, teacher = nets.main, nets.teacher
    eln = nets.auxiliary.eln if with_eln else None
    trained = [student, nets.auxiliary] if with_eln else [student]
    optimizer = torch.optim.AdamW(parameter_groups(trained, args), weight_decay=args.weight_decay, fused=True)
    amp = AMP_TYPES[args.amp]
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)

    seconds, skipped, best = 0.0, (0, 0), {}
    if checkpoint:
        seconds, skipped, best = restore(path, checkpoint, nets, optimizer, scaler)
        del checkpoint
    main = parallel(student, world)
    auxiliary = parallel(nets.auxiliary, world) if with_eln else None

    def loader(ids, labeled, kind):
        stream = (args.seed, STAGE, kind)
        steps_and_part = (start, args.iters, rank, world, args.workers)
        return make_loader(dataset, ids, args.size, labeled, args.batch_size, stream, *steps_and_part)

    batches = zip(loader(run["labeled"], True, LABELED), loader(run["unlabeled"], False, UNLABELED))
    fields = ["step", "L_sup", "L_aux", "L_eln", "L_pseudo", "L_contra", "accepted"]
    if with_eln:
        fields += judgement_fields(len(args.alphas))
    fields += ["mIoU", "mIoU_teacher", *["skipped"] * scaler.is_enabled(), "images/s", "steps/s"]
    log = Log(out / "log_stage2.csv", fields, start, args.iters, rank)
    by_first(rank, world, device, log.begin, start)
    images = f"{len(run['labeled'])} labelled and {len(run['unlabeled'])} unlabelled images"
    log.show(f"{out}: {images}, {args.iters - start} steps on {world} x {device}")
    began = time.monotonic() - seconds
    b = share_of_batch(args.batch_size, rank, world)
    share = world * (b.stop - b.start) / args.batch_size  # makes DDP's mean over processes one over images

    def store(done, scores):
        """Write the checkpoint, and before it, with the last step's scores, what else a run leaves."""
        check_finite(nets, optimizer, done)
        seconds = time.monotonic() - began
        if scores:
            save(student_record(student, dataset, args), out / "student_stage2.pt")
            write_result(out, "stage2", args, done, seconds, device, watch.skipped[0], scores, best)
        state = {**run, "step": done, "seconds": seconds, "best": best, "skipped": watch.skipped}
        save_checkpoint(path, state, nets, optimizer, scaler)

    autocast = partial(torch.autocast, device.type, amp, enabled=amp is not None)
    watch = Watch(rank, skipped)
    for step in range(start, args.iters):
        (image, label), (image_u, image_u_strong) = next(batches)
        torch.manual_seed(step_seed(args.seed, STAGE, step, rank))
        image, image_u, image_u_strong = (
            normalize(x.to(device, non_blocking=True)) for x in (image, image_u, image_u_strong)
        )
        label = label.to(device, non_blocking=True).long()

        nets.eval()  # teacher and ELN label with fixed statistics, before they learn from this step
        with autocast():
            pseudo_label, valid, feature_t = make_pseudo_labels(
                teacher, eln, image_u, args.filter, args.threshold, with_contrast
            )

        nets.train()
        optimizer.zero_grad(set_to_none=True)
        # Each backward pass frees its graph before the next is built, so that memory holds one at a time. The
        # student's second pass averages over processes what both have added up: hence no_sync in the first.
        with main.no_sync() if world > 1 else nullcontext():
            with autocast():
                logits, _, encoded = main(image)
            L_sup = share * supervised_loss(logits, label)  # Eq. (2)
            scaler.scale(L_sup).backward()
        row = {"L_sup": L_sup}

        if with_eln:  # the rest of Eq. (7)
            with autocast():
                aux_logits, valid_logits = auxiliary(image, logits, *encoded)
            L_aux = share * auxiliary_loss(aux_logits, logits, label, args.alphas)  # Eq. (3)
            if args.filter == "eln":
                L_eln = share * eln_loss(valid_logits, [logits, *aux_logits], label)  # Eq. (6)
            else:
                L_eln = share * ecn_loss(valid_logits, label)
            scaler.scale(L_aux + L_eln).backward()
            row.update(L_aux=L_aux, L_eln=L_eln)

        with autocast():
            logits_u, feature_s = main(image_u_strong, with_contrast)[:2]
        L_pseudo = share * pseudo_label_loss(logits_u, pseudo_label, valid)  # Eq. (9)
        L_pseudo = L_pseudo * ("pseudo" in args.losses)  # 0 rather than left out: DDP needs every parameter
        L_contra = L_pseudo.new_zeros(())
        if "pseudo" in args.losses:
            row["L_pseudo"] = L_pseudo
        if with_contrast:
            features = feature_s, feature_t, pseudo_label, valid
            f, f_t, label_s, label_t, share_V = contrast_batch(*features, args, step, rank, world)
            L_contra = share_V * contrastive_loss(f, f_t, label_s, label_t, args.tau, chunk=ROWS)  # Eq. (10)
            row["L_contra"] = L_contra
        L_unlabeled = unlabeled_loss(L_pseudo, L_contra)  # Eq. (11)
        scaler.scale(L_unlabeled).backward()
        row["accepted"] = share * valid.float().mean()

        scaler.unscale_(optimizer)
        row = watch.look(step, row, optimizer, scaler, world)
        scaler.step(optimizer)
        scaler.update()
        ema_update(teacher, student, args.beta)  # Eq. (8)
        same_statistics(nets, world, device)

        done, scores = step + 1, {}
        last = done == args.iters
        validate, write = done % args.eval_every == 0 or last, done % args.log_every == 0 or last
        if validate or write:
            rate = log.steps_per_second(done)
            row.update({"images/s": 2 * rate * args.batch_size, "steps/s": rate})
            if with_eln:
                row.update(judgement(logits, aux_logits, valid_logits, label, world))
            if validate:
                for name, network in (("mIoU", student), ("mIoU_teacher", teacher)):
                    matrices = score(network, dataset, args.size, device, rank, world, args.workers)
                    scores[name] = row[name] = mean_iou(matrices["resized"])
                    best[name] = max(best.get(name, 0.0), scores[name])
            if scaler.is_enabled():
                row["skipped"] = watch.skipped[0]
            by_first(rank, world, device, log.write, done, row)
        if done % args.save_every == 0 or last or watch.stop:
            by_first(rank, world, device, store, done, last and scores)
        if watch.stop and not last:
            raise watch.stopped(path, done)
        logits = encoded = aux_logits = valid_logits = logits_u = feature_s = feature_t = None  # frees memory
    log.show(f"stage 2: mIoU {scores['mIoU']:.2f}  ({out / 'student_stage2.pt'})")


if __name__ == "__main__":
    run_script("train_stage2.py", parse_args, train)

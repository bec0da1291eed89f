"""Stage 1 (Sec. 3.1): the segmentation network, then auxiliary decoders and ELN with it.

    python train_stage1.py                                         # `shapes`, on any machine
    torchrun --nproc_per_node=4 train_stage1.py --dataset voc --data DIR --ratio 1/20

First L_sup alone (--pretrain-iters), then L_labeled = L_sup + L_aux + L_ELN (--eln-iters), on
labelled images only. The same command resumes an interrupted run. --eln-iters 0 leaves L_sup
alone: the "Baseline" of Table 1.
"""

import argparse
import math
import os
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from data import (
    DATASETS, InputError, Process, check_files, is_out_of_memory, labeled_ids, load_dataset,
    make_loader, masks_checksum, one_line, printable, replacing, require, seed_step, to_device,
    tolerant_output, unlabeled_ids, weight_of_process, within,
)
from eln import AuxiliaryNetworks, ecn_loss
from evaluate import (
    CHANGEABLE, CHECKPOINT, csv_text, diagnosis, load_state, read_checkpoint, validate,
)
from losses import auxiliary_loss, eln_loss, labeled_loss, supervised_loss
from model import BACKBONES, DeepLabV3Plus, WeightsError


def train(args, process):
    """Sec. 3.1: pre-training with L_sup, then L_labeled of Eq. (7)."""
    dataset = load_dataset(args.dataset, args.data)
    labeled = labeled_ids(dataset, args.ratio, args.split, args.labeled_list)
    unlabeled = unlabeled_ids(dataset, labeled, args.unlabeled_list)

    # Networks: E and D; the auxiliary decoders D^k and ELN.
    torch.manual_seed(args.seed)  # of their first weights
    nets = nn.ModuleDict()
    nets["main"] = DeepLabV3Plus(len(dataset.classes), args.backbone, args.weights, args.width)
    nets["main"].decoder.proj.requires_grad_(False)  # Proj learns in stage 2
    if args.eln_iters > 0:
        nets["auxiliary"] = AuxiliaryNetworks(len(dataset.classes), nets["main"].encoder, args)
    run, lock = open_run(1, args, dataset, labeled, unlabeled, process)  # locked until the end
    main, auxiliary, optimizer, scaler, autocast = prepare(nets, args, process)
    nets.train()  # always; score puts a network into eval mode and back
    eln_or_ecn_loss = {"eln": eln_loss, "ecn": ecn_loss}[args.corrector]

    # Batches of labelled images, from where an interrupted run stopped.
    steps = args.pretrain_iters + args.eln_iters
    start, rows = resume(run, steps, nets, optimizer, scaler, process)
    stream = (args.seed, 1, 0)  # stage 1, labelled images
    batches = make_loader(
        dataset, labeled, args.size, labeled=True, batch_size=args.batch_size, stream=stream,
        start=start, stop=steps, process=process, workers=args.workers,
    )
    weight = weight_of_process(args.batch_size, process)  # of its images; for one process 1

    for step, batch in progress(batches, rows, start, steps, process, args.pretrain_iters):
        seed_step(args.seed, 1, step, process)
        image, label = to_device(batch, process.device)  # X, Y

        # The main network learns from the labels.
        optimizer.zero_grad()
        with autocast:
            logits, _, encoded = main(image)  # D(E(X)): P before its softmax
        L_sup = supervised_loss(logits, label)  # Eq. (2)
        terms = {"L_sup": L_sup}
        loss = L_sup

        # After the pre-training the decoders D^k learn too, but stay worse than D, and ELN
        # learns to find the wrong pixels of all K+1 predictions.
        if step > args.pretrain_iters:
            if step == args.pretrain_iters + 1 and process.rank == 0:
                warn_of_idle_decoders(rows, args, len(dataset.classes))
            with autocast:
                aux_logits, valid_logits = auxiliary(image, logits, *encoded)  # P^k, B^k
            L_aux = auxiliary_loss(aux_logits, logits, label, args.alphas)  # Eq. (3)
            L_eln = eln_or_ecn_loss(valid_logits, [logits, *aux_logits], label)  # Eq. (6)
            loss = labeled_loss(L_sup, L_aux, L_eln)  # Eq. (7)
            terms.update(L_aux=L_aux, L_eln=L_eln)
        scaler.scale(weight * loss).backward()
        scaler.step(optimizer)
        scaler.update()
        same_statistics(nets, process)

        # Log, validate, save.
        is_scored = step % args.eval_every == 0 or step == steps
        if is_scored or step % args.log_every == 0 or step == args.pretrain_iters:
            row = log_row(step, terms, weight, process)
            if step > args.pretrain_iters:
                row.update(diagnosis(logits, aux_logits, valid_logits, label, process))
            if is_scored:
                row["mIoU"] = validate(nets["main"], dataset, args, process)
            rows.append(row)
        save_when_due(run, dataset, step, steps, rows, nets, optimizer, scaler, process)


def warn_of_idle_decoders(rows, args, num_classes):
    """Say which decoders Eq. (3) does not train yet, after a pre-training with these rows.

    D^k learns on an image only while its loss, at first that of chance, log C, is above alpha^k
    times the main decoder's.
    """
    late = [row["L_sup"] for row in rows if row["step"] > 0.9 * args.pretrain_iters]
    L_sup = sum(late) / max(len(late), 1)
    L_chance = math.log(num_classes)
    for k, alpha_k in enumerate(args.alphas, start=1):
        if alpha_k * L_sup > L_chance:
            line = f"Eq. (3) trains auxiliary decoder {k} once L_sup, now {L_sup:.3f}, is below"
            limit = f"log {num_classes} / {alpha_k:g} = {L_chance / alpha_k:.3f}"
            remedy = "if it stays above, give smaller --alphas or more --pretrain-iters"
            print(f"{line} {limit}; {remedy}", flush=True)


# ---- Processes and precision (both stages) ----


def start_process(args):
    """Join the processes that torchrun started, if any -> Process."""
    rank = int(os.environ.get("RANK", 0))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    n = args.batch_size
    require(world <= n, f"--batch-size {n} is too small for {world} processes")
    gpus = torch.cuda.device_count() if args.device != "cpu" else 0
    if local_rank >= gpus and (gpus > 0 or args.device == "cuda"):
        have = f"{gpus} GPUs are visible to process {local_rank} of this machine"
        raise InputError(f"--device {args.device}: {have}; show it all, or use --device cpu")
    device = torch.device("cpu")
    if gpus > 0:
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True  # sizes are fixed in training
    if world > 1:
        dist.init_process_group("nccl" if gpus > 0 else "gloo")
    return Process(rank, world, device)


def float_type(amp, device):
    """The type of --amp for a device: "bfloat16", "float16", or "float32" where it is off."""
    if amp == "auto" and device.type == "cuda":
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bfloat16" if has_bfloat16 else "float16"
    return "float32" if amp in ("auto", "off") else amp


def prepare(nets, args, process):
    """Everything around the networks that training needs.

    nets  ModuleDict of "main" (stage 1) or "student" (stage 2), and perhaps "auxiliary" and
          "teacher"; it is moved to the device
    Returns the segmentation network and the auxiliary networks (or None) as they are to be
    called, which averages gradients over processes; AdamW of Sec. 4.2, which skips parameters
    without a gradient (D^k and ELN in the pre-training); a gradient scaler, which works with
    float16 alone, and autocast, which does nothing with float32.
    """
    device = process.device
    is_gpu = device.type == "cuda"
    layout = torch.channels_last if is_gpu else torch.contiguous_format  # the faster on each
    nets.to(device, memory_format=layout)
    if process.world > 1 and is_gpu:
        nn.SyncBatchNorm.convert_sync_batchnorm(nets)
    encoders, others = [], []
    for name, parameter in nets.named_parameters():
        if parameter.requires_grad:
            group = encoders if "encoder." in name else others
            group.append(parameter)
    encoder_rate = args.lr if args.backbone_lr is None else args.backbone_lr
    groups = [{"params": encoders, "lr": encoder_rate}, {"params": others, "lr": args.lr}]
    optimizer = torch.optim.AdamW(groups, weight_decay=args.weight_decay, fused=True)
    dtype = getattr(torch, float_type(args.amp, device))
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    is_mixed = dtype != torch.float32
    autocast = torch.autocast(device.type, dtype if is_mixed else None, enabled=is_mixed)
    network = average_gradients(nets["student" if "student" in nets else "main"], process)
    auxiliary = None
    if "auxiliary" in nets:
        auxiliary = average_gradients(nets["auxiliary"], process)
    return network, auxiliary, optimizer, scaler, autocast


def average_gradients(network, process):
    """The network in DistributedDataParallel, if there are several processes."""
    if process.world == 1:
        return network
    warnings.filterwarnings("ignore", "`broadcast_buffers`")  # renamed in PyTorch 2.13
    return nn.parallel.DistributedDataParallel(
        network,
        broadcast_buffers=False,  # same_statistics and SyncBatchNorm see to them
        gradient_as_bucket_view=True,  # saves the memory of a copy
    )


def same_statistics(nets, process):
    """On CPUs, which lack SyncBatchNorm, all take the first process's BatchNorm statistics."""
    if process.world > 1 and process.device.type == "cpu":
        for buffer in nets.buffers():
            dist.broadcast(buffer, 0)


# ---- Checkpoints and log (both stages) ----


def open_run(stage, args, dataset, labeled, unlabeled, process):
    """Check the data, and make and lock the run's folder. Raises InputError.

    Returns a dictionary that resume compares and save writes into the checkpoint, and the lock
    of the folder.
    """
    if process.rank == 0:  # for all processes
        images = len(labeled) + len(unlabeled) + len(dataset.val)
        if images > 1000 and dataset.name != "shapes":
            print(f"looking at the files of {images:,} images ...", flush=True)
        for note in check_files(dataset, labeled, unlabeled, args.size):
            print(printable(note), flush=True)
    run = dict(stage=stage, args=vars(args), labeled=labeled, unlabeled=unlabeled)
    run["masks"] = masks_checksum(dataset, labeled)
    run["classes"] = list(dataset.classes)
    run["val"] = dataset.val
    run["val_masks"] = masks_checksum(dataset, dataset.val)
    run["saved"] = time.monotonic()  # when its checkpoint was written last
    return run, lock_folder(args.out, process)


def lock_folder(folder, process):
    """Keep other processes from training in a folder for as long as the returned file is open.

    Raises InputError if another one does. Without POSIX's locks nothing is noticed.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {folder} cannot be made ({error.strerror})") from None
    if process.rank > 0 or os.name != "posix":
        return None
    import fcntl

    lock = open(Path(folder, ".lock"), "ab")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        message = f"another process is training in {folder}; use another --out"
        raise InputError(message) from None
    except OSError:
        pass  # a file system without locks
    return lock


def resume(run, steps, nets, optimizer, scaler, process):
    """Load the run's checkpoint, if there is one, into networks, optimizer and scaler.

    Returns the number of steps done and the rows of the log, 0 and [] without a checkpoint.
    Random states need not be loaded: each step seeds its own (data.seed_step, IndexStream).
    Raises InputError if it was made with other images, classes or options (those of
    evaluate.CHANGEABLE apart).
    """
    path = Path(run["args"]["out"], f"stage{run['stage']}.pt")
    start, rows = 0, []
    if path.exists():
        types = dict(CHECKPOINT, optimizer=dict, scaler=dict)
        checkpoint = read_checkpoint(path, types, run["stage"])
        require_same_run(run, checkpoint, path)
        load_state(nets, checkpoint["networks"], path)
        load_optimizer(optimizer, checkpoint["optimizer"], path)
        if checkpoint["scaler"]:  # it is empty if float16 was not used
            scaler.load_state_dict(checkpoint["scaler"])
        start, rows = checkpoint["step"], checkpoint["rows"]
    if process.rank == 0:
        state = f"begins after {start} of {steps} steps"
        if start == steps:
            state = f"is finished ({steps} steps)"
        images = f"{len(run['labeled'])} labelled, {len(run['unlabeled'])} unlabelled images"
        dtype = float_type(run["args"]["amp"], process.device)
        print(f"{path} {state}; {images}; {process.device}, {dtype}", flush=True)
    return start, rows


def load_optimizer(optimizer, state, path):
    """Load AdamW's state. InputError if it has other settings, or moments of other shapes."""
    settings = [dict(group, params=None) for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(state)
        same = settings == [dict(group, params=None) for group in optimizer.param_groups]
        for parameter, moments in optimizer.state.items():
            same = same and moments["exp_avg"].shape == parameter.shape
            same = same and moments["exp_avg_sq"].shape == parameter.shape
            same = same and moments["step"].shape == ()
    except (AttributeError, KeyError, TypeError, ValueError):
        same = False
    require(same, f"{path} holds another optimizer than is needed")


def require_same_run(run, checkpoint, path):
    """Raises InputError, naming the first difference, unless the checkpoint is of this run.

    More steps may be asked for than before. Stage 1 does not use unlabelled images.
    """
    advice = "give the same to go on, or another --out"
    steps = "iters" if run["stage"] == 2 else "eln_iters"
    for key, value in run["args"].items():
        before = checkpoint["args"].get(key)
        is_longer = key == steps and 0 < before < value
        if key not in CHANGEABLE and before != value and not is_longer:
            option = f"--{key.replace('_', '-')} {before}, but this command has {value}"
            raise InputError(f"{path} was made with {option}; {advice}")
    compared = {
        "labeled": "labelled images", "masks": "masks of labelled images", "classes": "classes",
        "val": "validation images", "val_masks": "masks of validation images",
    }
    if run["stage"] == 2:
        compared["unlabeled"] = "unlabelled images"
    for key, name in compared.items():
        same = checkpoint.get(key) == run[key]
        require(same, f"{path} was made with other {name}; {advice}")


def save_when_due(run, dataset, step, steps, rows, nets, optimizer, scaler, process):
    """Save after every --save-every steps, after ten minutes without, and at the end."""
    is_late = time.monotonic() - run["saved"] > 600
    if is_late or step % run["args"]["save_every"] == 0 or step == steps:
        save(run, dataset, step, rows, nets, optimizer, scaler, process)


def save(run, dataset, step, rows, nets, optimizer, scaler, process):
    """The first process writes student_stageN.pt (the segmentation network alone, in stage 1
    "main"), the log, and last stageN.pt, the checkpoint.

    Each file is whole at any moment; a kill between two of them leaves a student that is newer
    than the checkpoint, until the next save. Ends the run instead of saving a number that is
    not finite; raises OSError if a file cannot be written.
    """
    if process.rank > 0:
        return
    require_finite(step, nets, optimizer)
    args, stage, classes = run["args"], run["stage"], run["classes"]
    folder = Path(args["out"])
    student = {key: args[key] for key in ("backbone", "width", "size")}
    student["network"] = nets["student" if stage == 2 else "main"].state_dict()
    student["classes"] = classes
    student["palette"] = dataset.palette[: len(classes)].tolist()
    student["crop"] = dataset.crop
    student["step"] = step
    checkpoint = dict(run, step=step, rows=rows, networks=nets.state_dict())
    del checkpoint["saved"]
    checkpoint["optimizer"] = optimizer.state_dict()
    checkpoint["scaler"] = scaler.state_dict()
    with replacing(folder / f"student_stage{stage}.pt") as file:
        torch.save(student, file)
    with replacing(folder / f"log_stage{stage}.csv") as file:
        file.write(csv_text(rows).encode())
    with replacing(folder / f"stage{stage}.pt") as file:
        torch.save(checkpoint, file)
    run["saved"] = time.monotonic()


def require_finite(step, nets, optimizer):
    """Ends the run if a weight, a statistic or a moment of AdamW is not finite."""
    tensors = [value for value in nets.state_dict().values() if value.is_floating_point()]
    for state in optimizer.state.values():
        tensors += state.values()
    if not torch.nn.utils.get_total_norm(tensors).isfinite():
        remedy = "a smaller --lr, with another --out, may help"
        sys.exit(f"a weight or moment is not finite after step {step}; {remedy}")


def log_row(step, terms, weight, process):
    """This process's {name: scalar tensor} -> numbers over the batch of all processes.

    Ends the run if one of them is not finite.
    """
    values = torch.stack([value.detach() for value in terms.values()])
    means = process.sum(weight * values) / process.world
    row = {"step": step, **dict(zip(terms, means.tolist()))}
    for name, value in row.items():
        if not math.isfinite(value):
            remedy = "a smaller --lr or --amp off, with another --out, may help"
            sys.exit(f"step {step}: {name} is {value}; {remedy}")
    return row


def progress(batches, rows, start, steps, process, pretrain_iters=0):
    """(step, batch) from start + 1 on, and what the first process shows of the training.

    It prints each row that the loop adds to `rows`, and the time left at the pace since the row
    before (a step after the pre-training takes about as long as four within). In between, a
    terminal has a line that renews itself every second, and a file or a pipe one line after the
    first five steps.
    """
    is_terminal = sys.stdout is not None and sys.stdout.isatty()
    clear_line = "\r\033[K" if is_terminal else ""
    line_end = "" if is_terminal else "\n"
    row_step = start
    row_time = shown = time.monotonic()
    for step, batch in enumerate(batches, start + 1):
        yield step, batch
        if process.rank > 0:
            continue
        now = time.monotonic()
        steps_left = steps - step
        if step < pretrain_iters:
            steps_left += 3 * (steps - pretrain_iters)
        left = duration((now - row_time) / (step - row_step) * steps_left)
        head = f"{clear_line}{step}/{steps}"
        if rows and rows[-1]["step"] == step:
            end = "" if step == steps else f"  {left}"
            print(f"{head}{row_text(rows[-1])}{end}", flush=True)
            if "wrong_0" in rows[-1] and "accepted" not in rows[-1]:  # the joint steps
                print(f"    {errors_text(rows[-1])}", flush=True)
            row_step = step
            row_time = shown = now
        elif step == start + 5 or (is_terminal and now - shown > 1):
            print(f"{head}  {left}", end=line_end, flush=True)
            shown = now


def row_text(row):
    """What the screen shows of a row of the log: the losses, what is accepted, and mIoU."""
    text = ""
    for name, value in row.items():
        if name.startswith("L_") or name in ("accepted", "mIoU", "mIoU_teacher"):
            text += f"  {name} {value:.3g}"
        if name == "accepted":
            shares = {key: row[key] for key in row if key.startswith("accepted_")}  # of classes
            least = min(shares, key=shares.get)
            text += f" ({least.split('_', 2)[2]} {shares[least]:.3g})"
            if value < 0.01:
                text += ", so almost no pseudo label counts"
    return text


def errors_text(row):
    """In words: the errors that Eq. (3) leaves to each decoder, and how ELN judges them."""
    decoders = []
    for name, value in row.items():
        if name.startswith("wrong_"):
            k = name.removeprefix("wrong_")
            decoder = "the main decoder" if k == "0" else f"D^{k}"
            decoders.append(f"{decoder} {100 * value:.1f} %")
    found = f"ELN finds {100 * row['eln_recall']:.0f} % of these"
    rightly = f"{100 * row['eln_precision']:.0f} % of what it rejects is wrong"
    return f"wrong pixels: {', '.join(decoders)}; {found}, and {rightly}"


def duration(seconds):
    """The time left: "about 40 s left", or in minutes, hours or days."""
    for unit, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * unit:
            return f"about {seconds / unit:.0f} {name} left"
    return f"about {seconds:.0f} s left"


# ---- Command line ----

# Where nothing else is said, a value is the released code's.
VOC = dict(
    ratio="1/20",  # the smallest of Sec. 4.2
    size=[512, 512],  # Sec. 4.2
    batch_size=6,  # Sec. 4.2
    pretrain_iters=18620,  # 70 times 266 steps
    eln_iters=13300,  # 50 times 266 steps
    lr=1e-4,  # Sec. 4.2
    backbone="resnet50",  # Sec. 4.1
    weights="imagenet",  # Sec. 4.1
    eln_backbone="resnet34",  # Sec. 4.1
    eln_weights="imagenet",  # Sec. 4.1
    width=256,  # DeepLabv3+'s
    workers=min(4, os.cpu_count()),  # ours
    save_every=1000,  # ours: some minutes
    eval_every=2660,  # ten times 266 steps
    alphas=[20.0, 50.0],  # Sec. 4.2
)
CITYSCAPES = dict(
    VOC,
    ratio="1/8",  # the smallest of Sec. 4.2
    size=[512, 1024],  # Sec. 4.2
    batch_size=4,  # Sec. 4.2
    pretrain_iters=26600,  # 100 times 266 steps
    eln_iters=15428,  # 58 times 266 steps
)
FOLDER = dict(  # ours, for a small set: about an hour on two CPU cores
    VOC,
    ratio=None,  # every image that has a mask is labelled
    size=[128, 128],
    batch_size=4,
    pretrain_iters=1500,
    eln_iters=300,
    lr=1e-3,
    backbone_lr=1e-4,  # its weights are good already
    backbone="resnet18",
    eln_backbone="resnet18",
    width=64,
    save_every=300,
    eval_every=300,
    alphas=[5.0, 10.0],  # as L_sup stays larger than in VOC's many steps
)
SHAPES = dict(  # ours: what two CPU cores do in a minute and a half
    ratio="1/20",
    size=[48, 48],
    batch_size=4,
    pretrain_iters=200,
    eln_iters=200,
    lr=1e-3,  # as the weights are random
    backbone="resnet18",
    weights="none",
    eln_backbone="resnet18",
    eln_weights="none",
    width=64,
    workers=0,
    save_every=1000,
    eval_every=1000,
    alphas=[4.0, 8.0],  # in few steps L_sup stays too large for 20 and 50, see Eq. (3)
)
DEFAULTS = {"voc": VOC, "cityscapes": CITYSCAPES, "folder": FOLDER, "shapes": SHAPES}


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """--help shows a file's docstring as it stands, and every option's default."""


def make_parser(doc):
    """A parser with the options that both stages have."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=Help, allow_abbrev=False)
    add = parser.add_argument
    rate = within(0, 1e9, float)
    seed = within(0, 2**32 - 1)
    add("--dataset", choices=DATASETS, default="shapes", help="it sets the other defaults")
    add("--ratio", help="labelled share of the training images, rounded down (Sec. 4.2); None: "
        "all that have a mask")
    add("--split", type=seed, default=0, help="which random subset; the paper has three")
    add("--batch-size", type=within(1), help="images of each kind a step, over all processes")
    add("--lr", type=rate, help="learning rate of AdamW (Sec. 4.2)")
    add("--backbone-lr", type=rate, help="of encoders, if not --lr (the released code: 1e-5)")
    add("--weight-decay", type=rate, default=1e-5, help="of AdamW (Sec. 4.2)")
    add("--seed", type=seed, default=0, help="of weights, order, augmentation and dropout")
    add(
        "--amp", choices=("auto", "off", "bfloat16", "float16"), default="auto",
        help="mixed precision; auto: off on a CPU, bfloat16 where the GPU has it, else float16",
    )
    add("--data", default="datasets", metavar="DIR", help="where the data set lies (README)")
    add("--unlabeled-list", metavar="FILE", help="ids of unlabelled images, not all others")
    add("--out", metavar="DIR", help="the run's folder; by default named after other options")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if any")
    add("--workers", type=within(0), help="processes that load data, per kind of images")
    add("--save-every", type=within(1), metavar="STEPS", help="between checkpoints")
    add("--eval-every", type=within(1), metavar="STEPS", help="between validations")
    add("--log-every", type=within(1), default=50, metavar="STEPS", help="between log rows")
    return parser


def parse_args(argv=None):
    """The command line of stage 1. It is parsed twice, as --dataset sets the defaults."""
    argv = sys.argv[1:] if argv is None else argv
    parser = make_parser(__doc__)
    add = parser.add_argument
    first_weights = "imagenet, none, or a torchvision state dict (Sec. 4.1)"
    add("--labeled-list", metavar="FILE", help="ids of labelled images, not --ratio, --split")
    add("--backbone", choices=BACKBONES, help="of the main network (Sec. 4.1)")
    add("--weights", help=f"its first weights: {first_weights}")
    add("--eln-backbone", choices=BACKBONES, help="of ELN (Sec. 4.1)")
    add("--eln-weights", help=f"ELN's first weights: {first_weights}")
    add("--width", type=within(1), help="channels of ASPP and decoders (DeepLabv3+: 256)")
    add("--size", type=within(32), nargs=2, metavar=("H", "W"), help="of views (Sec. 4.2)")
    add(
        "--alphas", type=within(0, 1e9, float), nargs="*",
        help="one for each auxiliary decoder, Eq. (3); none: K = 0",
    )
    add("--corrector", choices=("eln", "ecn"), default="eln", help="ELN, or s-ECN (Sec. 4.3)")
    add("--pretrain-iters", type=within(0), metavar="STEPS", help="with L_sup alone (Sec. 3.1)")
    add("--eln-iters", type=within(0), metavar="STEPS", help="with Eq. (7); 0: the baseline")
    given = parser.parse_args([word for word in argv if word not in ("-h", "--help")])
    parser.set_defaults(**DEFAULTS[given.dataset])
    args = parser.parse_args(argv)
    steps = args.pretrain_iters + args.eln_iters
    require(steps > 0, "--pretrain-iters and --eln-iters are 0: nothing to train")
    args.out = args.out or default_folder(args)
    return args


def default_folder(args):
    """runs/shapes-1_20-0, with -ecn for the s-ECN and -supervised for L_sup alone."""
    subset = "all"
    if args.labeled_list:
        subset = Path(args.labeled_list).stem
    elif args.ratio is not None:
        subset = f"{args.ratio.replace('/', '_')}-{args.split}"
    kind = "" if args.corrector == "eln" else "-ecn"
    if args.eln_iters == 0:
        kind = "-supervised"
    return f"runs/{args.dataset}-{subset}{kind}"


def run_script(name, parse_args, train):
    """Parse, join the other processes, train. Input that cannot be used ends in one line."""
    tolerant_output()
    try:
        args = parse_args()
        train(args, start_process(args))
        if dist.is_initialized():
            dist.destroy_process_group()
        return
    except (InputError, WeightsError) as error:
        line, code = one_line(error), 2
    except OSError as error:
        line, code = one_line(error), 1
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            line, code = "out of memory: try a smaller --batch-size or --size", 1
        elif "DataLoader worker" in str(error) or "shared memory" in str(error):
            remedy = "fewer --workers, or a larger /dev/shm (docker --shm-size)"
            line, code = f"a loader process died: try {remedy}", 1
        else:
            raise
    except KeyboardInterrupt:
        line, code = "interrupted; the same command goes on from the last checkpoint", 130
    print(f"{name}: {line}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    run_script("train_stage1.py", parse_args, train)

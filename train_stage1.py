"""Stage 1 (Sec. 3.1): the segmentation network, then auxiliary decoders and ELN with it, on labelled images.

    python train_stage1.py                                                   # `shapes`, on any machine
    torchrun --nproc_per_node=4 train_stage1.py --dataset voc --data DIR --ratio 1/20

First L_sup alone (--pretrain-iters), then L_labeled = L_sup + L_aux + L_ELN (--eln-iters). The same command
resumes an interrupted run. --eln-iters 0 leaves L_sup alone: the "Baseline" of Table 1.
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
    DATASETS, InputError, check_files, load_dataset, make_loader, normalize, one_line, replacing, require,
    share_of_batch, split_ids, within,
)
from eln import AuxiliaryNetworks, diagnosis, ecn_loss
from evaluate import FREE, fill, mean_iou, read_checkpoint, score
from losses import auxiliary_loss, eln_loss, labeled_loss, supervised_loss
from model import BACKBONES, DeepLabV3Plus, WeightsError

# Sec. 4.1, 4.2; steps are the released code's, contrast_pixels ours. It, iters, beta, lr_stage2: stage 2's.
VOC = dict(
    ratio="1/20", size=[512, 512], batch_size=6, pretrain_iters=18620, eln_iters=13300, iters=101080, lr=1e-4,
    backbone="resnet50", weights="imagenet", eln_backbone="resnet34", eln_weights="imagenet", width=256,
    contrast_pixels=4096, beta=0.995, workers=min(4, os.cpu_count()), save_every=1000, eval_every=2660,
)
DEFAULTS = {
    "voc": VOC,
    "folder": VOC,
    "cityscapes": dict(
        VOC, ratio="1/8", size=[512, 1024], batch_size=4, pretrain_iters=26600, eln_iters=15428, iters=90972
    ),
    "shapes": dict(  # ours; in few steps a teacher must follow sooner: beta; a student swing less: lr_stage2
        ratio="1/20", size=[48, 48], batch_size=8, pretrain_iters=200, eln_iters=50, iters=120, lr=1e-3,
        backbone="resnet18", weights="none", eln_backbone="resnet18", eln_weights="none", width=64,
        contrast_pixels=1024, beta=0.95, lr_stage2=3e-4, workers=0, save_every=200, eval_every=1000,
    ),
}


def train(args, rank, world, device):
    """Sec. 3.1: pre-training with L_sup, then L_labeled of Eq. (7)."""
    dataset = load_dataset(args.dataset, args.data)
    ids = split_ids(dataset, args.ratio, args.split, args.labeled_list, args.unlabeled_list)
    run = open_run(1, args, dataset, *ids, rank)
    C, steps = len(dataset.classes), args.pretrain_iters + args.eln_iters
    torch.manual_seed(args.seed)
    nets = nn.ModuleDict({"main": DeepLabV3Plus(C, args.backbone, args.weights, args.width)})  # E, D
    if args.eln_iters:
        nets["auxiliary"] = AuxiliaryNetworks(C, nets.main.encoder, args)  # D^k, ELN
    nets.main.decoder.proj.requires_grad_(False)  # Proj learns in stage 2
    main, auxiliary, optimizer, scaler, autocast = prepare(nets, args, world, device)
    start, rows = resume(run, steps, nets, optimizer, scaler, rank)
    size, n, place = args.size, args.batch_size, (start, steps, rank, world, args.workers)
    batches = make_loader(dataset, run["labeled"], size, True, n, (args.seed, 1, 0), *place)
    mine = share_of_batch(n, rank, world)
    share = world * (mine.stop - mine.start) / n  # DDP averages over processes: weigh each by its images
    eln_or_ecn_loss = {"eln": eln_loss, "ecn": ecn_loss}[args.corrector]

    for step, (image, label) in progress(batches, rows, start, steps, rank):
        torch.manual_seed(hash((args.seed, 1, step, rank)))  # dropout, the same when resumed
        image = normalize(image.to(device, non_blocking=True))
        label = label.to(device, non_blocking=True).long()
        nets.train()
        optimizer.zero_grad()
        with autocast:
            logits, _, encoded = main(image)  # D(E(X)): P before its softmax
        L_sup = supervised_loss(logits, label)  # Eq. (2)
        loss = L_sup
        row = {"L_sup": L_sup}
        if step > args.pretrain_iters:
            with autocast:
                aux_logits, valid_logits = auxiliary(image, logits, *encoded)  # P^k, B^k
            L_aux = auxiliary_loss(aux_logits, logits, label, args.alphas)  # Eq. (3)
            L_eln = eln_or_ecn_loss(valid_logits, [logits, *aux_logits], label)  # Eq. (6)
            loss = labeled_loss(L_sup, L_aux, L_eln)  # Eq. (7)
            row.update(L_aux=L_aux, L_eln=L_eln)
        scaler.scale(share * loss).backward()
        scaler.step(optimizer)
        scaler.update()
        same_statistics(nets, world, device)

        scored = step % args.eval_every == 0 or step == steps
        if step % args.log_every == 0 or scored:
            row = numbers(step, row, share, world)
            if step > args.pretrain_iters:
                row.update(diagnosis(logits, aux_logits, valid_logits, label, world))
            if scored:
                matrices = score(nets.main, dataset, args.size, device, rank, world, args.workers)
                row["mIoU"] = mean_iou(matrices["resized"])
            rows.append(row)
        if rank == 0 and (step % args.save_every == 0 or step == steps):
            save(run, dataset, step, rows, nets, optimizer, scaler)


# What follows serves both stages, and is not the paper's.


def open_run(stage, args, dataset, labeled, unlabeled, rank):
    """Refuse files that cannot be used. Returns the part of a checkpoint that tells runs apart."""
    for note in check_files(dataset, labeled, unlabeled, args.size):
        if rank == 0:
            print(note, flush=True)
    ids = {"labeled": labeled, "unlabeled": unlabeled}
    return {"stage": stage, "args": vars(args), **ids, "classes": list(dataset.classes)}


def prepare(nets, args, world, device):
    """To the device; processes that average gradients; AdamW of Sec. 4.2, which leaves alone what has no
    gradient yet; mixed precision. Returns main, auxiliary (or None) to call, optimizer, scaler, autocast."""
    gpu = device.type == "cuda"
    nets.to(device, memory_format=torch.channels_last if gpu else torch.contiguous_format)  # each the faster
    if world > 1 and gpu:
        nn.SyncBatchNorm.convert_sync_batchnorm(nets)
    encoders = [p for name, p in nets.named_parameters() if "encoder." in name and p.requires_grad]
    rest = [p for name, p in nets.named_parameters() if "encoder." not in name and p.requires_grad]
    rate = args.lr if args.backbone_lr is None else args.backbone_lr
    groups = [{"params": encoders, "lr": rate}, {"params": rest}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, weight_decay=args.weight_decay, fused=True)
    dtype = None if args.amp == "off" else getattr(torch, args.amp)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    autocast = torch.autocast(device.type, dtype, enabled=dtype is not None)
    called = [nets[name] if name in nets else None for name in ("main", "auxiliary")]
    if world > 1:
        warnings.filterwarnings("ignore", "`broadcast_buffers`")  # its successor came with PyTorch 2.13
        ddp = dict(broadcast_buffers=False, gradient_as_bucket_view=True)  # statistics are equal already
        called = [net and nn.parallel.DistributedDataParallel(net, **ddp) for net in called]
    return *called, optimizer, scaler, autocast


def same_statistics(nets, world, device):
    """On CPUs, which have no SyncBatchNorm, all take the first process's BatchNorm statistics."""
    if world > 1 and device.type == "cpu":
        for buffer in nets.buffers():
            dist.broadcast(buffer, 0)


def progress(batches, rows, start, steps, rank):
    """(step, batch) from start + 1 on. Prints each row that the loop adds to `rows` (the diagnosis is in the
    file), and in between, on a terminal, a line that renews itself every second."""
    renew = "\r\033[K" if sys.stdout.isatty() else ""
    began = shown = time.monotonic()
    for step, batch in enumerate(batches, start + 1):
        yield step, batch
        now, line = time.monotonic(), ""
        if rows and rows[-1]["step"] == step:
            names = [name for name in rows[-1] if name.startswith(("L_", "accepted", "mIoU"))]
            line = "".join(f"  {name} {rows[-1][name]:.3g}" for name in names) + "\n"
        elif renew and now - shown > 1:
            seconds = int((now - began) / (step - start) * (steps - step))
            line = f"  {seconds // 60}:{seconds % 60:02d} left"
        if line and rank == 0:
            print(f"{renew}{step}/{steps}{line}", end="", flush=True)
            shown = now


def numbers(step, row, share, world):
    """{name: scalar tensor} of this process -> numbers over the batch. Ends the run if one is not finite."""
    values = share * torch.stack([value.detach() for value in row.values()]) / world
    if world > 1:
        dist.all_reduce(values)
    row = {"step": step, **dict(zip(row, values.tolist()))}
    wrong = [f"{name} is {value}" for name, value in row.items() if not math.isfinite(value)]
    if wrong:
        sys.exit(f"step {step}: {', '.join(wrong)}; a smaller --lr or --amp off may help")
    return row


def resume(run, steps, nets, optimizer, scaler, rank):
    """Go on from the run's checkpoint, if there is one. Returns the steps done and the log's rows. Raises
    InputError if it was made with other arguments (but those of FREE), images or classes, or is in use."""
    path, start, rows = Path(run["args"]["out"]) / f"stage{run['stage']}.pt", 0, []
    path.parent.mkdir(parents=True, exist_ok=True)
    if rank == 0 and os.name == "posix":  # elsewhere two runs in one folder are not noticed
        import fcntl

        nets.lock = open(path.parent / ".lock", "ab")  # it ends with them, or the process; no loader holds it
        try:
            fcntl.lockf(nets.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"another process is training in {path.parent}; use another --out") from None
    if path.exists():
        state = read_checkpoint(path, (*run, "step", "rows", "networks", "optimizer", "scaler"), run["stage"])
        differ = [
            f"--{key.replace('_', '-')} {state['args'].get(key)}, but this command has {value}"
            for key, value in run["args"].items() if key not in FREE and state["args"].get(key) != value
        ]
        differ += [f"other {key}" for key in ("labeled", "unlabeled", "classes") if state[key] != run[key]]
        if differ:
            raise InputError(f"{path} was made with {differ[0]}; give the same to go on, or another --out")
        fill(nets, state["networks"], path)
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        start, rows = state["step"], state["rows"]
    if rank == 0:
        done = f"is finished ({steps} steps)" if start == steps else f"begins after {start} of {steps} steps"
        images = f"{len(run['labeled'])} labelled, {len(run['unlabeled'])} unlabelled images"
        print(f"{path} {done}; {images}", flush=True)
    return start, rows


def save(run, dataset, step, rows, nets, optimizer, scaler):
    """The student alone, the log, and last the checkpoint; each is whole at any moment. Ends the run instead
    of saving a number that is not finite; raises OSError if a file cannot be written."""
    args, classes = run["args"], run["classes"]
    names = {"networks": nets, "optimizer": optimizer, "scaler": scaler}
    parts = {name: part.state_dict() for name, part in names.items()}
    moments = (value for state in parts["optimizer"]["state"].values() for value in state.values())
    finite = [value.isfinite().all() for value in (*parts["networks"].values(), *moments)]
    if not torch.stack(finite).all():
        sys.exit(f"a weight or moment is not finite after step {step}; a smaller --lr may help")
    student = {key: args[key] for key in ("backbone", "width", "size")}
    palette = dataset.palette[: len(classes)].tolist()
    student.update(network=nets.main.state_dict(), classes=classes, crop=dataset.crop, palette=palette)
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, *([row.get(name, "") for name in names] for row in rows)]
    with replacing(Path(args["out"]) / f"student_stage{run['stage']}.pt") as file:
        torch.save(student, file)
    with replacing(Path(args["out"]) / f"log_stage{run['stage']}.csv") as file:
        file.write("".join(",".join(map(str, line)) + "\n" for line in lines).encode())
    with replacing(Path(args["out"]) / f"stage{run['stage']}.pt") as file:
        torch.save({**run, "step": step, "rows": rows, **parts}, file)


def start_process(args):
    """Join torchrun's processes, if any, and settle --amp auto. Returns rank, number of processes, device."""
    rank, local = (int(os.environ.get(key, 0)) for key in ("RANK", "LOCAL_RANK"))
    world = int(os.environ.get("WORLD_SIZE", 1))
    require(world <= args.batch_size, f"--batch-size {args.batch_size} is too small for {world} processes")
    gpus = 0 if args.device == "cpu" else torch.cuda.device_count()
    enough = gpus > local if gpus else args.device != "cuda"
    require(enough, f"--device {args.device}: {gpus} GPUs for {local + 1} processes; use --device cpu")
    device = torch.device("cuda", local) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True  # sizes are fixed in training
    if args.amp == "auto":
        native = gpus and torch.cuda.is_bf16_supported(including_emulation=False)
        args.amp = "off" if not gpus else "bfloat16" if native else "float16"
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return rank, world, device


def run_script(name, parse_args, train):
    """Parse, join the other processes, train. Exit code 2: one line says which input cannot be used."""
    sys.stdout.reconfigure(errors="replace")  # a name that the terminal's encoding lacks
    try:
        args = parse_args()
        train(args, *start_process(args))
        if dist.is_initialized():
            dist.destroy_process_group()
        return
    except (InputError, WeightsError, OSError) as error:
        line, code = one_line(error), 1 if isinstance(error, OSError) else 2
    except RuntimeError as error:
        if "DataLoader worker" not in str(error) and "shared memory" not in str(error):
            raise
        line, code = "a loader process died: try fewer --workers, or a larger /dev/shm (docker --shm-size)", 1
    except KeyboardInterrupt:
        line, code = "interrupted; the same command goes on from the last checkpoint", 130
    print(f"{name}: {line}", file=sys.stderr)
    sys.exit(code)


def make_parser(doc):
    """A parser with the options of both stages, whose --help shows the file's docstring and the defaults."""
    both = argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter
    formatter = type("Formatter", both, {})
    parser = argparse.ArgumentParser(description=doc, formatter_class=formatter, allow_abbrev=False)
    add, rate, seed = parser.add_argument, within(0, 1e9, float), within(0, 2**32 - 1)
    add("--dataset", choices=DATASETS, default="shapes", help="in stage 1 it sets the other defaults")
    add("--ratio", help="labelled share of the training images, rounded down (Sec. 4.2)")
    add("--split", type=seed, default=0, help="which seeded subset; the paper averages three (Table 1)")
    add("--batch-size", type=within(1), help="images a step over all processes, of each kind (Sec. 4.2)")
    add("--lr", type=rate, help="learning rate of AdamW (Sec. 4.2)")
    add("--backbone-lr", type=rate, help="of the encoders, if another than --lr (the released code: 1e-5)")
    add("--weight-decay", type=rate, default=1e-5, help="of AdamW (Sec. 4.2)")
    add("--seed", type=seed, default=0, help="of weights, order, augmentation and dropout")
    add("--amp", choices=("auto", "off", "bfloat16", "float16"), default="auto",
        help="mixed precision; auto: off on a CPU, bfloat16 where the GPU has it, else float16")
    add("--data", default="datasets", metavar="DIR", help="where the data set lies (README)")
    add("--out", metavar="DIR", help="the run's folder; its default follows from the other options")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda if there is one")
    add("--workers", type=within(0), help="processes that load data, per kind of images and process")
    add("--save-every", type=within(1), metavar="STEPS", help="between checkpoints")
    add("--eval-every", type=within(1), metavar="STEPS", help="between validations")
    add("--log-every", type=within(1), default=50, metavar="STEPS", help="between rows of the log")
    return parser


def parse_args(argv=None):
    """The command line of stage 1. It is parsed twice: the defaults follow from --dataset."""
    argv = sys.argv[1:] if argv is None else argv
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--labeled-list", metavar="FILE", help="ids of the labelled images, instead of --ratio and --split")
    add("--unlabeled-list", metavar="FILE", help="ids of the unlabelled images, instead of all others")
    add("--backbone", choices=BACKBONES, help="of the main network (Sec. 4.1)")
    add("--weights", help="its first weights: imagenet, none, or a torchvision state dict (Sec. 4.1)")
    add("--eln-backbone", choices=BACKBONES, help="of ELN (Sec. 4.1)")
    add("--eln-weights", help="ELN's first weights: imagenet, none, or a torchvision state dict (Sec. 4.1)")
    add("--width", type=within(1), help="channels of ASPP and decoders; 256 in DeepLabv3+ (Sec. 4.1)")
    add("--size", type=within(32), nargs=2, metavar=("H", "W"), help="of training images or crops (Sec. 4.2)")
    add("--alphas", type=within(0, 1e9, float), nargs="*", default=[20.0, 50.0], help="one per D^k, Eq. (3)")
    add("--corrector", choices=("eln", "ecn"), default="eln", help="ELN, or the s-ECN of Table 3 (Sec. 4.3)")
    add("--pretrain-iters", type=within(0), metavar="STEPS", help="with L_sup alone (Sec. 3.1)")
    add("--eln-iters", type=within(0), metavar="STEPS", help="with L_labeled, Eq. (7); 0: the baseline")
    given = parser.parse_args([word for word in argv if word not in ("-h", "--help")])
    defaults = DEFAULTS[given.dataset]
    parser.set_defaults(**{key: value for key, value in defaults.items() if hasattr(given, key)})
    args = parser.parse_args(argv)
    require(args.pretrain_iters + args.eln_iters, "--pretrain-iters and --eln-iters are 0: nothing to train")
    subset = Path(args.labeled_list).stem if args.labeled_list else f"{args.ratio}-{args.split}"
    kind = "-supervised" if not args.eln_iters else "-ecn" if args.corrector == "ecn" else ""
    args.out = args.out or f"runs/{args.dataset}-{subset.replace('/', '_')}{kind}"
    return args


if __name__ == "__main__":
    run_script("train_stage1.py", parse_args, train)

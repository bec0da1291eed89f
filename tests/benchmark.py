"""Seconds and memory of training, Eq. (10), loader and evaluation, as Markdown. Not a test; CI leaves it out.

    python tests/benchmark.py                                          # small networks, for a CPU
    python tests/benchmark.py --device cuda --amp bfloat16 --workers 4 --backbone resnet50 \
        --eln-backbone resnet34 --width 256 --size 512 512 --batch-size 6 --sizes 4096 98304

Steps are those of the scripts, run as a user runs them, on JPEG images drawn here; their seconds are without
the rows of the log. Seconds are medians after warm-up; a FLOP is an addition or a multiplication.
"""

import argparse
import contextlib
import csv
import io
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from data import load_dataset, make_loader  # noqa: E402
from evaluate import score  # noqa: E402
from losses import contrastive_loss, supervised_loss  # noqa: E402
import train_stage1  # noqa: E402
import train_stage2  # noqa: E402
from train_stage1 import AMP_TYPES, make_networks  # noqa: E402
from train_stage2 import ROWS  # noqa: E402

C = 21
WARM_UP = 2  # rows of a log, or calls


def table(title, head, rows):
    print(f"\n{title}\n\n| {' | '.join(head)} |\n|{' --- |' * len(head)}", flush=True)
    for row in rows:
        cells = [x if isinstance(x, str) else f"{x:.3g}" if x < 1000 else f"{x:,.0f}" for x in row]
        print(f"| {' | '.join(cells)} |", flush=True)


def draw_images(folder, number, size):
    """The layout of --dataset folder: smooth noise, masks of squares; the last two images for validation."""
    rng = np.random.default_rng(0)
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    for i in range(number):
        coarse = Image.fromarray(rng.integers(0, 256, (size[0] // 8, size[1] // 8, 3), dtype=np.uint8))
        coarse.resize(size[::-1], Image.Resampling.BICUBIC).save(folder / f"images/{i}.jpg", quality=90)
        coarse = Image.fromarray(rng.integers(0, C, (size[0] // 32, size[1] // 32), dtype=np.uint8))
        coarse.resize(size[::-1], Image.Resampling.NEAREST).save(folder / f"masks/{i}.png")
    (folder / "train.txt").write_text("\n".join(map(str, range(number - 2))))
    (folder / "val.txt").write_text(f"{number - 2}\n{number - 1}\n")
    (folder / "classes.txt").write_text("\n".join(f"class{c}" for c in range(C)))


def run_script(args, script, out, *options, processes=1, threads=None):
    """Run a script to its end. Returns its log's rows, and its entry of result.json."""
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
    environment = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    command = [*start, ROOT / script, "--out", out, "--device", args.device, "--amp", args.amp, *options]
    done = subprocess.run([str(part) for part in command], env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    stage = "stage1" if "1" in script else "stage2"
    with open(out / f"log_{stage}.csv") as file:
        return list(csv.DictReader(file)), json.loads((out / "result.json").read_text())[stage]


def options_of(args, work, steps, every):
    """The command lines of the two stages, `steps` of each of their three kinds, without --out."""
    common = ["--log-every", every, "--eval-every", 10**6, "--workers", args.workers]
    options = ["--dataset", "folder", "--data", work / "data", "--ratio", "1/2", "--weights", "none"]
    options += ["--eln-weights", "none", "--backbone", args.backbone, "--eln-backbone", args.eln_backbone]
    options += ["--width", args.width, "--size", *args.size, "--batch-size", args.batch_size]
    options += ["--pretrain-iters", steps, "--eln-iters", steps]
    return options + common, ["--iters", steps, "--contrast-pixels", args.contrast_pixels, *common]


def median_seconds(rows):
    return statistics.median(1 / float(row["steps/s"]) for row in rows[WARM_UP:])


def train_both(args, work, name, **how):
    """Seconds a step of pre-training, joint training and stage 2, and peak GiB of the two stages."""
    every = 1 if args.device == "cpu" else 10
    steps, out = every * (WARM_UP + args.repeats), work / name
    one, two = options_of(args, work, steps, every)
    one, result1 = run_script(args, "train_stage1.py", out, *one, **how)
    two, result2 = run_script(args, "train_stage2.py", out, "--stage1", out / "stage1.pt", *two, **how)
    half = len(one) // 2
    seconds = [median_seconds(rows) for rows in (one[:half], one[half:], two)]
    return seconds, [result["peak_memory_gib"] for result in (result1, result2)]


def waiting(args, work):
    """Steps with the loader, and with its first batch kept in memory."""
    every, stages = 10, ((train_stage1, "stage1"), (train_stage2, "stage2"))
    steps, out = every * (WARM_UP + args.repeats), work / "kept"
    device, rows = torch.device(args.device), []
    for (module, stage), options in zip(stages, options_of(args, work, steps, every)):
        options = [*options, "--device", args.device, "--amp", args.amp]
        options += ["--stage1", out / "stage1.pt"] if stage == "stage2" else ["--eln-iters", "1"]
        loader, seconds = module.make_loader, []
        for kept in (False, True):
            argv = [str(x) for x in [*options, "--out", f"{out}-{stage}" if kept else out]]
            if kept:
                module.make_loader = lambda *a, **how: itertools.repeat(next(iter(loader(*a, **how))))
            with contextlib.redirect_stdout(io.StringIO()):
                module.train(module.parse_args(argv), 0, 1, device)
            with open(Path(argv[-1]) / f"log_{stage}.csv") as file:
                seconds.append(median_seconds(list(csv.DictReader(file))[: steps // every]))
        rows.append(("pre-training" if stage == "stage1" else "stage 2", *seconds, seconds[0] / seconds[1]))
    table("Seconds a step", ["step", "with the loader", "batch in memory", "ratio"], rows)


def timed(args, call):
    """Median seconds of call()."""
    seconds = []
    for _ in range(WARM_UP + args.repeats):
        began = time.perf_counter()
        call()
        if args.device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[WARM_UP:])


def gigabytes_of(args, call):
    """GiB that call() takes at most, beyond what is there before; nan where it cannot be told."""
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**30
    try:
        def resident(field):
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) for line in lines if line.startswith(field))

        Path("/proc/self/clear_refs").write_text("5")  # Linux: the highest value begins anew
        before = resident("VmRSS")
        call()
        return (resident("VmHWM") - before) / 2**20
    except OSError:
        return float("nan")


def reference_seconds(args, images):
    """A training step of torchvision's deeplabv3_resnet50, AdamW and cross-entropy."""
    network = torchvision.models.segmentation.deeplabv3_resnet50(weights_backbone=None, num_classes=C)
    network = network.to(args.device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(network.parameters())
    X = torch.randn(images, 3, *args.size, device=args.device)
    Y = torch.randint(C, (images, *args.size), device=args.device)

    def step():
        kind = AMP_TYPES[args.amp]
        with torch.autocast(args.device, kind, enabled=kind is not None):
            logits = network(X)["out"]
        optimizer.zero_grad(set_to_none=True)
        supervised_loss(logits, Y).backward()
        optimizer.step()

    return timed(args, step)


def flops_of(call, backward=True):
    with FlopCounterMode(display=False) as counter:
        out = call()
        if backward:
            sum(x.sum() for x in out if x is not None).backward()
    return counter.get_total_flops()


def paper_flops(args):
    """FLOPs of the paper's passes in a step of pre-training, joint training, stage 2: counted, not run."""
    B, (H, W) = args.batch_size, args.size
    with torch.device("meta"):
        nets = make_networks(C, args)
        X, x = torch.empty(B, 3, H, W), torch.empty(B, 3 + C + 1, H, W)
        low, high = (x.detach() for x in nets.main.encoder(X))
        main = flops_of(lambda: nets.main(X)[:1])
        aux = flops_of(lambda: nets.auxiliary.decoders[0](low, high, (H, W)))
        eln = flops_of(lambda: [nets.auxiliary.eln(x)])
        student = flops_of(lambda: nets.main(X, embed=True)[:2])
        labels = flops_of(lambda: nets.main(X, embed=True), backward=False)
        labels += flops_of(lambda: nets.auxiliary.eln(x), backward=False)
    K = len(args.alphas)
    joint = main + K * aux + (K + 1) * eln
    return main, joint, joint + student + labels


def convolution_rate(args):
    """FLOP/s of a decoder's 3x3 convolution at stride 4, forward and backward."""
    kind, n = AMP_TYPES[args.amp] or torch.float32, 10
    conv = torch.nn.Conv2d(args.width, args.width, 3, padding=1, bias=False, device=args.device, dtype=kind)
    conv = conv.to(memory_format=torch.channels_last)
    shape = args.batch_size, args.width, args.size[0] // 4, args.size[1] // 4
    x = torch.randn(shape, device=args.device, dtype=kind).to(memory_format=torch.channels_last)
    x, gradient = x.requires_grad_(), torch.ones_like(x)

    def call():
        for _ in range(n):
            torch.autograd.grad(conv(x), (x, conv.weight), gradient)

    return n * flops_of(lambda: [conv(x)]) / timed(args, call)


def steps(args, work):
    seconds, memory = train_both(args, work, "run")
    floor, rate = paper_flops(args), convolution_rate(args)
    one, two = (reference_seconds(args, images) for images in (args.batch_size, 2 * args.batch_size))
    rows = [
        (name, s, s / reference, f / 1e9, s * rate / f, gib)
        for name, s, reference, f, gib in zip(
            ("pre-training", "stage 1", "stage 2"), seconds, (one, one, two), floor, ("", *memory)
        )
    ]
    head = ["step", "seconds", "over torchvision's", "GFLOP", "over its convolutions'", "peak GiB"]
    table(
        "A step: seconds; over those of torchvision's deeplabv3_resnet50 on as many images; over those that "
        f"the paper's FLOPs take at the rate of one 3x3 convolution, {rate / 1e9:.0f} GFLOP/s", head, rows
    )


def scaling(args, work):
    rows = [("1 process, 2 threads", *train_both(args, work, "one", threads=2)[0])]
    rows.append(("2 processes, 1 thread each", *train_both(args, work, "two", processes=2, threads=1)[0]))
    table("Seconds a step", ["processes", "pre-training", "stage 1", "stage 2"], rows)


def product_rate(args):
    """FLOP/s of the product of 4,096 features with as many."""
    f = torch.randn(4096, 128, device=args.device)
    return 2 * 4096 * 4096 * 128 / timed(args, lambda: f @ f.T)


def contrast(args, work):
    rows, rate = [], product_rate(args)
    for n in args.sizes:
        f = torch.randn(n, 128, device=args.device, requires_grad=True)
        f_t, label = torch.randn(n, 128, device=args.device), torch.randint(C, (n,), device=args.device)
        error = ""
        if n <= 5000:
            exact = f.detach().double().requires_grad_()
            contrastive_loss(exact, f_t.double(), label, label, chunk=ROWS).backward()
            contrastive_loss(f, f_t, label, label, chunk=ROWS).backward()
            error = float((f.grad - exact.grad).abs().max() / exact.grad.abs().max())
        for chunk in (ROWS, 4 * ROWS, None):
            if chunk is None and n > 20000:
                continue

            def call():
                f.grad = None
                contrastive_loss(f, f_t, label, label, chunk=chunk).backward()

            began = time.perf_counter()
            memory = gigabytes_of(args, call)
            seconds = time.perf_counter() - began
            if seconds < 10:  # else once has to do
                seconds = timed(args, call)
            products = (2 if chunk is None else 3) * 2 * n * n * 128  # keys have no gradient
            rows.append((str(n), str(chunk), seconds, memory, seconds * rate / products, error))
    head = ["pixels", "chunk", "seconds", "extra GiB", "over its products", "gradient's error"]
    table(
        "Eq. (10), forward and backward; over the time of its products alone, at the rate of one, "
        f"{rate / 1e9:.0f} GFLOP/s; largest error of a gradient against float64, over the largest gradient",
        head, rows
    )


def saved_gib(call):
    """GiB that autograd keeps for the backward pass of call(), each storage once; and what call() returns."""
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[id(storage)] = storage  # held, so that its id stays its own
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    return sum(storage.nbytes() for storage in kept.values()) / 2**30, result


def memory(args, work):
    """Counted on tensors without memory: which part of a step holds what at the paper's settings."""
    rows = []
    paper = argparse.Namespace(**{**vars(args), "eln_backbone": "resnet34", "width": 256})
    settings = itertools.product(
        (("VOC, 6 x 512x512", 6, (512, 512)), ("Cityscapes, 4 x 512x1024", 4, (512, 1024))),
        ("resnet50", "resnet101"), ("off", "bfloat16"),
    )
    for (name, B, size), paper.backbone, amp in settings:
        with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16, enabled=amp == "bfloat16"):
            nets, X = make_networks(C, paper), torch.empty(B, 3, *size)
            main, auxiliary = (sum(p.nbytes for p in nets[key].parameters()) for key in ("main", "auxiliary"))
            labelled, (logits, _, encoded) = saved_gib(lambda: nets.main(X))
            decoders, _ = saved_gib(
                lambda: [decoder(*(x.detach() for x in encoded), size) for decoder in nets.auxiliary.decoders]
            )
            judged, _ = saved_gib(lambda: nets.auxiliary(X, logits, *encoded))
            perturbed, _ = saved_gib(lambda: nets.main(X, embed=True)[:2])
        static = (4 * (main + auxiliary) + main) / 2**30  # weights, gradients, two moments; the teacher
        largest = static + max(labelled, judged, perturbed)
        parts = (static, labelled, decoders, judged - decoders, perturbed, largest)
        rows.append((f"{name}, {paper.backbone}", amp, *parts))
    head = ["setting", "amp", "weights and AdamW", "X", "K decoders", "ELN", "A.X", "largest sum"]
    table(
        "GiB that each backward pass of stage 2 keeps, counted, not measured. The decoders' and ELN's is one "
        "pass, the others come before and after it; what a kernel needs for itself is not in it", head, rows
    )


def loading(args, work):
    dataset = load_dataset("folder", work / "data")
    rows = []
    for workers in (0, args.workers) if args.workers else (0,):
        for labeled in (True, False):
            warm_up = WARM_UP + 2 * workers  # workers run ahead
            number = warm_up + 10 * args.repeats
            of_steps = (0, 1, 0), 0, number  # seeds; first and last step
            batches = iter(make_loader(
                dataset, dataset.train, args.size, labeled, args.batch_size, *of_steps, workers=workers
            ))
            for _ in range(warm_up):
                next(batches)
            began = time.perf_counter()
            images = sum(args.batch_size for _ in batches)
            kind = "labelled" if labeled else "unlabelled, two views"
            rows.append((kind, str(workers), images / (time.perf_counter() - began)))
    table("The loader alone", ["images", "workers", "images/s"], rows)
    began = time.perf_counter()
    command = [sys.executable, ROOT / "train_stage1.py", "--log-every", "1", "--out", work / "start"]
    command += ["--device", args.device]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        if any(line.startswith("1/") for line in process.stdout):
            seconds = time.perf_counter() - began
            print(f"\nFrom the command to the end of the first step of `shapes`: {seconds:.1f} s")
        process.kill()


def evaluation(args, work):
    rows, device = [], torch.device(args.device)
    network = make_networks(C, args, auxiliary=False).main.to(device, memory_format=torch.channels_last)
    for size in (args.size, [1024, 2048]):
        folder = work / f"evaluation-{size[0]}"
        draw_images(folder, 3, size)
        dataset = load_dataset("folder", folder)

        def call():
            score(network, dataset, size, device)

        call()
        memory, seconds = gigabytes_of(args, call), timed(args, call)
        rows.append((f"{size[0]}x{size[1]}", len(dataset.val) / seconds, memory))
    table("Evaluation", ["size", "images/s", "extra GiB"], rows)


PARTS = {part.__name__: part for part in (steps, memory, scaling, contrast, loading, waiting, evaluation)}


def main():
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; default: all, scaling on a CPU only")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--amp", choices=AMP_TYPES, default="off")
    add("--backbone", default="resnet18")
    add("--eln-backbone", default="resnet18")
    add("--width", type=int, default=64)
    add("--size", type=int, nargs=2, default=[128, 128], metavar=("H", "W"))
    add("--batch-size", type=int, default=4)
    add("--contrast-pixels", type=int, default=1024)
    add("--sizes", type=int, nargs="+", default=[1024, 4096, 16384], help="pixels of Eq. (10)")
    add("--workers", type=int, default=0)
    add("--repeats", type=int, default=5)
    args = parser.parse_args()
    args.weights, args.eln_weights, args.alphas, args.corrector = "none", "none", [20.0, 50.0], "eln"
    machine = torch.cuda.get_device_name() if args.device == "cuda" else platform.machine()
    print(f"{machine}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}, "
          f"torchvision {torchvision.__version__}; {' '.join(sys.argv[1:])}")
    parts = args.parts or [name for name in PARTS if name != "scaling" or args.device == "cpu"]
    with tempfile.TemporaryDirectory() as work:
        draw_images(Path(work) / "data", 26, args.size)
        for name in parts:
            PARTS[name](args, Path(work))


if __name__ == "__main__":
    main()

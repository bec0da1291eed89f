"""Seconds, memory and FLOPs of training steps and of Eq. (10), as Markdown. Not a test; CI leaves it out.

    python tests/benchmark.py                                          # small networks, for a CPU
    python tests/benchmark.py --device cuda --amp bfloat16 --workers 4 --backbone resnet50 \
        --eln-backbone resnet34 --width 256 --size 512 512 --batch-size 6 --contrast-pixels 4096

Seconds are medians after warm-up, on a GPU of ten steps at a time; a FLOP is an addition or a multiplication.
"""

import statistics
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from itertools import product
from pathlib import Path
from unittest import mock

import torch
from torch._subclasses import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.functional import conv2d, interpolate, normalize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.segmentation import deeplabv3_resnet50

sys.path.insert(0, str(Path(__file__).parents[1]))
import losses  # noqa: E402
import train_stage1  # noqa: E402
import train_stage2  # noqa: E402
from data import VOID, Process  # noqa: E402
from eln import AuxiliaryNetworks, eln_input  # noqa: E402
from model import DeepLabV3Plus  # noqa: E402

WARM_UP = 2  # groups of steps, or of calls


def table(title, head, rows):
    """Print a Markdown table; numbers with three digits."""
    print(f"\n{title}\n\n| {' | '.join(head)} |\n|{' --- |' * len(head)}")
    for row in rows:
        cells = (x if isinstance(x, str) else f"{x:.3g}" if x < 1000 else f"{x:,.0f}" for x in row)
        print(f"| {' | '.join(cells)} |", flush=True)


def now(args):
    """The time, once a GPU has done its work; the most GiB that its tensors took since the last call."""
    if args.device == "cpu":
        return time.perf_counter(), float("nan")
    torch.cuda.synchronize()
    gib = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return time.perf_counter(), gib


def medians(args, marks):
    """now() before, between and after groups of steps -> median seconds a step, most GiB; after warm-up."""
    times, gib = zip(*marks[WARM_UP:])
    return statistics.median(b - a for a, b in zip(times, times[1:])) / args.group, max(gib[1:])


def measured(args, call):
    """Median seconds of call(), and the most GiB on a GPU."""
    groups = ([call() for _ in range(args.group)] for _ in range(WARM_UP + args.repeats))
    return medians(args, [now(args), *(now(args) for _ in groups)])


class Count(TorchDispatchMode):
    """Counts operations, and the most bytes of tensors alive at any moment, those of before included."""

    def __init__(self, tensors):
        super().__init__()
        self.operations, self.most, self.alive = 0, 0, {}  # alive: {storage: (weak reference, bytes)}
        torch.utils._pytree.tree_map_only(torch.Tensor, self.add, tensors)

    def add(self, tensor):
        storage = tensor.untyped_storage()
        self.alive.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.alive = {key: value for key, value in self.alive.items() if not value[0].expired()}
        torch.utils._pytree.tree_map_only(torch.Tensor, self.add, out)
        self.most = max(self.most, sum(nbytes for _, nbytes in self.alive.values()))
        self.operations += 1
        return out


def counted(step, nets, optimizer, *rest):
    """FLOPs, operations and most GiB of tensors of one step(nets, optimizer, *rest)."""
    held = [*nets.parameters(), *nets.buffers(), *optimizer.state.values()]
    with Count(held) as count, FlopCounterMode(display=False) as flops:
        step(nets, optimizer, *rest)
    return flops.get_total_flops(), count.operations, count.most / 2**30


def make_networks(args, real=True):
    """Student, teacher, decoders and ELN; an optimizer that has its moments; a batch; args."""
    torch.manual_seed(0)
    with torch.device(args.device):
        student, teacher = (DeepLabV3Plus(args.classes, args.backbone, "none", args.width) for _ in range(2))
        auxiliary = AuxiliaryNetworks(args.classes, student.encoder, args)
        nets = torch.nn.ModuleDict({"student": student, "teacher": teacher, "auxiliary": auxiliary})
        images = [torch.randn(args.batch_size, 3, *args.size) for _ in range(3)]
        label = torch.randint(args.classes, (args.batch_size, *args.size))
    if real and args.device != "cpu":  # as in the scripts; tensors without memory refuse it
        nets.to(memory_format=torch.channels_last)
    teacher.requires_grad_(False).eval()
    learning = [*student.parameters(), *auxiliary.parameters()]
    for p in learning:
        p.grad = torch.zeros_like(p)
    optimizer = torch.optim.AdamW(learning, lr=1e-4, fused=True)
    optimizer.step()  # gives it its moments
    return nets, optimizer, images, label, args


def our_step(nets, optimizer, images, label, args, kind="stage 2", passes=2, contrast=True):
    """A step as the scripts do it. passes=3: L_sup has a backward pass of its own."""
    image, image_u, image_a = images
    student = nets["student"]
    if kind == "stage 2":
        teacher, auxiliary = nets["teacher"], nets["auxiliary"]
        with args.autocast:
            labels = train_stage2.make_pseudo_labels(teacher, auxiliary.eln, image_u, args)
    optimizer.zero_grad()
    with args.autocast:
        logits, _, encoded = student(image)
    loss = losses.supervised_loss(logits, label)
    if kind != "pre-training":
        if passes == 3:
            loss = loss.backward() or 0
        with args.autocast:
            aux_logits, valid_logits = nets["auxiliary"](image, logits, *encoded)
        loss = loss + losses.auxiliary_loss(aux_logits, logits, label, args.alphas)
        loss = loss + losses.eln_loss(valid_logits, [logits, *aux_logits], label)
    loss.backward()
    if kind == "stage 2":
        pseudo_label, valid, f_t = labels
        with args.autocast:
            logits, f, _ = student(image_a, embed=True)
        loss = losses.pseudo_label_loss(logits, pseudo_label, valid) + 0 * f.sum()
        if contrast:
            process = Process(device=torch.device(args.device))
            *pixels, _ = train_stage2.pixels_of_V(f, f_t, pseudo_label, valid, args, 1, process)
            loss = loss + losses.contrastive_loss(*pixels)
        loss.backward()
        losses.ema_update(teacher, student)
    optimizer.step()


def released_step(nets, optimizer, images, label, args):
    """A stage 2 step as the released code is built. Facts: the student's encoder runs five times, ELN once
    for each of four predictions; the teacher is in train mode; pseudo labels and mask are of stride 4;
    both views learn. Guesses: two of the five are for the auxiliary decoders; one backward pass for all."""
    (image, image_u, image_a), student, auxiliary = images, nets["student"], nets["auxiliary"]
    teacher = nets["teacher"].train()
    optimizer.zero_grad()
    with args.autocast:
        with torch.no_grad():
            logits_t, feature_t, (low, _) = teacher(image_u, embed=True)
            B_u = auxiliary.eln(eln_input(image_u, logits_t))
            again = [student.encoder(image) for _ in args.alphas]
        predictions = [student(image)[0]]
        predictions += [D(*e, image.shape[2:])[0] for D, e in zip(auxiliary.decoders, again)]
        valid_logits = [auxiliary.eln(eln_input(image, P)) for P in predictions]
        views = [student.decoder(*student.encoder(x), low.shape[2:], True) for x in (image_u, image_a)]
    pseudo_label = interpolate(logits_t, low.shape[2:], mode="bilinear").argmax(dim=1)
    valid = interpolate(B_u[:, None], low.shape[2:], mode="bilinear")[:, 0] > 0
    loss = losses.supervised_loss(predictions[0], label) + losses.eln_loss(valid_logits, predictions, label)
    loss = loss + losses.auxiliary_loss(predictions[1:], predictions[0], label, args.alphas)
    for logits, feature in views:
        loss = loss + losses.pseudo_label_loss(logits, pseudo_label, valid)
        loss = loss + contrast_of_crops(feature, feature_t, pseudo_label.masked_fill(~valid, VOID))
    loss.backward()
    optimizer.step()
    for average, weight in zip(teacher.parameters(), student.parameters()):
        average.mul_(0.995).add_(weight.detach(), alpha=0.005)


def contrast_of_crops(feature, feature_t, label):
    """One log of pooled sums for each of 8 crops (of one image: a guess) and class; the teacher anchors."""
    (B, h, w), total = label.shape, 0 * feature.float().sum()
    n = min(32, h, w)
    for _ in range(8):
        b, i, j = (int(torch.randint(end, ())) for end in (B, h - n + 1, w - n + 1))
        Y, f, f_t = (x[b, ..., i : i + n, j : j + n].flatten(-2) for x in (label, feature, feature_t))
        for c in Y[Y != VOID].unique():
            d = (normalize(f_t[:, Y == c].float(), dim=0).T @ normalize(f.float(), dim=0) / 0.5).exp()
            total = total - (d[:, Y == c].sum() / d[:, Y != VOID].sum()).log() / (Y == c).sum() / 8
    return total


def torchvision_seconds(args, images):
    """A training step of torchvision's deeplabv3_resnet50."""
    network = deeplabv3_resnet50(weights_backbone=None).to(args.device, memory_format=torch.channels_last)
    forward, network.forward = network.forward, lambda image: (forward(image)["out"], None, None)
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    image = torch.randn(images, 3, *args.size, device=args.device)
    batch = [image] * 3, torch.zeros_like(image[:, 0], dtype=torch.long), args, "pre-training"
    return measured(args, lambda: our_step(torch.nn.ModuleDict({"student": network}), optimizer, *batch))[0]


def steps(args):
    """Steps of the scripts on `shapes`, loader included, beside what can be checked anywhere."""
    groups, marks, rows, pixels = WARM_UP + args.repeats, [], [], ["--contrast-pixels", args.contrast_pixels]
    n = groups * args.group  # steps; a script's last one, which also evaluates, is not among them
    one = ["--backbone", args.backbone, "--eln-backbone", args.eln_backbone, "--width", args.width, "--size"]
    one += [*args.size, "--batch-size", args.batch_size, "--pretrain-iters", n, "--eln-iters", n + 1]

    def timed(batches):
        for step, batch in enumerate(batches):
            marks.extend([now(args)] if step % args.group == 0 else [])
            yield batch
    with tempfile.TemporaryDirectory() as run:
        for module, options in ((train_stage1, one), (train_stage2, ["--iters", n + 1, *pixels])):
            options += ["--device", args.device, "--amp", args.amp, "--workers", args.workers, "--out", run]
            options += ["--log-every", 10**6, "--eval-every", 10**6, "--save-every", 10**6]
            options, progress = module.parse_args([*map(str, options)]), module.progress
            with mock.patch.object(module, "progress", lambda b, *rest: progress(timed(b), *rest)):
                module.train(options, train_stage1.start_process(options))
    shapes = (args.batch_size, args.width, *(n // 4 for n in args.size)), (args.width, args.width, 3, 3)
    x, weight = (torch.randn(shape, device=args.device, dtype=args.dtype) for shape in shapes)
    x, weight = (y.to(memory_format=torch.channels_last).requires_grad_() for y in (x, weight))
    grads = lambda: torch.autograd.grad(conv2d(x, weight, padding=1), (x, weight), x.detach())  # noqa: E731
    rate = 3 * 2 * weight.numel() * x[:, 0].numel() / measured(args, grads)[0]
    for first, kind in ((0, "pre-training"), (groups, "joint training"), (2 * groups + 1, "stage 2")):
        s, most = medians(args, marks[first : first + groups + 1])
        with FakeTensorMode():
            flops, _, gib = counted(our_step, *make_networks(args, False), kind, 2, False)
        theirs = torchvision_seconds(args, args.batch_size * (1 + (kind == "stage 2")))
        gib = gib if kind == "stage 2" else ""  # the others hold less than these networks
        rows.append((kind, s, s / theirs, flops / 1e9, s * rate / flops, gib, most))
    head = "step", "seconds", "over torchvision's", "GFLOP", "over FLOPs'", "GiB of tensors", "GiB on a GPU"
    table("Steps of the scripts: over torchvision's deeplabv3_resnet50 on as many images; over the time "
          f"of their FLOPs at the rate of one 3x3 convolution, {rate / 1e9:.0f} GFLOP/s", head, rows)


def memory(args):
    """Stage 2 at the paper's settings and --amp, counted on tensors without memory: takes minutes."""
    rows, paper = [], Namespace(**{**vars(args), "eln_backbone": "resnet34", "width": 256})
    settings = ("VOC", 6, [512, 512], 21), ("Cityscapes", 4, [512, 1024], 19)
    for setting, paper.backbone in product(settings, ("resnet50", "resnet101")):
        name, paper.batch_size, paper.size, paper.classes = setting
        with FakeTensorMode():
            flops, _, two = counted(our_step, *make_networks(paper, False), "stage 2", 2, False)
            three = counted(our_step, *make_networks(paper, False), "stage 2", 3, False)[2]
        rows.append((name, paper.backbone, args.amp, flops / 1e12, two, three))
    head = "data", "backbone", "amp", "TFLOP", "GiB of tensors", "the same, L_sup with a backward of its own"
    table("A step of stage 2 at the paper's settings, counted without Eq. (10)", head, rows)


def contrast(args):
    """Eq. (10), forward and backward, in one piece and in parts."""
    rows = []
    for n in args.pixels:
        f, f_t = (torch.randn(n, 128, device=args.device, requires_grad=i == 0) for i in range(2))
        label = torch.randint(21, (n,), device=args.device)

        def gradient(function, dtype=torch.float32):
            return torch.autograd.grad(function(f.to(dtype), f_t.to(dtype), label, label, 0.5), f)[0]
        exact = gradient(losses.contrastive_loss, torch.float64) if n <= 5000 else f.detach() * torch.nan
        for function in (losses.contrastive_loss, train_stage2.contrastive_loss_in_parts)[n > 20000 :]:
            with Count([f, f_t]) as count:
                error = (gradient(function) - exact).abs().max() / abs(exact).max()
            numbers = measured(args, lambda: gradient(function))[0], count.most / 2**30, float(error)
            rows.append((str(n), function.__name__, *numbers))
    head = "pixels", "function", "seconds", "GiB of tensors", "a gradient's error, over the largest gradient"
    table("Eq. (10), forward and backward", head, rows)


def released(args):
    """Side by side: a stage 2 step of this code, and one with the released code's structure."""
    rows = []
    for name, step in (("this code", our_step), ("released code's structure", released_step)):
        setting = make_networks(args)
        flops, operations, gib = counted(step, *setting)
        rows.append((name, flops / 1e9, operations, *measured(args, lambda: step(*setting)), gib))
    rows.append(("ratio", *(theirs / ours for ours, theirs in zip(rows[0][1:], rows[1][1:]))))
    head = "step of stage 2", "GFLOP", "operations", "seconds", "GiB on a GPU", "GiB of tensors"
    table("This code beside the released code's structure", head, rows)


def main():
    parts = {part.__name__: part for part in (steps, memory, contrast, released)}
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(parts)}; by default all")
    parser.add_argument("--size", type=int, nargs=2, default=[128, 128], metavar=("H", "W"))
    parser.add_argument("--pixels", type=int, nargs="+", default=[1024, 4096, 16384], help="of contrast")
    usual = dict(device="cpu", amp="off", backbone="resnet18", eln_backbone="resnet18", width=64)
    for name, value in dict(usual, batch_size=4, contrast_pixels=1024, workers=0, repeats=5).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.set_defaults(classes=7, alphas=[20, 50], corrector="eln", eln_weights="none", filter="eln", seed=0)
    args = parser.parse_args()
    args.dtype = torch.float32 if args.amp == "off" else getattr(torch, args.amp)
    args.autocast = torch.autocast(args.device, args.dtype, enabled=args.amp != "off")
    args.group = 10 if args.device == "cuda" else 1
    gpu = [torch.cuda.get_device_name()] if args.device == "cuda" else []
    print(*gpu, torch.get_num_threads(), "threads, torch", torch.__version__, *sys.argv[1:])
    for name in args.parts or parts:
        parts[name](args)


if __name__ == "__main__":
    main()

"""One process computes what several do: losses, every gradient, the validation.

    python -m pytest tests/test_processes.py        (from the root; a minute on two cores)
"""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import NO_WEIGHTS, TINY, free_port, load
from data import IndexStream

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
WORLDS = (1, 2, 3)  # processes of stage 1
ENDS = (1, 3)  # of stage 2
VARIANTS = {  # of stage 2: the ending of the folder's name, and the options
    "300": "--contrast-pixels 300",
    "0": "--contrast-pixels 0 --losses contra",
    "none": "--filter none",
}
LOSSES = {  # of each stage or variant
    "": {"L_sup", "L_aux", "L_eln"},
    "300": {"L_sup", "L_aux", "L_eln", "L_pseudo", "L_contra"},
    "0": {"L_sup", "L_aux", "L_eln", "L_contra"},
    "none": {"L_sup", "L_pseudo", "L_contra"},
}

# ---- Changes of the scripts ----

# float64 and no dropout, whose numbers differ between one process and several. Small ResNets save time.
# Logits less each image's mean give an image several classes.
EXACT = """
import json, os
import torch, torchvision
import data, eln, evaluate, model, small_networks, train_stage1, train_stage2

torch.set_default_dtype(torch.float64)
data.MEAN, data.DEVIATION = data.MEAN.double(), data.DEVIATION.double()
torch.nn.Dropout.forward = lambda self, x: x
torchvision.models.get_model = small_networks.small_resnet
decode = model.Decoder.forward

def centred(self, *args):
    logits, feature = decode(self, *args)
    return logits - logits.mean((2, 3), keepdim=True).detach(), feature

model.Decoder.forward = centred
"""

# BatchNorm on fixed statistics, as CPUs cannot synchronise it. ELN rejects all of an image of one colour.
ON_CPUS = EXACT + """
judge = eln.ErrorLocalizationNetwork.forward
score = evaluate.score
torch.nn.BatchNorm2d.forward = lambda self, x: torch.nn.functional.batch_norm(
    x, self.running_mean, self.running_var, self.weight, self.bias)

def rejecting(self, x):
    plain = x[:, :3].flatten(2).std(2).amax(1) == 0
    if not self.training:
        with open(f"rejected_{os.environ['WORLD_SIZE']}_{os.environ['RANK']}.txt", "a") as file:
            file.write(f"{plain.tolist()}\\n")
    return judge(self, x).masked_fill(plain[:, None, None], -1.0)

def score_in_full(network, dataset, size, process, workers, own_size):
    matrices = score(network, dataset, size, process, workers)
    with open(f"matrices_{process.world}_{process.rank}.txt", "a") as file:
        file.write(json.dumps({name: matrix.tolist() for name, matrix in matrices.items()}) + "\\n")
    return matrices

eln.ErrorLocalizationNetwork.forward = rejecting
evaluate.score = score_in_full
"""

# What several GPUs do: SyncBatchNorm in train mode. It is PyTorch's own but for five kernels, written here
# from their definition, and for its refusal of CPUs. V is made of half of the pixels at least.
ON_GPUS = EXACT + """
import torch.distributed as dist
from torch import nn

def flat(x):  # (channels, pixels of all images)
    return x.transpose(0, 1).flatten(1)

def per(v):
    return v[:, None, None]

def stats(x, eps):
    return flat(x).mean(1), (flat(x).var(1, unbiased=False) + eps).rsqrt()

def gather_stats(x, mean, invstd, running_mean, running_var, momentum, eps, counts):
    c, n = counts[:, None], counts.sum()
    m = (c * mean).sum(0) / n
    v = (c * (invstd ** -2 - eps + (mean - m) ** 2)).sum(0) / n
    running_mean.lerp_(m, momentum)
    running_var.lerp_(v * n / (n - 1), momentum)
    return m, (v + eps).rsqrt()

def elemt(x, w, b, mean, invstd, eps):
    return (x - per(mean)) * per(invstd * w) + per(b)

def reduce(dy, x, mean, invstd, w, *needed):
    s, t = flat(dy).sum(1), flat(dy * (x - per(mean))).sum(1)
    return s, t, t * invstd, s.clone()

def backward(dy, x, mean, invstd, w, s, t, counts):
    n = counts.sum()
    return (dy - per(s / n) - (x - per(mean)) * per(invstd ** 2 * t / n)) * per(invstd * w)

library = torch.library.Library("aten", "IMPL")
kernels = dict(stats=stats, gather_stats_with_counts=gather_stats, elemt=elemt)
kernels.update(backward_reduce=reduce, backward_elemt=backward)
for name, kernel in kernels.items():
    library.impl(f"batch_norm_{name}", kernel, "CPU")

def forward(self, x):
    where = self.running_mean, self.running_var
    if not self.training:
        return nn.functional.batch_norm(x, *where, self.weight, self.bias, eps=self.eps)
    several = dist.group.WORLD, dist.get_world_size()
    return nn.modules._functions.SyncBatchNorm.apply(
        x, self.weight, self.bias, *where, self.eps, self.momentum, *several)

nn.SyncBatchNorm.forward = forward
nn.parallel.DistributedDataParallel._passing_sync_batchnorm_handle = lambda *args: None
prepare = train_stage1.prepare
label = train_stage2.make_pseudo_labels

def synchronised(nets, args, process):
    if process.world > 1:
        nn.SyncBatchNorm.convert_sync_batchnorm(nets)
    return prepare(nets, args, process)

def bright_half(teacher, eln, image_u, args):
    pseudo_label, valid, feature_t = label(teacher, eln, image_u, args)
    return pseudo_label, valid | (image_u.sum(1) > 0), feature_t

train_stage1.prepare = train_stage2.prepare = synchronised
train_stage2.make_pseudo_labels = bright_half
train_stage1.same_statistics = train_stage2.same_statistics = lambda *args: None
"""


# ---- BatchNorm on fixed statistics ----


def places(seed, stage, kind, step):
    """Which of 4 images lies where in a step's batch of 4."""
    batch = next(iter(IndexStream(4, 4, (seed, stage, kind), step, step + 1)))
    return [index for index, _ in batch]


def run_all(run_apart, work, changes, commands):
    """Run (processes, "SCRIPT OPTION ...") one after the other in the folder `work`; all must end well."""
    (work / "changes.py").write_text(changes)
    lines = [f"{world} {free_port()} {command}" for world, command in commands]
    done = run_apart(work, "tests/fork_processes.py", "changes.py", *lines)
    assert (done.returncode, done.stderr) == (0, "")
    codes = [line for line in done.stdout.splitlines() if set(line) <= set("0 ")]
    assert codes == [" ".join("0" * world) for world, _ in commands]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, write_folder, run_apart):
    """Both stages on 1, 2 and 3 processes, 4 images split as 4, 2 + 2, 2 + 1 + 1, in folders 1, 2 and 3.

    In the last step of both stages the labels of the third image are all void, so that on three processes the
    second has no label; in stage 2 the fourth image's pixels are all rejected, so that the third has none.
    """
    work = tmp_path_factory.mktemp("processes")
    write_folder(work / "datasets")
    seed = next(s for s in range(99) if places(s, 1, 0, 1)[2] == places(s, 2, 0, 0)[2])
    void = work / f"datasets/masks/t{places(seed, 1, 0, 1)[2]}.png"
    plain = work / f"datasets/images/t{4 + places(seed, 2, 1, 0)[3]}.jpg"
    Image.fromarray(np.full_like(np.asarray(Image.open(void)), 255)).save(void)
    Image.new("RGB", (56, 56), (90, 120, 60)).save(plain)

    stage1 = ["train_stage1.py --dataset folder", *NO_WEIGHTS, *TINY, "--pretrain-iters 1 --eln-iters 1"]
    stage1 += [f"--batch-size 4 --labeled-list datasets/labeled.txt --seed {seed}"]
    stage1 += ["--alphas 0.9905 0.9"]  # near the decoders' ratios of losses: Eq. (3) takes some images
    commands = [(world, " ".join([*stage1, f"--out {world}"])) for world in WORLDS]
    stage2 = "train_stage2.py 1 --iters 1 --log-every 1 --device cpu"
    for name, options in VARIANTS.items():
        commands += [(world, f"{stage2} {options} --out {world}-{name}") for world in ENDS]
    run_all(run_apart, work, ON_CPUS, commands)
    yield work
    shutil.rmtree(work)


def gradients(checkpoint):
    """AdamW's first moments, which are multiples of the gradients: {number of the parameter: tensor}."""
    return {key: state["exp_avg"] for key, state in checkpoint["optimizer"]["state"].items()}


def assert_close(value, other, name):
    """Equal up to rounding in float64, relative to the largest entry."""
    assert value.dtype == other.dtype == torch.float64
    assert (value - other).abs().max() <= 1e-9 * value.abs().max(), name


STAGES = [(1, ""), *((2, name) for name in VARIANTS)]


@pytest.mark.parametrize("stage, variant", STAGES)
def test_losses_and_gradients_of_one_process_are_those_of_several(runs, stage, variant):
    worlds = WORLDS if stage == 1 else ENDS
    folders = [f"{world}-{variant}".rstrip("-") for world in worlds]
    one, *others = (load(runs / folder / f"stage{stage}.pt") for folder in folders)
    assert [row["step"] for row in one["rows"]] == {1: [1, 2], 2: [0, 1]}[stage]
    for other in others:
        for row, row_of_other in zip(one["rows"], other["rows"], strict=True):
            assert row.keys() == row_of_other.keys()
            for key, value in row.items():
                assert abs(row_of_other[key] - value) <= 1e-9 * abs(value), key
    last = one["rows"][-1]
    losses = {key for key in last if key.startswith("L_")}
    assert losses == LOSSES[variant] and all(last[key] > 0 for key in losses)
    assert stage == 1 or any(key.startswith("accepted_") for key in last)
    for other in others:
        assert gradients(other).keys() == gradients(one).keys()
        for key, gradient in gradients(one).items():
            assert_close(gradient, gradients(other)[key], key)


@pytest.mark.parametrize("variant", ["300", "0"])
def test_one_of_three_processes_has_no_pixel_of_v(runs, variant):
    """So that what the gradients show holds for it too."""
    row = load(runs / f"3-{variant}/stage2.pt")["rows"][-1]
    assert 0 < row["accepted"] < 0.75
    for rank, rejected in enumerate(([False, False], [False], [True])):
        text = (runs / f"rejected_3_{rank}.txt").read_text()
        assert set(text.splitlines()) == {str(rejected)}


def test_validation_counts_every_image_once(runs):
    masks = [np.asarray(Image.open(runs / f"datasets/masks/{key}.png")) for key in ("v0", "v1")]
    known = sum(int((mask != 255).sum()) for mask in masks)
    one = (runs / "matrices_1_0.txt").read_text().splitlines()
    assert len(one) == 1 + 3 * len(VARIANTS)  # stage 1; in stage 2 first the student, then both
    for line in one:
        assert sum(map(sum, json.loads(line)["original"])) == known
    for world, lines in ((2, one[:1]), (3, one)):  # two processes: stage 1 alone
        for rank in range(world):
            assert (runs / f"matrices_{world}_{rank}.txt").read_text().splitlines() == lines


# ---- Synchronised BatchNorm ----


@pytest.fixture(scope="module")
def synchronised(tmp_path_factory, write_folder, run_apart):
    """Both stages on 1 process, and on 4 with SyncBatchNorm, 6 images split as 6, 2 + 2 + 1 + 1."""
    work = tmp_path_factory.mktemp("synchronised")
    write_folder(work / "datasets")
    stage1 = ["train_stage1.py --dataset folder --labeled-list datasets/labeled.txt", *NO_WEIGHTS, *TINY]
    stage1 = " ".join([*stage1, "--batch-size 6 --pretrain-iters 1 --eln-iters 1 --alphas 1 1.1"])
    stage2 = "train_stage2.py 1 --iters 1 --contrast-pixels 300"
    commands = [(world, f"{stage1} --out {world}") for world in (1, 4)]
    commands += [(world, f"{stage2} --out {world}-2") for world in (1, 4)]
    run_all(run_apart, work, ON_GPUS, commands)
    yield work
    shutil.rmtree(work)


@pytest.mark.parametrize("stage, end", [(1, ""), (2, "-2")])
def test_synchronised_batchnorm_makes_four_uneven_processes_one(synchronised, stage, end):
    """Losses, every gradient, every running statistic."""
    one, four = (load(synchronised / f"{world}{end}/stage{stage}.pt") for world in (1, 4))
    for row, other in zip(one["rows"], four["rows"], strict=True):
        losses = [key for key in row if key.startswith("L_")]
        assert all(abs(row[key] - other[key]) <= 1e-9 * row[key] for key in losses)
    assert len(losses) == {1: 3, 2: 5}[stage] and all(row[key] > 0 for key in losses)
    assert stage == 1 or 0.5 < row["accepted"] < 1
    assert gradients(four).keys() == gradients(one).keys()
    for key, gradient in gradients(one).items():
        assert_close(gradient, gradients(four)[key], key)
    statistics = [name for name in one["networks"] if "running_" in name]
    assert len(statistics) > 100
    for name in statistics:
        assert_close(one["networks"][name], four["networks"][name], name)

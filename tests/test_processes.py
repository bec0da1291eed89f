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
WORLDS, ENDS = (1, 2, 3), (1, 3)  # of stage 1, of stage 2
VARIANTS = {  # of stage 2: the ending of the folder's name, and the options
    "300": "--contrast-pixels 300", "0": "--contrast-pixels 0", "contra": "--losses contra",
    "none": "--filter none",
}

# float64, BatchNorm on fixed statistics, no dropout: the last two differ between one process and several. A
# shallow ResNet saves time. Logits less each image's mean give an image several classes, and pixels that ELN
# accepts; all of an image of one colour it rejects. 
EXACT = """
import json, os
import torch, torchvision
import data, eln, evaluate, model, train_stage1, train_stage2

torch.set_default_dtype(torch.float64)
data.MEAN, data.STD = data.MEAN.double(), data.STD.double()
torch.nn.BatchNorm2d.forward = lambda self, x: torch.nn.functional.batch_norm(
    x, self.running_mean, self.running_var, self.weight, self.bias)
torch.nn.Dropout.forward = lambda self, x: x
torchvision.models.get_model = lambda name, weights: torchvision.models.ResNet(
    torchvision.models.resnet.BasicBlock, [1, 1, 1, 1])
decode, judge, score = model.Decoder.forward, eln.ErrorLocalizationNetwork.forward, evaluate.score

def centred(self, *args):
    logits, feature = decode(self, *args)
    return logits - logits.mean((2, 3), keepdim=True).detach(), feature

def rejecting(self, x):
    plain = x[:, :3].flatten(2).std(2).amax(1) == 0
    if not self.training:
        with open(f"rejected_{os.environ['WORLD_SIZE']}_{os.environ['RANK']}.txt", "a") as file:
            file.write(f"{plain.tolist()}\\n")
    return judge(self, x).masked_fill(plain[:, None, None], -1.0)

def score_in_full(network, dataset, size, device, rank, world, workers):
    matrices = score(network, dataset, size, device, rank, world, workers)
    with open(f"matrices_{world}_{rank}.txt", "a") as file:
        file.write(json.dumps({name: matrix.tolist() for name, matrix in matrices.items()}) + "\\n")
    return matrices

model.Decoder.forward, eln.ErrorLocalizationNetwork.forward = centred, rejecting
train_stage1.score = train_stage2.score = score_in_full
"""


def places(seed, stage, kind, step):
    """Which of 4 images lies where in a step's batch of 4."""
    return [index for index, _ in next(iter(IndexStream(4, 4, (seed, stage, kind), step, step + 1)))]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, write_folder, run_apart):
    """Both stages on 1, 2 and 3 processes, 4 images split as 4, 2 + 2, 2 + 1 + 1, in folders 1, 2 and 3.

    In the last step of both stages the labels of the third image are all void, so that on three processes the
    second has no label; in stage 2 the fourth image's pixels are all rejected, so that the third has none.
    """
    work = tmp_path_factory.mktemp("processes")
    write_folder(work / "datasets")
    seed = next(s for s in range(99) if places(s, 1, 0, 1)[2] == places(s, 2, 0, 0)[2])
    void, plain = f"t{places(seed, 1, 0, 1)[2]}", f"t{4 + places(seed, 2, 1, 0)[3]}"
    mask = np.asarray(Image.open(work / f"datasets/masks/{void}.png"))
    Image.fromarray(np.full_like(mask, 255)).save(work / f"datasets/masks/{void}.png")
    Image.new("RGB", (56, 56), (90, 120, 60)).save(work / f"datasets/images/{plain}.jpg")
    (work / "changes.py").write_text(EXACT)
    stage1 = ["train_stage1.py --dataset folder", *NO_WEIGHTS, *TINY, "--pretrain-iters 1 --eln-iters 1"]
    stage1 = " ".join([*stage1, f"--batch-size 4 --labeled-list datasets/labeled.txt --seed {seed}"])
    stage1 += " --alphas 1 1.1"  # near the main decoder's loss: Eq. (3) takes some images
    stage2 = "train_stage2.py 1 --iters 1 --log-every 1 --device cpu"
    commands = [f"{world} {free_port()} {stage1} --out {world}" for world in WORLDS]
    for name, options in VARIANTS.items():
        commands += [f"{world} {free_port()} {stage2} {options} --out {world}-{name}" for world in ENDS]
    done = run_apart(work, "tests/fork_processes.py", "changes.py", *commands)
    assert (done.returncode, done.stderr) == (0, "")
    codes = [line for line in done.stdout.split("\n") if line and set(line) <= set("0 ")]
    assert codes == ["0", "0 0", "0 0 0"] + ["0", "0 0 0"] * len(VARIANTS)
    yield work
    shutil.rmtree(work)


OF_STAGE_2 = [(2, f"{{}}-{name}", 1) for name in VARIANTS]


@pytest.mark.parametrize("stage, folder, steps", [(1, "{}", 2), *OF_STAGE_2])
def test_losses_and_gradients_of_one_process_are_those_of_several(runs, stage, folder, steps):
    """AdamW's first moment in the checkpoint shows the gradient; relative to each parameter's largest one."""
    worlds = WORLDS if stage == 1 else ENDS
    checkpoints = [load(runs / folder.format(world) / f"stage{stage}.pt") for world in worlds]
    for step in range(steps):
        one, *others = (checkpoint["rows"][step] for checkpoint in checkpoints)
        for key, value in one.items():
            rounding = 1e-6 if key == "accepted" else 1e-9  # that one is a float32
            assert all(abs(other[key] - value) <= rounding * abs(value) for other in others), key
    terms = {key: value for key, value in one.items() if key.startswith("L_")}
    off = {"contra": {"L_pseudo"}, "none": {"L_aux", "L_eln"}}
    off = off.get(folder.partition("-")[2], set())  # else the gradients below show nothing
    assert len(terms) >= 3 and all((value > 0) != (key in off) for key, value in terms.items())
    if stage == 2 and one["accepted"] != 1:
        assert 0 < one["accepted"] < 0.75
        for rank, rejected in enumerate(([False, False], [False], [True])):
            assert set((runs / f"rejected_3_{rank}.txt").read_text().split("\n")) == {str(rejected), ""}
    states = [checkpoint["optimizer"]["state"] for checkpoint in checkpoints]
    for key, state in states[0].items():
        gradient = state["exp_avg"]
        assert gradient.dtype == torch.float64
        for other in states[1:]:
            assert other.keys() == states[0].keys()
            assert (other[key]["exp_avg"] - gradient).abs().max() <= 1e-9 * gradient.abs().max(), key


def test_validation_counts_every_image_once(runs):
    pixels = [np.asarray(Image.open(runs / f"datasets/masks/{key}.png")) for key in ("v0", "v1")]
    known = sum(int((label != 255).sum()) for label in pixels)
    one = (runs / "matrices_1_0.txt").read_text()
    assert len(one.splitlines()) == 1 + 2 * len(VARIANTS)  # stage 1, and in each stage 2 student and teacher
    for line in one.splitlines():
        assert sum(map(sum, json.loads(line)["original"])) == known
    for world, text in ((2, one.splitlines(keepends=True)[0]), (3, one)):  # two processes: stage 1 alone
        assert all((runs / f"matrices_{world}_{rank}.txt").read_text() == text for rank in range(world))

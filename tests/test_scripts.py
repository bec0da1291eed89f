"""Tests of train_stage1.py, train_stage2.py and evaluate.py, run as a user runs them, for a few steps.

    python -m pytest tests/test_scripts.py        (from the root; three minutes on two cores)

A new process imports PyTorch for seconds: so whole runs are made once and shared, and most commands are run
as __main__ inside this process, by `here`. `folder` data lies in ./datasets, the default of --data.
"""

import copy
import math
import os
import re
import shutil
import subprocess
import threading
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

import kill_runs
import losses
import train_stage1
import train_stage2
from conftest import NO_WEIGHTS, TINY, here, leaves, load, load_few_shapes, rows, same_run
from data import DATASETS, Process, images_of_process, seed_step
from eln import AuxiliaryNetworks, ErrorLocalizationNetwork
from model import DeepLabV3Plus

pytestmark = pytest.mark.usefixtures("small_networks")  # in this process

FOLDER = ["--dataset", "folder", *NO_WEIGHTS, *TINY]
LISTED = "--labeled-list datasets/labeled.txt".split()
STAGE1 = ["train_stage1.py", *FOLDER, *"--out run --pretrain-iters 4 --eln-iters 3".split()]
STAGE2 = "train_stage2.py run --iters 3 --eval-every 2 --device cpu".split()
NEW2 = [*STAGE2, "--out", "new"]
CHECKPOINTS = {"stage1.pt", "stage2.pt", "student_stage1.pt", "student_stage2.pt"}
RUN_FILES = CHECKPOINTS | {"log_stage1.csv", "log_stage2.csv", ".lock"}


def finishes(cwd, *command):
    """The command ends well and complains of nothing; returns what it prints."""
    code, out, err = here(cwd, *command)
    assert (code, err) == (0, "")
    return out

def one_line(code, err, says):
    """Bad input ends in code 2 and one line (behind argparse's usage) with each of these words."""
    *usage, line = err.strip().split("\n")
    assert code == 2 and "Traceback" not in err and "InputError" not in err
    assert not usage or usage[0].startswith("usage: "), err
    for word in says.split():
        assert word in line

def disk(folder):
    """What would differ if anything below the folder were written, replaced, made or removed."""
    found = {path: path.stat() for path in folder.rglob("*") if path.name != ".lock"}  # empty, see resume
    return {p: p.is_dir() or (s.st_size, s.st_mtime_ns, s.st_ino) for p, s in found.items()}

def refused(cwd, *command, says):
    before = disk(cwd)
    code, _, err = here(cwd, *command)
    one_line(code, err, says)
    assert disk(cwd) == before

def link(source, target, *names):
    """Copy a run's folder at no cost: checkpoints are only ever replaced, so they may be shared."""
    target.mkdir()
    for name in names or [path.name for path in source.iterdir() if path.is_file()]:
        (os.link if name.endswith(".pt") else shutil.copy2)(source / name, target / name)

@pytest.fixture(scope="module")
def space(tmp_path_factory):
    """A folder for whole runs, which take many megabytes: deleted at the end."""
    path = tmp_path_factory.mktemp("runs")
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module", autouse=True)
def killed_runs(tmp_path_factory):
    """Results to come of runs that are killed: they take long, and another core than the tests meanwhile."""

    def kill_once(stage, workers):
        folder = tmp_path_factory.mktemp(f"killed{stage}") / "runs"
        kill_runs.prepare(folder, stage)
        kill_runs.survive(folder, stage, workers, kills=1)
        shutil.rmtree(folder)

    with ThreadPoolExecutor(1) as pool:
        yield [pool.submit(kill_once, *one) for one in ((1, 2), (2, 0))]

@pytest.fixture(scope="module")
def shapes_run(small_networks, space):
    """The folder of both stages on a part of `shapes`, where the default of --out has put it."""
    options = "--pretrain-iters 4 --eln-iters 3 --alphas 0.5 2".split()
    with mock.patch.dict(DATASETS, shapes=load_few_shapes):
        finishes(space, "train_stage1.py", *TINY, *options)
        finishes(space, *"train_stage2.py --iters 3 --device cpu".split())
        yield space / "runs" / "shapes-1_20-0"


@pytest.fixture(scope="module")
def folder_run(small_networks, space, write_folder):
    """A folder with datasets and run: both stages, where no unlabelled image has a mask that can be read."""
    masks = write_folder(space / "folder" / "datasets") / "masks"
    (masks / "t4.png").unlink()
    (masks / "t5.png").write_bytes(b"not an image")
    for command in ([*STAGE1, *LISTED], STAGE2):
        finishes(space / "folder", *command, "--workers", 2)
    assert load(space / "folder/run/stage2.pt")["unlabeled"] == ["t4", "t5", "t6", "t7"]
    return space / "folder"


@pytest.fixture(scope="module")
def networks(small_networks):
    """Stage 2's, the teacher apart from the student, and three batches of two images."""
    torch.manual_seed(0)
    args = Namespace(width=8, alphas=[0, 0], corrector="eln", eln_backbone="resnet18", eln_weights="none")
    student = DeepLabV3Plus(3, "resnet18", "none", 8)
    nets = torch.nn.ModuleDict({"student": student, "auxiliary": AuxiliaryNetworks(3, student.encoder, args)})
    nets["teacher"] = copy.deepcopy(student).requires_grad_(False)
    for parameter in nets["teacher"].parameters():
        parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
    return nets, torch.randn(3, 2, 3, 48, 48)


@pytest.fixture
def work(tmp_path, write_folder):
    """A folder with datasets alone."""
    write_folder(tmp_path / "datasets")
    yield tmp_path
    shutil.rmtree(tmp_path)

# ---- What a run leaves ----


def test_a_run_leaves_the_documented_files(shapes_run):
    assert {path.name for path in shapes_run.iterdir() if path.is_file()} == RUN_FILES
    for stage, steps in ((1, 7), (2, 3)):
        checkpoint, log = load(shapes_run / f"stage{stage}.pt"), rows(shapes_run / f"log_stage{stage}.csv")
        assert (checkpoint["step"], checkpoint["stage"]) == (steps, stage)
        written = [{name: float(value) for name, value in row.items() if value} for row in log]
        assert written == checkpoint["rows"]
        assert "saved" not in checkpoint and checkpoint["args"]["amp"] == "auto"
        assert load(shapes_run / f"student_stage{stage}.pt")["step"] == steps
    for name in CHECKPOINTS:
        for key, value in leaves(load(shapes_run / name)):
            assert isinstance(value, (torch.Tensor, str, int, float, type(None))), key

def test_logs_have_their_columns_and_finite_numbers(shapes_run):
    one, two = (rows(shapes_run / f"log_stage{stage}.csv") for stage in (1, 2))
    labeled = {"step", "L_sup", "L_aux", "L_eln"}
    judged = {"ce_1_over_ce_0", "ce_2_over_ce_0", "wrong_0", "wrong_1", "wrong_2"}
    judged |= {"eln_precision", "eln_recall"}
    unlabeled = {"L_pseudo", "L_contra", "accepted"}
    scores = {"mIoU", "mIoU_teacher"}
    classes = load(shapes_run / "stage2.pt")["classes"]
    of_class = {f"accepted_{c}_{name}" for c, name in enumerate(classes)}
    assert set(one[0]) == {*labeled, *judged, "mIoU"}
    found = two[0].keys() & of_class
    assert found and set(two[0]) == {*labeled, *unlabeled, *judged, *scores, *found}
    assert [row["step"] for row in one + two] == [*"1234567", *"0123"]
    for row in one + two:
        blank = {name for name, value in row.items() if value == ""} - of_class
        assert all(math.isfinite(float(value)) for value in row.values() if value)
        early = set()
        if row in one[:4]:  # pre-training
            early = {"L_aux", "L_eln", *judged}
        if row is two[0]:
            early = labeled - {"step"} | unlabeled | judged
        scored = row in (one[-1], two[0], two[-1])
        assert blank == early | (set() if scored else row.keys() & scores)
    assert two[0]["mIoU"] == two[0]["mIoU_teacher"] == one[-1]["mIoU"]

def test_numpy_reads_the_logs_columns_by_their_names(shapes_run):
    for stage in (1, 2):
        path = shapes_run / f"log_stage{stage}.csv"
        table = np.genfromtxt(path, delimiter=",", names=True)
        written = rows(path)
        assert list(table.dtype.names) == list(written[0])
        for name in table.dtype.names:
            values = [float(row[name] or "nan") for row in written]
            assert np.array_equal(table[name], values, equal_nan=True)

def test_every_so_many_steps_are_validated(folder_run):
    log = rows(folder_run / "run/log_stage2.csv")
    scored = [bool(row["mIoU"] and row["mIoU_teacher"]) for row in log]
    assert scored == [True, False, True, True]  # steps 0 to 3

def test_auxiliary_networks_stay_as_they_are_in_pre_training(work):
    """One optimizer has all parameters from the start; AdamW leaves alone what has no gradient."""
    options = "--pretrain-iters 2 --eln-iters 9 --save-every 2 --lr 0.1".split()
    interrupted(work, 3, [*STAGE1, *LISTED, *options])
    checkpoint = load(work / "run/stage1.pt")
    args = Namespace(**checkpoint["args"])
    torch.manual_seed(args.seed)
    main = DeepLabV3Plus(3, "resnet18", "none", args.width)
    fresh = AuxiliaryNetworks(3, main.encoder, args).state_dict()
    for name, value in fresh.items():
        assert torch.equal(checkpoint["networks"][f"auxiliary.{name}"], value), name
    moved = [n for n, p in main.named_parameters() if not torch.equal(p, checkpoint["networks"][f"main.{n}"])]
    assert len(moved) > 60 and len(checkpoint["optimizer"]["state"]) == len(moved)

def test_teacher_is_in_the_checkpoint_and_lags_behind_the_student(shapes_run):
    first, now = (load(shapes_run / f"stage{stage}.pt")["networks"] for stage in (1, 2))
    moved = 0
    for name, student in load(shapes_run / "student_stage2.pt")["network"].items():
        teacher, begin = now[f"teacher.{name}"], first[f"main.{name}"]
        assert torch.equal(student, now[f"student.{name}"])
        if teacher.is_floating_point() and not torch.equal(student, begin):
            assert 0 < (teacher - begin).norm() < 0.2 * (student - begin).norm(), name  # beta = 0.95
            moved += 1
    assert moved > 100

def test_the_baseline_learns_in_a_folder_of_its_own(work):
    options = "--pretrain-iters 40 --eln-iters 0 --lr 0.003 --ratio 1/2".split()
    finishes(work, "train_stage1.py", *FOLDER, *options)
    run = work / "runs" / "folder-1_2-0-supervised"
    L_sup = [float(row["L_sup"]) for row in rows(run / "log_stage1.csv")]
    assert sum(L_sup[-8:]) < 0.8 * sum(L_sup[:8])
    assert all(name.startswith("main.") for name in load(run / "stage1.pt")["networks"])

# ---- Resuming ----


def interrupted(cwd, step, command):
    """Run a command until its run's step of this number, in which the user interrupts it."""
    path, calls = cwd / "run" / command[0].removeprefix("train_").replace(".py", ".pt"), []
    first, supervised_loss = load(path)["step"] + 1 if path.exists() else 1, losses.supervised_loss

    def stop(*args):
        calls.append(args)
        if first + len(calls) > step:
            raise KeyboardInterrupt
        return supervised_loss(*args)

    with mock.patch.object(losses, "supervised_loss", stop):
        assert here(cwd, *command)[0] == 130

def test_interrupted_runs_end_bitwise_as_uninterrupted_ones(folder_run, work):
    """Stage 1 resumes from step 2 (in pre-training), 4 (where ELN joins) and 6; stage 2 from step 1."""
    for name in ("t4.png", "t5.png"):
        (work / "datasets/masks" / name).unlink()
    for step in (4, 6, 7):
        interrupted(work, step, [*STAGE1, *LISTED, "--save-every", 2])
        saved = (step - 1) // 2 * 2
        assert load(work / "run/stage1.pt")["step"] == len(rows(work / "run/log_stage1.csv")) == saved
    finishes(work, *STAGE1, *LISTED, "--workers", 2, "--save-every", 5)  # run options may change
    same_run(work / "run", folder_run / "run", 1)
    interrupted(work, 2, [*STAGE2, "--save-every", 1])
    finishes(work, *STAGE2)
    same_run(work / "run", folder_run / "run", 2)
    assert {path.name for path in (work / "run").iterdir()} == RUN_FILES

def test_finished_run_says_so_and_changes_nothing(folder_run):
    before = disk(folder_run)
    for command in ([*STAGE1, *LISTED], STAGE2):
        out = finishes(folder_run, *command, "--workers", 0, "--save-every", 9)
        (line,) = [line for line in out.splitlines() if "is finished" in line]
        assert line.endswith("4 labelled, 4 unlabelled images; cpu, float32")
    assert disk(folder_run) == before

@pytest.mark.parametrize("command, option, old, new", [
    ([*STAGE1, *LISTED], "--lr", train_stage1.FOLDER["lr"], 0.5),
    ([*STAGE1, *LISTED], "--batch-size", 2, 3),
    ([*STAGE1, *LISTED], "--eln-iters", 3, 2),
    ([*STAGE1, *LISTED], "--pretrain-iters", 4, 5),
    (STAGE2, "--iters", 3, 2),
    (STAGE2, "--seed", 0, 3),
    (STAGE2, "--beta", train_stage2.DEFAULTS["folder"]["beta"], 0.9),
])
def test_other_arguments_do_not_resume(folder_run, command, option, old, new):
    refused(folder_run, *command, option, new, says=f"{option} {old} {new}")


@pytest.mark.parametrize("change", [
    lambda optimizer: optimizer["state"][9].update(exp_avg=torch.zeros(3)),
    lambda optimizer: optimizer["state"][9].update(exp_avg_sq=torch.zeros(3)),
    lambda optimizer: optimizer["state"][9].pop("exp_avg"),
    lambda optimizer: optimizer["state"].update({9: 5}),
    lambda optimizer: optimizer["param_groups"].pop(),
    lambda optimizer: optimizer.clear(),
], ids=["a moment's shape", "the other's shape", "no moment", "a number", "a group less", "nothing"])
def test_another_optimizers_state_is_refused(folder_run, work, change):
    content = load(folder_run / "run/stage1.pt")
    change(content["optimizer"])
    (work / "run").mkdir()
    torch.save(content, work / "run/stage1.pt")
    refused(work, *STAGE1, *LISTED, says="run/stage1.pt another optimizer")

def test_data_and_lists_may_move(folder_run, work):
    """A run goes on where the ids are the same, wherever the files lie."""
    link(folder_run / "run", work / "run", "stage1.pt")
    (work / "datasets").rename(work / "moved")
    for name in ("t4.png", "t5.png"):
        (work / "moved/masks" / name).unlink()
    moved = "--data moved --labeled-list moved/labeled.txt".split()
    assert "is finished" in finishes(work, *STAGE1, *moved)
    other = "t0 t1 t2 t6"
    (work / "moved/other.txt").write_text("\n".join(other.split()))
    (work / "moved/masks/t6.png").write_bytes((work / "moved/masks/t0.png").read_bytes())
    finishes(work, *STAGE2, "--data", "moved", "--iters", 1)

@pytest.mark.parametrize("stage, command, option, before", [
    (1, [*STAGE1, *LISTED], "--eln-iters", 7),
    (2, STAGE2, "--iters", 3),
])
def test_a_longer_run_equals_a_straight_one(folder_run, work, stage, command, option, before):
    for folder in ("run", "straight"):
        names = ["stage1.pt"]
        if folder == "run" and stage == 2:
            names += ["stage2.pt"]
        link(folder_run / "run", work / folder, *names)
    if stage == 1:
        (work / "straight/stage1.pt").unlink()
    finishes(work, *command, option, 4)
    finishes(work, *command, option, 4, "--out", "straight")
    longer, straight = (load(work / f"{name}/stage{stage}.pt") for name in ("run", "straight"))
    assert longer["step"] == straight["step"] == before + 1
    one, two = (dict(leaves(c)) for c in (longer, straight))
    tensors = [key for key, value in two.items() if isinstance(value, torch.Tensor)]
    assert len(tensors) > 300
    for key in tensors:
        assert torch.equal(one[key], two[key]), key
    log, other = (rows(work / f"{name}/log_stage{stage}.csv") for name in ("run", "straight"))
    for row, of_straight in zip(log, other, strict=True):
        if row["step"] == str(before):  # the end of the shorter run is scored, too
            assert row["mIoU"]
            for key in row.keys() & {"mIoU", "mIoU_teacher"}:
                row[key] = of_straight[key]
        assert row == of_straight

def test_repainted_labelled_masks_are_refused_by_both_stages(folder_run, work):
    link(folder_run / "run", work / "run")
    size = Image.open(work / "datasets/images/t6.jpg").size
    paint("masks/t6.png", *size[::-1])  # of an unlabelled image
    assert "is finished" in finishes(work, *STAGE1, *LISTED)
    path = work / "datasets/masks/t1.png"
    label = np.asarray(Image.open(path)).copy()
    label[12, 7] = 2
    Image.fromarray(label).save(path)
    refused(work, *STAGE1, *LISTED, says="run/stage1.pt other masks of labelled images")
    refused(work, *STAGE2, says="masks of labelled images run/stage1.pt")
    refused(work, *NEW2, says="masks of labelled images run/stage1.pt")

def test_scores_of_other_validation_images_are_not_mixed(folder_run, work):
    """Neither its masks nor its list may change within a stage; stage 2 begins with a score."""
    link(folder_run / "run", work / "run")
    path = work / "datasets/masks/v0.png"
    Image.fromarray(1 - np.asarray(Image.open(path)).clip(0, 1)).save(path)
    refused(work, *STAGE1, *LISTED, says="run/stage1.pt other masks of validation images")
    refused(work, *STAGE2, says="run/stage2.pt other masks of validation images")
    finishes(work, *NEW2, "--iters", 1)
    score = float(rows(work / "new/log_stage2.csv")[0]["mIoU"])
    (work / "run/stage2.pt").unlink()
    out = apart(work, "evaluate.py", "run", "--stage", 1)[1]
    assert f"{score:.2f}" in out.splitlines()[-1]
    (work / "datasets/val.txt").write_text("v1\n")
    refused(work, *STAGE1, *LISTED, says="run/stage1.pt other validation images")

def test_images_that_are_added_after_stage_1_are_used_by_stage_2(folder_run, work):
    data = work / "datasets"
    link(folder_run / "run", work / "run", "stage1.pt")
    shutil.copy(data / "images/t6.jpg", data / "images/t8.jpg")
    with open(data / "train.txt", "a") as file:
        file.write("t8\n")
    assert "is finished" in finishes(work, *STAGE1, *LISTED)
    finishes(work, *NEW2, "--iters", 1)
    assert load(work / "new/stage2.pt")["unlabeled"] == ["t4", "t5", "t6", "t7", "t8"]
    (data / "few.txt").write_text("t8\nt5\n")
    few = ["--unlabeled-list", "datasets/few.txt", "--iters", 1]
    refused(work, *NEW2, *few, says="new/stage2.pt other unlabelled images")
    overlap = ["--unlabeled-list", "datasets/labeled.txt"]
    refused(work, *STAGE2, *overlap, says="labelled unlabelled overlap t0")
    shutil.copy(data / "labeled.txt", data / "train.txt")
    refused(work, *STAGE2, says="there is no unlabelled image: --ratio train.txt")

def test_a_run_is_saved_after_ten_minutes_without(tmp_path, monkeypatch):
    """Steps of 250 seconds, --save-every 7."""
    clock = Namespace(monotonic=lambda: seconds)
    monkeypatch.setattr(train_stage1, "time", clock)
    nets = torch.nn.ModuleDict({"main": torch.nn.Linear(2, 2)})
    optimizer = torch.optim.AdamW(nets.parameters())
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    args = dict(out=str(tmp_path), save_every=7, backbone="x", width=8, size=[32, 32])
    run = dict(stage=1, args=args, classes=["a", "b"], saved=0)
    dataset = Namespace(palette=np.zeros((2, 3), np.uint8), crop=False)
    saved = []
    for step in range(1, 11):
        seconds = 250 * step
        state = ([], nets, optimizer, scaler, Process())
        train_stage1.save_when_due(run, dataset, step, 10, *state)
        if (tmp_path / "stage1.pt").exists():
            saved.append(load(tmp_path / "stage1.pt")["step"])
    assert saved == [3, 3, 3, 6, 7, 7, 7, 10]  # after the steps 3 to 10

@pytest.mark.parametrize("number", [0, 1], ids=["stage 1", "stage 2"])
def test_killed_runs_end_as_undisturbed_ones(killed_runs, number):
    """One kill each; `python tests/kill_runs.py` makes more."""
    killed_runs[number].result()

# ---- Variants of stage 2 ----

VARIANTS = [  # stage 2's options; the end of the default folder's name; the trained losses
    ([], "", "L_aux L_eln L_pseudo L_contra"),
    (["--filter", "threshold", "--threshold", "0.34"], "-threshold-0.34", "L_pseudo"),
    ("--filter threshold --threshold 0.34 --losses pseudo contra".split(), "-threshold-0.34-contra-pseudo",
     "L_pseudo L_contra"),
    (["--filter", "none"], "-none", "L_pseudo L_contra"),
    (["--losses", "pseudo"], "-pseudo", "L_aux L_eln L_pseudo"),
    (["--losses", "contra"], "-contra", "L_aux L_eln L_contra"),
]


@pytest.mark.parametrize("options, end, terms", VARIANTS, ids=[end for _, end, _ in VARIANTS])
def test_each_variant_of_stage_2_trains_what_it_needs(folder_run, work, options, end, terms):
    link(folder_run / "run", work / "run", "stage1.pt")
    finishes(work, *"train_stage2.py run --iters 1 --device cpu".split(), *options)
    out = work / f"run{end}"
    checkpoint = load(out / "stage2.pt")
    row = {name: value for name, value in checkpoint["rows"][-1].items() if name.startswith("L_")}
    assert set(row) == {"L_sup", *terms.split()}
    zero = {name for name, value in row.items() if value == 0}
    sure = {"L_sup", "L_eln"} | ({"L_pseudo"} if "--filter" in options else set())  # ELN may reject all
    assert not zero & sure & {"L_sup", *terms.split()}
    names = {name.split(".")[0] for name in checkpoint["networks"]}
    assert names == {"student", "teacher"} | ({"auxiliary"} if "L_aux" in terms else set())
    before, after = load(work / "run/stage1.pt")["networks"], checkpoint["networks"]
    eln = [name for name in after if name.startswith("auxiliary.eln.")]
    assert any(not torch.equal(before[name], after[name]) for name in eln) == ("L_eln" in terms)

def test_the_s_ecn_of_both_stages(folder_run, work):
    options = "--corrector ecn --out ecn --pretrain-iters 1 --eln-iters 2".split()
    finishes(work, *STAGE1, *LISTED, *options)
    L_ecn = [float(row["L_eln"]) for row in rows(work / "ecn/log_stage1.csv")[1:]]
    assert all(value > 0.5 for value in L_ecn)  # about log 3: Eq. (6) would be far less
    assert load(work / "ecn/stage1.pt")["networks"]["auxiliary.eln.decoder.seg.2.weight"].shape[0] == 3
    stage2 = "train_stage2.py ecn --iters 2 --device cpu".split()
    refused(work, *stage2, "--filter", "eln", says="--filter eln ecn/stage1.pt")
    link(folder_run / "run", work / "run", "stage1.pt")
    refused(work, *NEW2, "--filter", "ecn", says="--filter ecn run/stage1.pt")
    finishes(work, *stage2)
    assert float(rows(work / "ecn/log_stage2.csv")[-1]["accepted"]) == 1  # every correction counts
    out = finishes(work, "evaluate.py", "ecn", "--error-localization")
    assert "s-ECN       error       pooled" in out and "2 unlabelled images" in out
    assert len(finishes(work, "evaluate.py", "ecn", "--figures", 1).split("figures: ")) == 2

def test_a_supervised_run_begins_stage_2_without_eln_alone(work):
    options = "--pretrain-iters 2 --eln-iters 0 --out supervised".split()
    finishes(work, "train_stage1.py", *FOLDER, *LISTED, *options)
    joint = ["--eln-iters", 3, "--pretrain-iters", 2, "--out", "supervised"]
    command = ["train_stage1.py", *FOLDER, *LISTED, *joint]
    refused(work, *command, says="supervised/stage1.pt --eln-iters 0 3")
    stage2 = "train_stage2.py supervised --iters 1 --device cpu".split()
    refused(work, *stage2, says="--filter eln supervised/stage1.pt")
    finishes(work, *stage2, "--filter", "threshold")

@pytest.mark.parametrize("threshold", [0.34, 0.5])
def test_pseudo_labels_of_each_filter(networks, threshold):
    nets, image_u = networks[0].eval(), networks[1][1]
    teacher, eln = nets["teacher"], nets["auxiliary"].eln
    with torch.no_grad():
        logits, feature, _ = teacher(image_u, embed=True)
        believed = eln(train_stage2.eln_input(image_u, logits)).sigmoid().round() == 1
    confident, every = logits.softmax(1).amax(1) > threshold, torch.ones_like(believed)
    for name, accepted in (("eln", believed), ("threshold", confident), ("none", every)):
        args = Namespace(filter=name, threshold=threshold)
        judge = eln.train() if name == "eln" else None  # it judges in eval mode all the same
        labels, valid, f_t = train_stage2.make_pseudo_labels(teacher, judge, image_u, args)
        assert torch.equal(labels, logits.argmax(1)) and torch.equal(f_t, feature)
        assert valid.dtype == torch.bool and torch.equal(valid, accepted), name
        assert eln.training or name != "eln"
    correction = torch.randn(2, 3, 48, 48)
    ecn = mock.Mock(return_value=correction)
    labels, valid, _ = train_stage2.make_pseudo_labels(teacher, ecn, image_u, Namespace(filter="ecn"))
    assert torch.equal(labels, correction.argmax(1)) and valid.all()


def test_accepted_are_the_shares_of_a_loop_over_pixels():
    """Of the batch of all processes, and of each class that is predicted."""
    generator = torch.Generator().manual_seed(0)
    classes = ["sky", "traffic light", "never predicted", "größe"]
    label = torch.tensor([0, 1, 3])[torch.randint(0, 3, (5, 6, 7), generator=generator)]
    valid = torch.rand(5, 6, 7, generator=generator) < 0.1 + 0.2 * label
    pixels, accepted = [0] * 4, [0] * 4
    for c, is_valid in zip(label.flatten().tolist(), valid.flatten().tolist()):
        pixels[c] += 1
        accepted[c] += is_valid
    names = {0: "accepted_0_sky", 1: "accepted_1_traffic_light", 3: "accepted_3_größe"}
    want = {"accepted": sum(accepted) / (5 * 6 * 7)}
    want.update({names[c]: accepted[c] / pixels[c] for c in names})

    def of_process(process):
        mine = images_of_process(5, process)
        return train_stage2.acceptance(label[mine], valid[mine], classes, process)

    for world in (1, 2, 3):
        for row in on_processes(world, of_process):
            assert row == pytest.approx(want) and list(row) == list(want)


# ---- Pixels of Eq. (10) ----


def on_processes(world, work):
    """[work(process) of each Process], on threads among which torch.distributed.all_reduce adds up."""
    barrier, parts, me = threading.Barrier(world), {}, threading.local()

    def all_reduce(tensor):
        parts[me.rank] = tensor.clone()
        barrier.wait(60)
        tensor.copy_(sum(parts[rank] for rank in range(world)))
        barrier.wait(60)

    def run(rank):
        me.rank = rank
        return work(Process(rank, world))

    with mock.patch.object(torch.distributed, "all_reduce", all_reduce), ThreadPoolExecutor(world) as pool:
        return list(pool.map(run, range(world)))


@pytest.mark.parametrize("share_valid", [0.0, 0.02, 0.6])
@pytest.mark.parametrize("number", [0, 1, 40, 10**6])
def test_pixels_of_V_are_drawn_however_the_batch_is_split(number, share_valid):
    generator = torch.Generator().manual_seed(0)
    pseudo_label = torch.randint(0, 21, (5, 48, 48), generator=generator)
    valid = torch.rand(5, 48, 48, generator=generator) < share_valid
    valid[1] = False  # an image that ELN rejects as a whole
    small = pseudo_label.masked_fill(~valid, 255)[:, 2::4, 2::4].flatten()  # nearest pixels at stride 4
    place = torch.arange(5 * 144.0).reshape(5, 1, 12, 12)  # a feature that tells its place in the batch
    args = Namespace(batch_size=5, contrast_pixels=number, seed=0)
    for step in (7, 9):
        order = np.random.default_rng([0, 2, 3, step]).permutation(5 * 144).tolist()
        drawn = [i for i in order if small[i] != 255]
        if number:
            drawn = drawn[:number]

        def draw(process):
            mine = images_of_process(5, process)
            f, f_teacher = place[mine].requires_grad_(), (place[mine] + 0.5).requires_grad_()
            labels = pseudo_label[mine], valid[mine]
            return train_stage2.pixels_of_V(f, f_teacher, *labels, args, step, process)

        for world in (1, 2, 3, 5):
            for rank, (f, f_teacher, label, labels, scale_V) in enumerate(on_processes(world, draw)):
                mine = images_of_process(5, Process(rank, world))
                own = [i for i in drawn if i // 144 in mine]
                assert f.flatten().tolist() == own and f.requires_grad
                assert f_teacher.flatten().tolist() == [i + 0.5 for i in drawn]
                assert not f_teacher.requires_grad
                assert label.tolist() == small[own].tolist() and labels.tolist() == small[drawn].tolist()
                assert scale_V == pytest.approx(len(own) / max(len(drawn), 1) / (len(mine) / 5))


@pytest.mark.parametrize("size", [1, 7, 50, 256])
def test_contrast_in_parts_is_eq_10(size):
    anchor, key = (torch.randn(n, 8, dtype=torch.float64, requires_grad=True) for n in (90, 70))
    labels = [torch.randint(0, 5, (n,)).masked_fill(torch.rand(n) < 0.2, 255) for n in (90, 70)]
    whole = losses.contrastive_loss(anchor, key, *labels, 0.5)
    parts = train_stage2.contrastive_loss_in_parts(anchor, key, *labels, 0.5, size)
    assert parts.item() == pytest.approx(whole.item(), rel=1e-12)
    one, other = (torch.autograd.grad(loss, anchor)[0] for loss in (whole, parts))
    assert (one - other).abs().max() <= 1e-12 * one.abs().max()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        train_stage2.contrastive_loss_in_parts(anchor, key, *labels, 0.5, size)
    assert max(kept) <= 90 * 8  # no part of the matrix waits for the backward pass

# ---- What the screen shows ----


@pytest.mark.parametrize("seconds, text", [
    (0, "0 s"), (119, "119 s"), (120, "2 minutes"), (7199, "120 minutes"),
    (7200, "2 hours"), (172799, "48 hours"), (172800, "2 days"), (864000, "10 days"),
])
def test_the_time_left_is_told_in_a_fitting_unit(seconds, text):
    assert train_stage1.duration(seconds) == f"about {text} left"


@pytest.mark.parametrize("start", [0, 3])
def test_a_pipe_shows_the_time_left_after_five_steps_and_at_rows(monkeypatch, capsys, start):
    """Steps of 2 seconds until the row at step 10, then of 6."""
    seconds = 0
    monkeypatch.setattr(train_stage1, "time", Namespace(monotonic=lambda: seconds))
    for rank in (0, 1):
        log = []
        steps = []
        batches = iter("abcdefghijklmnop"[start:])
        for step, batch in train_stage1.progress(batches, log, start, 16, Process(rank, 2)):
            steps.append((step, batch))
            seconds += 2 if step <= 10 else 6
            if step in (10, 13, 16):
                log.append({"step": step, "L_sup": 0.5})
        assert steps == list(enumerate("abcdefghijklmnop", 1))[start:]
        first = start + 5
        assert capsys.readouterr().out.splitlines() == (rank == 0) * [
            f"{first}/16  about {2 * (16 - first)} s left",
            "10/16  L_sup 0.5  about 12 s left",
            "13/16  L_sup 0.5  about 18 s left",
            "16/16  L_sup 0.5",
        ]


def test_a_step_after_the_pre_training_is_expected_to_take_as_long_as_four(monkeypatch, capsys):
    seconds = 0
    monkeypatch.setattr(train_stage1, "time", Namespace(monotonic=lambda: seconds))
    for _ in train_stage1.progress(iter("abcdefgh"), [], 0, 8, Process(), pretrain_iters=6):
        seconds += 2
    assert capsys.readouterr().out == f"5/8  about {2 * (1 + 4 * 2)} s left\n"


def test_a_row_is_shown_with_the_class_of_which_least_is_accepted():
    row = {"step": 3, "L_sup": 0.51234, "accepted": 0.5, "accepted_0_sky": 0.9}
    row.update(accepted_12_cell_wall=0.004, accepted_3_x=0.02, wrong_0=0.3, mIoU=31.25)
    shown = train_stage1.row_text(row)
    assert shown == "  L_sup 0.512  accepted 0.5 (cell_wall 0.004)  mIoU 31.2"
    for share, warns in ((0.0099, True), (0.01, False)):
        row["accepted"] = share
        assert ("(cell_wall 0.004), so almost no pseudo" in train_stage1.row_text(row)) == warns


def test_the_joint_steps_of_stage_1_tell_the_errors_in_words(capsys):
    errors = {"wrong_0": 0.025, "wrong_1": 0.0946, "wrong_2": 0.2, "eln_precision": 0.306, "eln_recall": 0.91}
    rows = [{"step": 1, "L_sup": 0.5, **errors}, {"step": 2, "L_sup": 0.5, **errors, "accepted_0_x": 1.0}]
    rows[1]["accepted"] = 0.5
    log = []
    for step, row in train_stage1.progress(iter(rows), log, 0, 2, Process()):
        log.append(row)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == (
        "    wrong pixels: the main decoder 2.5 %, D^1 9.5 %, D^2 20.0 %; "
        "ELN finds 91 % of these, and 31 % of what it rejects is wrong"
    )
    assert len(lines) == 3  # none in stage 2


@pytest.mark.parametrize("L_sup, alphas, idle", [
    (0.2, [5, 10], [2]),  # log 4 is 1.386: the bound of alpha is 6.93
    (0.2, [7, 3, 6.9], [1]),
    (0.01, [5, 138], []),
    (0.01, [139, 5, 140], [1, 3]),
    (0.2, [], []),
])
def test_decoders_that_eq_3_will_not_train_are_named(capsys, L_sup, alphas, idle):
    """The last tenth of the pre-training counts: two rows, whose mean is L_sup."""
    rows = [{"step": 18, "L_sup": 99.0}, {"step": 19, "L_sup": 1.5 * L_sup}]
    rows.append({"step": 20, "L_sup": 0.5 * L_sup})
    train_stage1.warn_of_idle_decoders(rows, Namespace(pretrain_iters=20, alphas=alphas), 4)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(idle)
    for k, line in zip(idle, lines):
        limit = f"log 4 / {alphas[k - 1]} = {math.log(4) / alphas[k - 1]:.3f}"
        start = f"Eq. (3) trains auxiliary decoder {k} once L_sup, now {L_sup:.3f}, is below"
        assert line.startswith(f"{start} {limit}; ")


def test_the_pre_training_ends_with_a_row_and_a_warning(work):
    options = "--log-every 50 --eval-every 50 --alphas 0.1 900".split()
    out = finishes(work, *STAGE1, *LISTED, *options)
    assert [row["step"] for row in rows(work / "run/log_stage1.csv")] == ["4", "7"]
    assert out.count("trains auxiliary decoder") == 1 and "Eq. (3) trains auxiliary decoder 2 once" in out


@pytest.mark.parametrize("amp, on_cpu, on_new_gpu, on_old_gpu", [
    ("auto", "float32", "bfloat16", "float16"),
    ("off", "float32", "float32", "float32"),
    ("bfloat16", "bfloat16", "bfloat16", "bfloat16"),
    ("float16", "float16", "float16", "float16"),
])
def test_the_type_of_mixed_precision(monkeypatch, amp, on_cpu, on_new_gpu, on_old_gpu):
    assert train_stage1.float_type(amp, torch.device("cpu")) == on_cpu
    for has_bfloat16, expected in ((True, on_new_gpu), (False, on_old_gpu)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: has_bfloat16)
        assert train_stage1.float_type(amp, torch.device("cuda")) == expected


# ---- Modes and gradients ----


def test_labels_come_from_fixed_statistics_and_before_the_step(folder_run, work, monkeypatch):
    link(folder_run / "run", work / "run", "stage1.pt")
    calls, forward, judge = [], DeepLabV3Plus.forward, ErrorLocalizationNetwork.forward

    def spy(name, original):
        def call(self, image, *args, **options):
            calls.append((name, self.training, torch.is_grad_enabled(), id(self)))
            return original(self, image, *args, **options)

        return call

    monkeypatch.setattr(DeepLabV3Plus, "forward", spy("main", forward))
    monkeypatch.setattr(ErrorLocalizationNetwork, "forward", spy("ELN", judge))
    finishes(work, *"train_stage2.py run --iters 2 --eval-every 1 --device cpu".split())
    labelling = [("main", False, False), ("ELN", False, False)]
    learning = [("main", True, True), ("ELN", True, True), ("main", True, True)]
    validation = [("main", False, False)] * 4  # two images, by student and teacher
    begin = calls[:2]  # the row of step 0: two images, by the student
    calls = calls[2:]
    assert [call[:3] for call in calls] == 2 * (labelling + learning + validation)
    teacher, eln, student, eln_again, student_again = (call[3] for call in calls[:5])
    assert eln == eln_again and student == student_again and teacher != student
    assert [call[3] for call in calls[5:9]] == [student, student, teacher, teacher]
    assert [call[1:] for call in begin] == 2 * [(False, False, student)]


def test_after_a_step_all_processes_have_the_first_ones_statistics(networks, monkeypatch):
    sent, buffers = [], [(id(buffer), 0) for buffer in networks[0].buffers()]
    monkeypatch.setattr(train_stage1.dist, "broadcast", lambda tensor, rank: sent.append((id(tensor), rank)))
    for world, device, expected in ((1, "cpu", []), (3, "cuda", []), (3, "cpu", buffers)):
        train_stage1.same_statistics(networks[0], Process(0, world, torch.device(device)))
        assert sent == expected
    assert len(sent) > 200

@pytest.mark.parametrize("stage, options", [(1, "--alphas 0 0"), (2, ""), (2, "--filter none")])
def test_a_step_has_the_gradient_of_the_sum_of_its_losses(folder_run, work, monkeypatch, stage, options):
    """Stage 2 has two backward passes; here one graph has all. AdamW's first moment is 0.1 gradient."""
    script = train_stage1 if stage == 1 else train_stage2
    kept, batches = [], []
    prepare, to_device = script.prepare, script.to_device

    def keep_networks(nets, *args):
        kept.append(copy.deepcopy(nets))
        return prepare(nets, *args)

    def keep_batch(*args):
        batches.append(to_device(*args))
        return batches[-1]

    monkeypatch.setattr(script, "prepare", keep_networks)
    monkeypatch.setattr(script, "to_device", keep_batch)
    monkeypatch.chdir(work)
    link(folder_run / "run", work / "run", "stage1.pt")
    command = "run --iters 1".split()
    if stage == 1:
        command = [*STAGE1[1:], *LISTED, *"--pretrain-iters 0 --eln-iters 1".split()]
    args = script.parse_args([*command, *options.split(), "--device", "cpu", "--out", "once"])
    process = train_stage1.start_process(args)
    script.train(args, process)

    (nets,), (image, label) = kept, batches[0]
    main = nets["main"] if stage == 1 else nets["student"]
    auxiliary = nets["auxiliary"] if "auxiliary" in nets else None
    nets.train()
    if stage == 2:
        image_u, image_a = batches[1]
        teacher, eln = copy.deepcopy(main).eval(), auxiliary and copy.deepcopy(auxiliary.eln)
        made, valid, f_t = train_stage2.make_pseudo_labels(teacher, eln, image_u, args)
    seed_step(args.seed, stage, 1, process)
    logits, _, encoded = main(image)
    total = losses.supervised_loss(logits, label)
    if auxiliary:
        aux_logits, valid_logits = auxiliary(image, logits, *encoded)
        L_aux = losses.auxiliary_loss(aux_logits, logits, label, args.alphas)
        total = losses.labeled_loss(total, L_aux, losses.eln_loss(valid_logits, [logits, *aux_logits], label))
    if stage == 2:
        logits_a, f, _ = main(image_a, embed=True)
        *pixels, scale_V = train_stage2.pixels_of_V(f, f_t, made, valid, args, 1, process)
        L_contra = scale_V * losses.contrastive_loss(*pixels, args.tau)
        total = total + losses.unlabeled_loss(losses.pseudo_label_loss(logits_a, made, valid), L_contra)
    total.backward()
    named = [(name, p) for name, p in nets.named_parameters() if p.requires_grad]
    encoders = [p for name, p in named if "encoder." in name]
    expected = [p.grad for p in [*encoders, *(p for name, p in named if "encoder." not in name)]]
    state = load(work / f"once/stage{stage}.pt")["optimizer"]["state"]
    assert len(state) == len(expected) and sum(bool(g.any()) for g in expected) > 60
    for number, want in enumerate(expected):
        got = state[number]["exp_avg"] / 0.1
        assert (got - want).abs().max() <= 1e-3 * want.abs().max() + 1e-7


def test_gradients_reach_only_what_a_loss_trains(networks):
    def reached(*names):
        nets, (image, image_u, image_a) = copy.deepcopy(networks[0]).train(), networks[1]
        teacher, args = nets["teacher"].eval(), Namespace(filter="none")
        labels, valid, feature_t = train_stage2.make_pseudo_labels(teacher, None, image_u, args)
        logits, _, encoded = nets["student"](image)
        aux_logits, valid_logits = nets["auxiliary"](image, logits, *encoded)
        logits_a, feature_s, _ = nets["student"](image_a, embed=True)
        label = torch.arange(2 * 48 * 48).reshape(2, 48, 48) % 3
        f, f_t = (x.permute(0, 2, 3, 1).flatten(0, 2) for x in (feature_s, feature_t))
        y = torch.arange(len(f)) % 3
        values = {
            "L_sup": losses.supervised_loss(logits, label),
            "L_aux": losses.auxiliary_loss(aux_logits, logits, label, [0, 0]),
            "L_eln": losses.eln_loss(valid_logits, [logits, *aux_logits], label),
            "L_pseudo": losses.pseudo_label_loss(logits_a, labels, valid),
            "L_contra": losses.contrastive_loss(f, f_t, y, y),
        }
        sum(values[name] for name in names).backward()
        touched = [n for n, p in nets.named_parameters() if p.grad is not None and p.grad.any()]
        return {"eln" if "eln." in name else ".".join(name.split(".")[:2]) for name in touched}

    assert reached("L_eln") == {"eln"}
    assert reached("L_aux") == {"auxiliary.decoders"}
    assert reached("L_sup", "L_pseudo", "L_contra") == {"student.encoder", "student.decoder"}

# ---- evaluate.py ----


def sheet_size(columns, lines, legend):
    """Of panels of 48 pixels, which are enlarged four times, between margins of 4; captions of
    24 pixels on top, lines of the legend of 27 below."""
    return columns * (4 * 48 + 4) + 4, 24 + lines * (4 * 48 + 4) + 4 + 27 * legend


def test_evaluate_scores_and_draws(shapes_run, work):
    out = finishes(work, "evaluate.py", shapes_run, "--figures", 2, "--device", "cpu")
    columns = ("stage 1", "student", "teacher")
    for word in ("background", *columns, "mean", "average precision", "figures/student.png"):
        assert word in out
    with Image.open(shapes_run / "figures/student.png") as image:
        assert image.size == sheet_size(7, 2, legend=2)

def test_evaluate_predicts_any_image_without_the_data_set(shapes_run, work):
    link(shapes_run, work / "student", "student_stage2.pt")
    finishes(work, "evaluate.py", "student", "--predict", "datasets/images/t3.jpg")
    size = Image.open(work / "datasets/images/t3.jpg").size
    for kind, mode in (("class", "L"), ("colour", "RGB"), ("overlay", "RGB")):
        image = Image.open(work / f"student/predictions/student/t3_{kind}.png")
        assert (image.size, image.mode) == (size, mode)

def test_evaluate_localizes_errors_with_the_masks_of_another_place(folder_run, work):
    out = finishes(work, "evaluate.py", folder_run / "run", "--data", "datasets", "--error-localization")
    assert "2 unlabelled images" in out  # t4 and t5 have masks here
    found = {tuple(line.split()[:3]) for line in out.splitlines()[2:]}
    kinds = {(kind, over) for kind in ("correct", "error") for over in ("image", "pooled")}
    kinds.add(("error", "AP"))
    assert found >= {(method, *kind) for method in ("ELN", "confidence") for kind in kinds}

def test_several_runs_are_compared_and_shown_side_by_side(folder_run, shapes_run, work, run_apart):
    link(folder_run / "run", work / "again")
    done = run_apart(work, "evaluate.py", folder_run / "run", "again", "--compare")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 3 and "| stage 2 | 1 (2 runs) |" in done.stdout
    refused(work, "evaluate.py", folder_run / "run", "again", says="--compare --figures")
    finishes(work, "evaluate.py", "again", folder_run / "run", "--figures", 2)
    with Image.open(work / "again/figures/compare.png") as image:
        assert image.size == sheet_size(4, 2, legend=1)  # image, truth, two runs
        panels = np.asarray(image)[24 : 24 + 2 * 196, 4 + 2 * 196 :]
        assert np.array_equal(panels[:, :192], panels[:, 196 : 196 + 192])  # the same run twice
    both = "evaluate.py", folder_run / "run", shapes_run, "--compare", "--csv", "all.csv"
    assert len(finishes(work, *both).splitlines()) == 5
    table = rows(work / "all.csv")
    for row, folder in zip(table, (folder_run / "run", shapes_run), strict=True):
        begin, *log = rows(folder / "log_stage2.csv")
        assert (row["run"], row["steps"]) == (str(folder), "3")
        assert row["stage_1"] == begin["mIoU"]
        for last, best, column in (
            ("mIoU", "best", "mIoU"), ("teacher", "teacher_best", "mIoU_teacher"),
        ):
            values = [one[column] for one in log if one[column]]
            assert (row[last], row[best]) == (values[-1], max(values, key=float))
        accepted = [float(one["accepted"]) for one in log]
        assert float(row["accepted"]) == pytest.approx(sum(accepted) / 3)
        args = load(folder / "stage2.pt")["args"]
        assert (row["beta"], row["filter"]) == (f"{args['beta']}", "eln")
    path = str(shapes_run / "stage2.pt")
    refused(work, "evaluate.py", "again", shapes_run, "--figures", 1, says=f"{path} classes data set")

# ---- Refusals ----


def write(name, content=b""):
    return lambda data: (data / name).write_bytes(content)

def cut(name):
    return lambda data: os.truncate(data / name, (data / name).stat().st_size // 2)

def remove(name):
    return lambda data: shutil.rmtree(data / name) if (data / name).is_dir() else (data / name).unlink()

def paint(name, *shape, value=0):
    return lambda data: Image.fromarray(np.full(shape, value, np.uint8)).save(data / name)

# What happens to the data set, or else which options are given; and what the message must name.
BAD_DATA = [
    (remove(""), "datasets/images is not a folder"),
    (remove("images"), "datasets/images is not a folder"),
    (remove("train.txt"), "datasets/train.txt"),
    (write("train.txt"), "train.txt no image"),
    (write("val.txt"), "val.txt no image"),
    (write("classes.txt", b"thing\n"), "classes.txt"),
    (write("train.txt", b"t0\nt1\nghost\n"), "train.txt ghost"),
    (write("images/t1.jpg", b"not an image"), "images/t1.jpg"),
    (write("images/t7.jpg", b"not an image"), "images/t7.jpg"),  # an unlabelled one
    (write("images/v1.jpg", b"not an image"), "images/v1.jpg"),
    (write("masks/t1.png", b"not an image"), "masks/t1.png"),
    (cut("images/t1.jpg"), "images/t1.jpg"),
    (cut("masks/t1.png"), "masks/t1.png"),
    (paint("masks/t1.png", 9, 9), "masks/t1.png images/t1.jpg (9, 9) (44, 56)"),
    (paint("masks/v1.png", 9, 9), "masks/v1.png images/v1.jpg"),
    (paint("masks/t1.png", 44, 56, value=3), "masks/t1.png value 3"),
    (paint("masks/t1.png", 44, 56, 3), "masks/t1.png RGB"),
    (remove("masks/t1.png"), "images/t1.jpg no mask"),
    (remove("masks/v1.png"), "v1"),
    (write("labeled.txt"), "labeled.txt"),
    ("--unlabeled-list datasets/train.txt", "overlap t0"),
    ("--weights no.pth", "no.pth"),
    ("--eln-weights no.pth", "no.pth"),
    ("--batch-size 0", "--batch-size"),
    ("--pretrain-iters 0 --eln-iters 0", "--pretrain-iters"),
    ("--amp int8", "--amp"),
]


@pytest.mark.parametrize("damage, says", BAD_DATA, ids=[says for _, says in BAD_DATA])
def test_bad_data_is_refused_before_anything_is_written(work, damage, says):
    if callable(damage):
        damage(work / "datasets")
    options = [] if callable(damage) else damage.split()
    refused(work, *STAGE1, *LISTED, *options, "--workers", 2, says=says)

@pytest.mark.parametrize("ratio", ["x", "", "0", "-1", "1/0", "2", "nan", "1/9", "7/8"])
def test_nonsense_ratios_are_refused(work, ratio):
    refused(work, *STAGE1, "--ratio", ratio, says=f"--ratio {ratio}")

def test_data_may_lie_anywhere(work):
    (work / "datasets").rename(work / "elsewhere")
    refused(work, *STAGE1, "--data", "elsewhere", "--ratio", "x", says="--ratio x")

def test_bad_data_leaves_an_existing_run_as_it_is(folder_run, work):
    link(folder_run / "run", work / "run")
    cut("images/t1.jpg")(work / "datasets")
    refused(work, *NEW2, says="images/t1.jpg")

def apart(cwd, *command):
    """As here, with smaller networks, in a process of its own: what loader processes print is seen too."""
    done = subprocess.run(kill_runs.small(*command), cwd=cwd, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("run", [here, apart])
def test_image_that_breaks_while_loading_ends_in_one_line(folder_run, work, run):
    """Of unlabelled images only the headers are read before the first step."""
    link(folder_run / "run", work / "run", "stage1.pt")
    cut("images/t6.jpg")(work / "datasets")
    before = disk(work)
    code, _, err = run(work, *STAGE2, "--workers", 2 if run is apart else 0)
    one_line(code, err, "images/t6.jpg")
    assert disk(work) == before


class Code:
    """An object that makes a folder where it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("executed",)

def broken_file(kind, path, source=None):
    """Write a checkpoint of no use; source is a good one."""
    if kind == "truncated":
        with open(source, "rb") as file:
            path.write_bytes(file.read(source.stat().st_size // 2))
    elif kind == "code":
        good = load(source) if source else {}
        torch.save({**good, "networks": {}, "network": {}, "optimizer": Code()}, path)
    elif kind == "another":
        torch.save({"conv1.weight": torch.zeros(64, 3, 7, 7)}, path)
    else:
        path.write_bytes(kind.encode())

@pytest.mark.parametrize("kind", ["truncated", "code", "another", "", "train_0001\ntrain_0002\n"])
def test_broken_checkpoints_are_refused(folder_run, work, kind):
    run = folder_run / "run"
    link(run, work / "run", "student_stage2.pt")
    broken_file(kind, work / "run/stage1.pt", run / "stage1.pt")
    refused(work, *STAGE1, *LISTED, says="run/stage1.pt")
    refused(work, *STAGE2, says="run/stage1.pt")
    broken_file(kind, work / "run/stage2.pt", run / "stage2.pt")
    (work / "run/stage1.pt").unlink()
    os.link(run / "stage1.pt", work / "run/stage1.pt")
    refused(work, *STAGE2, says="run/stage2.pt")
    refused(work, "evaluate.py", "run", says="run/stage2.pt")
    broken_file(kind, work / "run/student_stage1.pt", run / "student_stage1.pt")
    refused(work, "evaluate.py", "run", "--stage", 1, says="run/student_stage1.pt")

@pytest.mark.parametrize("option, kind", [
    ("--weights", "code"),
    ("--weights", "another"),
    ("--weights", ""),
    ("--eln-weights", "code"),
    ("--eln-weights", "train_0001\ntrain_0002\n"),
])
def test_weights_of_other_kinds_are_refused(work, option, kind):
    broken_file(kind, work / "file.pth")
    refused(work, *STAGE1, *LISTED, option, "file.pth", says="file.pth")

@pytest.mark.parametrize("change, options, says", [
    ({}, "no", "no/stage1.pt does not exist"),
    ({}, "--dataset voc", "runs/voc-1_20-0/stage1.pt does not exist"),
    ({}, "--out elsewhere", "elsewhere/stage1.pt does not exist"),
    ({"step": 3}, "run", "run/stage1.pt unfinished"),
    ({"labeled": ["t0", "ghost"]}, "run", "ghost"),
    ({"masks": 1}, "run", "masks labelled run/stage1.pt"),
    ({"classes": ["background", "red", "blue", "green"]}, "run", "run/stage1.pt classes"),
    ({"networks": {}}, "run", "run/stage1.pt other networks"),
    ({}, "run --backbone resnet34", "--backbone train_stage1.py alone"),
    ({}, "run --size 64 64", "--size train_stage1.py alone"),
    ({}, "run --alphas=1", "--alphas train_stage1.py alone"),
    ({}, "run --bckbone resnet34", "unrecognized --bckbone"),
    ({}, "run --dataset shapes", "--dataset shapes folder"),
    ({}, "run --ratio 1/3", "--ratio 1/3 None"),
])
def test_stage_2_wants_a_finished_stage_1_that_fits(folder_run, work, change, options, says):
    link(folder_run / "run", work / "run", "stage1.pt")
    if change:
        (work / "run/stage1.pt").unlink()  # the file itself is shared with folder_run
        torch.save({**load(folder_run / "run/stage1.pt"), "optimizer": {}, **change}, work / "run/stage1.pt")
    refused(work, "train_stage2.py", *options.split(), says=says)

def test_stage_1s_file_does_not_choose_where_stage_2_writes(folder_run, work, monkeypatch):
    content = load(folder_run / "run/stage1.pt")
    content["args"].update(filter="/../../x", losses=["/../../x"], out="/x", run="/x")
    content["args"].update(iters=1, device="cuda", amp="int8")
    (work / "run").mkdir()
    torch.save(content, work / "run/stage1.pt")
    monkeypatch.chdir(work)
    args = train_stage2.parse_args(["run"])
    folder = train_stage2.DEFAULTS["folder"]
    assert (args.filter, args.losses, args.out, args.run) == ("eln", ["contra", "pseudo"], "run", "run")
    assert (args.iters, args.device, args.amp) == (folder["iters"], "auto", "auto")


@pytest.mark.parametrize("change", [
    {"width": "8x"}, {"size": [0, -5]}, {"alphas": 5.5e9}, {"corrector": "/../../x"}, {"workers": -1},
    {"dataset": "x"}, {"backbone": "vgg"}, {"eln_iters": "many"},
])
def test_options_that_stage_1_would_refuse_are_refused_in_its_file(folder_run, work, change):
    content = load(folder_run / "run/stage1.pt")
    content["args"].update(change)
    (work / "run").mkdir()
    torch.save(content, work / "run/stage1.pt")
    refused(work, *NEW2, says="run/stage1.pt options")


def test_the_images_of_another_run_are_refused(folder_run, work):
    link(folder_run / "run", work / "run")
    write("classes.txt", b"background\nred\nblue\ngreen\n")(work / "datasets")
    refused(work, *STAGE1, *LISTED, says="run/stage1.pt classes")
    refused(work, *STAGE2, says="run/stage1.pt classes")
    refused(work, "evaluate.py", "run", says="run/stage2.pt classes")

def test_stage_2_does_not_begin_with_a_stage_2(folder_run, work):
    link(folder_run / "run", work / "run", "stage2.pt")
    (work / "run/stage2.pt").rename(work / "run/stage1.pt")
    refused(work, *STAGE2, says="run/stage1.pt")

@pytest.mark.parametrize("damage, options, says", [
    (None, "datasets", "datasets/student_stage1.pt"),
    (None, "nowhere", "nowhere/student_stage1.pt does not exist"),
    (None, "run --data nowhere", "nowhere/images"),
    (None, "run --predict no.jpg", "no.jpg"),
    (None, "run --predict datasets/train.txt", "datasets/train.txt"),
    (cut("images/t1.jpg"), "run --predict datasets/images/t1.jpg", "t1.jpg"),
    (cut("images/v1.jpg"), "run", "images/v1.jpg"),
    (remove("masks/v1.png"), "run", "v1 has no mask"),
    (remove("masks"), "run --figures 1", "mask"),
])
def test_evaluate_refuses_what_it_cannot_use(folder_run, work, damage, options, says):
    link(folder_run / "run", work / "run")
    if damage:
        damage(work / "datasets")
    refused(work, "evaluate.py", *options.split(), says=says)


def test_evaluate_refuses_in_one_line_what_a_loader_process_cannot_read(folder_run, work):
    link(folder_run / "run", work / "run")
    cut("images/v1.jpg")(work / "datasets")
    code, _, err = apart(work, "evaluate.py", "run", "--workers", 2)
    one_line(code, err, "images/v1.jpg")

def test_one_process_checks_the_files_for_all(tmp_path, monkeypatch, capsys):
    dataset, ids = Namespace(name="folder", val=["v"], classes=["a", "b"]), [f"{i}" for i in range(1000)]
    monkeypatch.setattr(train_stage1, "masks_checksum", lambda *args: 5)
    monkeypatch.setattr(train_stage1, "check_files", check := mock.Mock(return_value=["a note \x1b[2J"]))
    args = Namespace(out=str(tmp_path / "run"), size=[32, 32])
    for rank in (0, 1, 2):
        train_stage1.open_run(1, args, dataset, ids[:9], ids[9:], Process(rank, 3))
    check.assert_called_once_with(dataset, ids[:9], ids[9:], [32, 32])
    said = "looking at the files of 1,001 images ...\na note \\x1b[2J\n"
    assert capsys.readouterr().out == said

def test_more_processes_than_images_are_refused(work, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    refused(work, *STAGE1, "--batch-size", 2, says="--batch-size 2 3 processes")

# ---- Command line ----


@pytest.mark.parametrize("script, defaults", [
    ("train_stage1.py", "512 6 0.0001 1e-05 resnet50 resnet34 imagenet 18620 13300 1/20 20.0"),
    ("train_stage2.py", "6 0.0001 1e-05 101080 1/20 0.995 0.5 4096"),
])
def test_help_shows_the_papers_defaults(tmp_path, script, defaults):
    text = " ".join(finishes(tmp_path, script, "--dataset", "voc", "--help").split())
    shown = " ".join(part.partition(")")[0] for part in text.split("(default: ")[1:])
    assert set(defaults.split()) <= set(re.split(r"[][, ]+", shown))
    assert "--error-localization" in finishes(tmp_path, "evaluate.py", "--help")

def test_the_papers_settings_are_the_defaults():
    args = train_stage1.parse_args(["--dataset", "voc", "--batch-size", "6"])
    assert args == train_stage1.parse_args(["--dataset", "voc"])
    assert (args.size, args.lr, args.alphas, args.out) == ([512, 512], 1e-4, [20.0, 50.0], "runs/voc-1_20-0")
    args = train_stage1.parse_args(["--dataset", "cityscapes"])
    assert (args.size, args.batch_size, args.ratio) == ([512, 1024], 4, "1/8")

def test_a_folder_and_shapes_have_defaults_of_their_own():
    args = train_stage1.parse_args(["--dataset", "folder"])
    assert (args.size, args.backbone, args.alphas) == ([128, 128], "resnet18", [5.0, 10.0])
    assert (args.ratio, args.out) == (None, "runs/folder-all")
    paper = "--dataset voc --ratio 1/8".split()
    assert train_stage1.parse_args(paper).alphas == [20.0, 50.0]
    ratio = train_stage1.parse_args("--dataset folder --ratio 1/2 --split 3".split())
    listed = train_stage1.parse_args("--dataset folder --labeled-list x/mine.txt".split())
    assert (ratio.out, listed.out) == ("runs/folder-1_2-3", "runs/folder-mine")

def test_a_folder_without_ratio_labels_every_image_that_has_a_mask(work):
    options = "--pretrain-iters 1 --eln-iters 0".split()
    finishes(work, "train_stage1.py", *FOLDER, *options)
    found = load(work / "runs/folder-all-supervised/stage1.pt")
    assert found["labeled"] == ["t0", "t1", "t2", "t3", "t4", "t5"]
    assert found["unlabeled"] == ["t6", "t7"]

def test_stage_2_takes_the_defaults_of_its_stage_1s_data_set(folder_run):
    args = train_stage2.parse_args([str(folder_run / "run")])
    folder = train_stage2.DEFAULTS["folder"]
    assert (args.dataset, args.iters) == ("folder", folder["iters"])
    assert args.contrast_pixels == folder["contrast_pixels"] != 4096

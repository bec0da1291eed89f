"""What happens to runs: asked to stop, no room on the disk, a loss that is not finite, odd files.

    python -m pytest tests/test_faults.py        (from the root; two and a half minutes on two cores)
"""

import contextlib
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
import torchvision

import losses
import mutate_inputs
import train_stage1
from conftest import (
    NO_WEIGHTS, ROOT, TINY, free_port, here, leaves, load, make_folder, rows, same_run,
)

FOLDER = ["--dataset", "folder", *NO_WEIGHTS, *TINY, "--labeled-list", "datasets/labeled.txt"]
STAGE1 = ["train_stage1.py", *FOLDER, *"--out run --pretrain-iters 4 --eln-iters 4 --save-every 3".split()]
STAGE2 = "train_stage2.py --dataset folder --out run --iters 4 --device cpu".split()
STAGE2 += "--log-every 1 --save-every 3".split()


@pytest.fixture(scope="module", autouse=True)
def shallow():
    """A ResNet of one block a stage, in this process: half the numbers to compute and to write."""

    def resnet(name, weights):
        return torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1])

    with mock.patch.object(torchvision.models, "get_model", resnet):
        yield


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A folder whose "run" holds both stages."""
    path = tmp_path_factory.mktemp("undisturbed")
    make_folder(path / "datasets")
    for command in (STAGE1, STAGE2):
        assert here(path, *command)[0] == 0
    yield path
    shutil.rmtree(path)


@pytest.fixture
def work(tmp_path):
    """A folder with datasets alone."""
    make_folder(tmp_path / "datasets")
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.fixture(params=[1, 2], ids=["stage 1", "stage 2"])
def stage(request, undisturbed, work):
    """(stage, command) of a stage that can begin in `work`."""
    if request.param == 2:
        (work / "run").mkdir()
        os.link(undisturbed / "run/stage1.pt", work / "run/stage1.pt")
    return request.param, (STAGE1 if request.param == 1 else STAGE2)


def at_step(number, act, name="supervised_loss"):
    """Change a loss: act(value) takes the place of its value in the step of this number (the first is 1)."""
    calls, function = [], getattr(losses, name)

    def acting(*args, **options):
        calls.append(None)
        value = function(*args, **options)
        return act(value) if len(calls) == number else value

    return mock.patch.object(losses, name, acting)


def worker_of(launcher, rank):
    """The process id of torchrun's worker of this rank."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == launcher and f"RANK={rank}" in (folder / "environ").read_text().split("\0"):
                return int(folder.name)


def wait_for_steps(process, run, number):
    """Until the log of stage 1 has so many rows."""
    log = run / "log_stage1.csv"
    while not log.exists() or len(log.read_text().splitlines()) < number + 1:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)


@contextlib.contextmanager
def launched(cwd, *command, stdout=subprocess.DEVNULL):
    """Python with these arguments, in a session of its own; what is left of it is killed."""
    process = subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=cwd, text=True, start_new_session=True,
        stdout=stdout, stderr=subprocess.PIPE,
        env={**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},  # see README, GPUs
    )
    try:
        yield process
    finally:
        process.kill()
        process.stderr.close()


def group_is_gone(group):
    """Whether all processes of a process group end within half a minute."""
    for _ in range(300):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.skipif(not Path("/proc").exists(), reason="finds the worker in /proc")
def test_torchrun_stops_together_and_restarts_a_killed_worker(work, run_apart):
    script, *options = STAGE1
    options += ["--save-every", "1"]
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node=2 --max-restarts=3".split()
    command = [*torchrun, ROOT / script, *options]

    with launched(work, *command) as process:
        wait_for_steps(process, work / "run", 2)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=120)
    assert process.returncode not in (0, -signal.SIGKILL) and group_is_gone(process.pid)
    assert err.count("asked to stop; run/stage1.pt holds") == 1
    done = load(work / "run/stage1.pt")["step"]
    assert 2 <= done < 8 and len(rows(work / "run/log_stage1.csv")) == done

    with launched(work, *command) as process:
        wait_for_steps(process, work / "run", done + 1)
        os.kill(worker_of(process.pid, 1), signal.SIGKILL)
        _, err = process.communicate(timeout=240)
    assert process.returncode == 0 and "exitcode: -9" in err, err

    (work / "no_changes.py").write_text("")
    twin = f"2 {free_port()} {' '.join(STAGE1)} --out twin"
    alone = run_apart(work, "tests/fork_processes.py", "no_changes.py", twin)
    assert alone.stdout.endswith("0 0\n"), alone.stderr
    same_run(work / "run", work / "twin", 1)


def test_ctrl_c_reaches_loaders_too_and_the_step_is_saved(work):
    script, *options = STAGE1
    with launched(work, ROOT / script, *options, "--pretrain-iters", 999, "--workers", 2) as process:
        wait_for_steps(process, work / "run", 2)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and group_is_gone(process.pid)
    assert len(err.strip().splitlines()) == 2 and "stopping after this step" in err
    assert load(work / "run/stage1.pt")["step"] == len(rows(work / "run/log_stage1.csv")) >= 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_a_run_saves_the_step_and_says_how_to_go_on(undisturbed, work, stage, number):
    stage, command = stage
    with at_step(2, lambda value: os.kill(os.getpid(), number) or value):
        code, _, err = here(work, *command)
    assert code == 128 + number
    assert err.count("\n") == 1 and f"run/stage{stage}.pt holds 2 steps" in err
    python, script, *options = err.partition("to go on: ")[2].split()
    assert (python, Path(script).name, options) == ("python", command[0], command[1:])
    assert load(work / f"run/stage{stage}.pt")["step"] == 2
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler  # as before the run
    assert here(work, *command)[0] == 0
    same_run(work / "run", undisturbed / "run", stage)


def test_ctrl_c_that_ends_the_readers_too_saves_the_step(work):
    """As under `2>&1 | tee log`: tee is gone when the script says what it does."""
    script, *options = STAGE1
    command = [*options, "--pretrain-iters", 999, "--save-every", 999]
    with launched(work, ROOT / script, *command, stdout=subprocess.PIPE) as process:
        wait_for_steps(process, work / "run", 2)
        process.stdout.close()
        process.stderr.close()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    assert load(work / "run/stage1.pt")["step"] >= 2


def test_asked_to_stop_in_the_last_step_a_run_ends_well(undisturbed, work, stage):
    stage, command = stage
    with at_step(8 if stage == 1 else 4, lambda value: os.kill(os.getpid(), signal.SIGTERM) or value):
        assert here(work, *command)[0] == 0
    same_run(work / "run", undisturbed / "run", stage)


@contextlib.contextmanager
def largest_file(size):
    """Let files grow to `size` bytes; a larger one fails as it does on a full disk. Call it to begin."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda value=None: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1])) or value
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size, stage1_file, stage2_file", [
    (100_000, "stage1.pt", "student_stage2.pt"),
    (0, "log_stage1.csv", "log_stage2.csv"),
])
def test_full_disk_leaves_the_old_checkpoint(undisturbed, work, stage, size, stage1_file, stage2_file):
    stage, command = stage
    with largest_file(size) as begin, at_step(4, begin):
        code, _, err = here(work, *command)
    file = stage1_file if stage == 1 else stage2_file
    assert code == 1 and err.count("\n") == 1
    assert err == f"{command[0]}: run/{file} cannot be written (File too large)\n"
    assert load(work / f"run/stage{stage}.pt")["step"] == 3
    assert not list((work / "run").glob("*.part"))
    if size:
        assert here(work, *command)[0] == 0
        same_run(work / "run", undisturbed / "run", stage)


def test_a_folder_that_cannot_be_written_is_refused_before_the_first_step(work):
    with largest_file(0) as begin:
        begin()
        code, _, err = here(work, *STAGE1)
    assert code == 2 and "--out run cannot be written" in err and err.count("\n") == 1
    shutil.rmtree(work / "run")
    (work / "run").write_text("a file")
    code, _, err = here(work, *STAGE1)
    assert code == 2 and "run" in err and err.count("\n") == 1


def finite(path):
    """Whether all numbers of a checkpoint are."""
    return all(value.isfinite().all() for _, value in leaves(load(path)) if isinstance(value, torch.Tensor))


TERMS = {
    "L_sup": "supervised_loss", "L_aux": "auxiliary_loss", "L_eln": "eln_loss",
    "L_pseudo": "pseudo_label_loss", "L_contra": "contrastive_loss",
}


STAGES_TERMS = [*((1, term) for term in list(TERMS)[:3]), *((2, term) for term in TERMS)]


@pytest.mark.parametrize("stage, term", STAGES_TERMS, indirect=["stage"])
@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_loss_that_is_not_finite_names_its_term_and_step(work, stage, term, number):
    stage, command = stage
    joint = stage == 1 and term != "L_sup"  # the auxiliary losses begin in step 5
    with at_step(1 if joint else 4, lambda value: value + number, TERMS[term]):
        code, _, err = here(work, *command)
    assert re.search(rf": step {5 if joint else 4}: {term} is (nan|inf);", err), err
    assert code == 1 and err.count("\n") == 1
    assert load(work / f"run/stage{stage}.pt")["step"] == 3 and finite(work / f"run/stage{stage}.pt")


def broken_gradient(value):
    """The same value, with a gradient of NaN."""
    return value + (0 * value).sqrt()


def test_gradient_that_is_not_finite_stops_the_run(work, stage):
    stage, command = stage
    with at_step(4, broken_gradient):
        code, _, err = here(work, *command)
    assert code == 1 and ": step 4: the gradient's norm is nan" in err and err.count("\n") == 1
    assert load(work / f"run/stage{stage}.pt")["step"] == 3 and finite(work / f"run/stage{stage}.pt")


def test_diverging_run_saves_nothing_that_is_not_finite(work, stage):
    stage, command = stage
    code, _, err = here(work, *command, "--lr", 1e9, "--save-every", 1)
    assert code == 1 and "step " in err and err.count("\n") == 1
    path = work / f"run/stage{stage}.pt"
    assert not path.exists() or finite(path)


def test_statistics_that_are_not_finite_reach_no_file(work, stage):
    stage, command = stage

    def ruin(value):
        """Some BatchNorm's variance overflows; losses and gradients stay finite."""
        frame = sys._getframe()
        while "nets" not in frame.f_locals:
            frame = frame.f_back
        buffers = frame.f_locals["nets"].named_buffers()
        next(buffer for name, buffer in buffers if "running_var" in name).data.fill_(math.inf)
        return value

    last = 8 if stage == 1 else 4
    with at_step(last, ruin):
        code, _, err = here(work, *command)
    assert code == 1 and f"running_var is not finite after step {last}" in err and err.count("\n") == 1
    assert load(work / f"run/stage{stage}.pt")["step"] in (3, 6) and finite(work / f"run/stage{stage}.pt")
    assert not (work / f"run/student_stage{stage}.pt").exists() and not (work / "run/result.json").exists()


def test_float16_counts_skipped_steps(work, stage):
    stage, command = stage
    with at_step(2, broken_gradient):
        few = "--pretrain-iters 3 --eln-iters 0".split() if stage == 1 else "--iters 3".split()
        assert here(work, *command, *few, "--amp", "float16")[0] == 0
    log, checkpoint = rows(work / f"run/log_stage{stage}.csv"), load(work / f"run/stage{stage}.pt")
    assert [row["skipped"] for row in log] == ["0", "1", "1"]
    assert checkpoint["skipped"] == [1, 0] and checkpoint["scaler"]["scale"] == 65536 / 2
    assert {int(state["step"]) for state in checkpoint["optimizer"]["state"].values()} == {2}
    assert finite(work / f"run/stage{stage}.pt")


def test_float16_stops_when_every_gradient_overflows(undisturbed, work):
    def overflowing(logits, label):
        return broken_gradient(losses.cross_entropy(logits, label).mean())

    command = [*STAGE2, "--stage1", undisturbed / "run/stage1.pt", "--amp", "float16", "--save-every", 1]
    loss = mock.patch.object(losses, "supervised_loss", overflowing)
    with loss, mock.patch.object(train_stage1, "SKIPS", 2):
        code, _, err = here(work, *command)
    assert code == 1 and ": step 2: 2 gradients in a row" in err and err.count("\n") == 1
    checkpoint = load(work / "run/stage2.pt")
    assert (checkpoint["step"], checkpoint["skipped"]) == (1, [1, 1]) and finite(work / "run/stage2.pt")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_damaged_and_odd_files_are_used_rightly_or_refused(tmp_path):
    """A few; `python tests/mutate_inputs.py` tries more."""
    reports = mutate_inputs.run(tmp_path, count=20)
    shutil.rmtree(tmp_path)
    assert len(reports) == 20 and not [report for report in reports if report["wrong"]]
    assert {report["code"] for report in reports} == {0, 2}


# On two processes something happens to one of them, in step 2, as the run's folder says.
HAPPENS = """
import os, resource, signal, sys
import train_stage1
plain, calls = train_stage1.supervised_loss, []

def supervised_loss(*args):
    value, what, rank = plain(*args), sys.argv[-1], os.environ["RANK"]
    calls.append(value)
    if len(calls) == 2:
        if what == "nan" and rank == "1":
            value = value * float("nan")
        if what == "asked" and rank == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        if what == "full" and rank == "0":
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    return value

train_stage1.supervised_loss = supervised_loss
"""


def test_all_processes_stop_together(work, run_apart):
    (work / "changes.py").write_text(HAPPENS)
    command = " ".join([*STAGE1, "--save-every 1"])
    commands = [f"2 {free_port()} {command} --out {what}" for what in ("nan", "asked", "full")]
    done = run_apart(work, "tests/fork_processes.py", "changes.py", *commands)
    codes = [line for line in done.stdout.splitlines() if set(line) <= set("0123456789 ")]
    assert codes == ["1 1", "143 143", "1 1"]
    lines = [line for line in done.stderr.splitlines() if line and line != "stopping after this step"]
    assert len(lines) == 3 and "Traceback" not in done.stderr, done.stderr
    assert ": step 2: L_sup is nan" in lines[0] and "asked/stage1.pt holds 2 steps" in lines[1]
    assert "full/stage1.pt cannot be written" in lines[2]
    assert [load(work / f"{out}/stage1.pt")["step"] for out in ("nan", "asked", "full")] == [1, 2, 1]

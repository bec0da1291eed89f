"""What happens to runs: killed, interrupted, no room on the disk, a number that is not finite, odd files.

    python -m pytest tests/test_faults.py        (from the root; a minute on two cores)
"""

import contextlib
import errno
import math
import multiprocessing
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

import data
import losses
import mutate_inputs
import train_stage1
from conftest import (
    NO_WEIGHTS, ROOT, TINY, InterruptedFile, free_port, here, leaves, load, make_folder, same_run,
)
from fork_processes import run_forked
from small_networks import small_resnet

# Both stages have four steps and save after the third and the last.
FOLDER = [*"--dataset folder --labeled-list datasets/labeled.txt".split(), *NO_WEIGHTS, *TINY]
FOLDER += "--size 32 32 --out run --save-every 3".split()
STAGE1 = ["train_stage1.py", *FOLDER, *"--pretrain-iters 2 --eln-iters 2".split()]
STAGE2 = "train_stage2.py run --iters 4 --device cpu --log-every 1 --save-every 3".split()
SMALL = ROOT / "tests/small_networks.py"  # runs a script with the networks of this file

# ---- Folders and scripts ----


@pytest.fixture(scope="module", autouse=True)
def small_networks():
    """In this process, and in those forked from it."""
    with mock.patch.object(torchvision.models, "get_model", small_resnet):
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


def at_call(number, act, name="supervised_loss"):
    """Change a loss: act(value) takes the place of its value at the call of this number (the first is 1).

    L_sup is called once a step, so that its calls have the numbers of the steps.
    """
    calls, function = [], getattr(losses, name)

    def acting(*args, **options):
        calls.append(None)
        value = function(*args, **options)
        return act(value) if len(calls) == number else value

    return mock.patch.object(losses, name, acting)


def wait_for_file(process, path):
    """Until the file is there."""
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)


@contextlib.contextmanager
def launched(cwd, *command):
    """Python with these arguments, in a session of its own; what is left of it is killed."""
    process = subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=cwd, text=True, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        env={**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},  # see README, Several GPUs
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
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


# ---- Killed and interrupted ----


def worker_of(launcher, rank):
    """The process id of torchrun's worker of this rank."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == launcher and f"RANK={rank}" in (folder / "environ").read_text().split("\0"):
                return int(folder.name)


@pytest.mark.skipif(not Path("/proc").exists(), reason="finds the worker in /proc")
def test_torchrun_restarts_a_killed_worker(work, monkeypatch):
    script, *options = STAGE1
    options += ["--pretrain-iters", "20"]  # so that the kill comes in time
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node=2 --max-restarts=3".split()
    with launched(work, *torchrun, SMALL, ROOT / script, *options, "--save-every", 1) as process:
        wait_for_file(process, work / "run/stage1.pt")
        os.kill(worker_of(process.pid, 1), signal.SIGKILL)
        _, err = process.communicate(timeout=240)
    assert process.returncode == 0 and "exitcode: -9" in err, err
    monkeypatch.chdir(work)
    assert run_forked(2, free_port(), script, *options, "--out", "twin") == [0, 0]
    same_run(work / "run", work / "twin", 1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_ends_at_once_and_keeps_its_checkpoint(work, number):
    """Ctrl-C reaches the loader's processes too."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit "ignore"
    script, *options = STAGE1
    options += ["--pretrain-iters", 9999, "--save-every", 1, "--workers", 2]
    with launched(work, SMALL, ROOT / script, *options) as process:
        wait_for_file(process, work / "run/stage1.pt")
        os.killpg(process.pid, number)
        _, err = process.communicate(timeout=60)
    assert group_is_gone(process.pid) and "Traceback" not in err
    if number == signal.SIGINT:
        assert process.returncode == 130 and err.count("\n") == 1 and "interrupted" in err, err
    assert load(work / "run/stage1.pt")["step"] >= 1


def test_ctrl_c_during_a_save_is_an_interruption(work, stage, monkeypatch):
    stage, command = stage
    with at_call(4, lambda value: monkeypatch.setattr(data, "open", InterruptedFile, raising=False) or value):
        code, _, err = here(work, *command)
    assert (code, err.count("\n")) == (130, 1) and "interrupted" in err
    assert load(work / f"run/stage{stage}.pt")["step"] == 3
    assert not list((work / "run").glob("*.part"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_one_folder_is_one_processs(work):
    endless = [*STAGE1, "--pretrain-iters", 9999]
    first = multiprocessing.get_context("fork").Process(
        target=here, args=(work, *endless, "--save-every", 1)
    )
    first.start()
    while first.is_alive() and not (work / "run/stage1.pt").exists():
        time.sleep(0.01)
    code, _, err = here(work, *endless)
    assert first.is_alive()
    first.kill()
    first.join()
    assert code == 2 and "another process" in err and err.count("\n") == 1


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_no_rival(tmp_path, number):
    fcntl = pytest.importorskip("fcntl")
    with mock.patch.object(fcntl, "lockf", side_effect=OSError(number, os.strerror(number))):
        train_stage1.lock_folder(tmp_path / "run", data.Process())
    for rival in (BlockingIOError(), PermissionError()):
        with mock.patch.object(fcntl, "lockf", side_effect=rival):
            with pytest.raises(data.InputError, match="another process is training"):
                train_stage1.lock_folder(tmp_path / "run", data.Process())


# ---- Files that cannot be written ----


@contextlib.contextmanager
def largest_file(size):
    """Let files grow to `size` bytes; a larger one fails as it does on a full disk. Call it to begin."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda value=None: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1])) or value
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 100_000, 1_000_000], ids=["nothing", "no student", "no checkpoint"])
def test_full_disk_leaves_the_old_checkpoint(undisturbed, work, stage, size):
    """A student has half a megabyte, a checkpoint four."""
    stage, command = stage
    name = f"student_stage{stage}.pt" if size < 1_000_000 else f"stage{stage}.pt"
    with largest_file(size) as begin, at_call(4, begin):
        code, _, err = here(work, *command)
    assert (code, err) == (1, f"{command[0]}: run/{name} cannot be written (File too large)\n")
    assert load(work / f"run/stage{stage}.pt")["step"] == 3
    assert not list((work / "run").glob("*.part"))
    if size:
        assert here(work, *command)[0] == 0
        same_run(work / "run", undisturbed / "run", stage)


def test_a_folder_that_cannot_be_made_is_refused_before_the_first_step(work):
    (work / "run").write_text("a file")
    code, out, err = here(work, *STAGE1)
    assert (code, err) == (2, "train_stage1.py: --out run cannot be made (File exists)\n")
    assert "L_sup" not in out


def test_loader_without_shared_memory_ends_in_one_line(work):
    killed = RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error.")
    with mock.patch.object(torch.utils.data.DataLoader, "__iter__", mock.Mock(side_effect=killed)):
        code, _, err = here(work, *STAGE1)
    assert code == 1 and "--workers" in err and "--shm-size" in err and err.count("\n") == 1


@pytest.mark.parametrize("error", [
    MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
])
def test_too_little_memory_ends_in_one_line(work, error):
    with mock.patch.object(losses, "supervised_loss", side_effect=error):
        code, _, err = here(work, *STAGE1)
    assert (code, err) == (1, "train_stage1.py: out of memory: try a smaller --batch-size or --size\n")


# ---- Numbers that are not finite ----


def finite(path):
    """Whether all numbers of a checkpoint are."""
    values = [value for _, value in leaves(load(path)) if isinstance(value, torch.Tensor)]
    return all(value.isfinite().all() for value in values)


TERMS = {
    "L_sup": "supervised_loss",
    "L_aux": "auxiliary_loss",
    "L_eln": "eln_loss",
    "L_pseudo": "pseudo_label_loss",
    "L_contra": "contrastive_loss",
}
STAGES_TERMS = [*((1, term) for term in list(TERMS)[:3]), *((2, term) for term in TERMS)]


@pytest.mark.parametrize("stage, term", STAGES_TERMS, indirect=["stage"])
def test_loss_that_is_not_finite_names_its_term_and_step(work, stage, term):
    stage, command = stage
    value_then = math.inf if term == "L_aux" else math.nan
    call = 4
    if stage == 1 and term != "L_sup":
        call = 2  # the auxiliary losses begin in step 3
    with at_call(call, lambda value: value + value_then, TERMS[term]):
        code, _, err = here(work, *command)
    assert re.search(rf"^step 4: {term} is (nan|inf);", err), err
    assert code and err.count("\n") == 1
    assert load(work / f"run/stage{stage}.pt")["step"] == 3
    assert finite(work / f"run/stage{stage}.pt")


def test_weights_that_are_not_finite_reach_no_file(work, stage):
    """The gradient of step 4 is NaN; its losses, which the log shows, are not."""
    stage, command = stage
    with at_call(4, lambda value: value + (0 * value).sqrt()):
        code, _, err = here(work, *command, "--log-every", 999)
    assert code and "not finite after step 4" in err and err.count("\n") == 1
    for name in (f"stage{stage}.pt", f"student_stage{stage}.pt"):
        assert finite(work / "run" / name)
    assert load(work / f"run/stage{stage}.pt")["step"] == 3


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

    with at_call(4, ruin):
        code, _, err = here(work, *command)
    assert code and "not finite after step 4" in err and err.count("\n") == 1
    assert load(work / f"run/stage{stage}.pt")["step"] == 3
    assert finite(work / f"run/stage{stage}.pt")


def test_float16_leaves_out_a_step_whose_gradient_overflows(work, stage):
    stage, command = stage
    steps = "--pretrain-iters 3 --eln-iters 0" if stage == 1 else "--iters 3"
    with at_call(2, lambda value: value + (0 * value).sqrt()):
        code, out, _ = here(work, *command, *steps.split(), "--amp", "float16")
    assert code == 0 and "; cpu, float16\n" in out
    checkpoint = load(work / f"run/stage{stage}.pt")
    assert checkpoint["scaler"]["scale"] == 65536 / 2
    assert {int(state["step"]) for state in checkpoint["optimizer"]["state"].values()} == {2}
    assert finite(work / f"run/stage{stage}.pt")


# ---- Damaged and odd files ----


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_damaged_and_odd_files_are_used_rightly_or_refused(tmp_path):
    """A few; `python tests/mutate_inputs.py` tries more."""
    reports = mutate_inputs.run(tmp_path, count=20)
    shutil.rmtree(tmp_path)
    assert len(reports) == 20 and not [report for report in reports if report["wrong"]]
    assert {report["code"] for report in reports} == {0, 2}

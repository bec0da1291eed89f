"""What several test files share: a small data set, scripts run in a process, the comparison of two runs."""

import contextlib
import csv
import io
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path
from unittest import mock

# For tensors this small several threads only wait for each other, for minutes where other programs run.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before PyTorch is imported, which reads it
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # results of CPUs are compared, also where there is a GPU

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import torchvision  # noqa: E402
from PIL import Image  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for the scripts of this folder; pytest finds the root by itself
from data import load_shapes  # noqa: E402
from evaluate import CHANGEABLE  # noqa: E402
from small_networks import small_resnet  # noqa: E402

NO_WEIGHTS = "--backbone resnet18 --weights none --eln-backbone resnet18 --eln-weights none".split()
TINY = "--size 48 48 --width 8 --batch-size 2 --log-every 1 --workers 0 --device cpu".split()


def make_folder(root):
    """Write t0 .. t7 for training (t6 and t7 without a mask), v0 and v1 for validation. Returns root.

    Three classes, jpg images of different sizes, masks with a palette and a void line, and labeled.txt, which
    names t0 .. t3.
    """
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True)
    train, val = [f"t{i}" for i in range(8)], ["v0", "v1"]
    for i, key in enumerate(train + val):
        label = np.zeros((40 + 4 * i, 56), np.uint8)
        label[10:25, 5:30], label[20:38, 25:50], label[0] = 1, 2, 255
        colour = np.uint8([[90, 90, 90], [200, 60, 60], [60, 60, 200]])[np.where(label == 255, 0, label)]
        noise = rng.integers(0, 40, colour.shape, np.uint8)
        Image.fromarray(colour + noise).save(root / "images" / f"{key}.jpg", quality=95)
        if key not in ("t6", "t7"):
            mask = Image.fromarray(label, "P")
            mask.putpalette(bytes(range(256)) * 3)
            mask.save(root / "masks" / f"{key}.png")
    for name, lines in dict(
        train=train, val=val, labeled=train[:4], classes=["background", "red", "blue"]
    ).items():
        (root / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines))
    return root


@pytest.fixture(scope="session")
def write_folder():
    return make_folder


@pytest.fixture(scope="module")
def small_networks():
    """All ResNets made in this process are small."""
    with mock.patch.object(torchvision.models, "get_model", small_resnet):
        yield


def load_few_shapes(data):
    """A tenth of the scenes of `shapes`."""
    dataset = load_shapes(data)
    del dataset.train[40:], dataset.val[20:]
    return dataset


@pytest.fixture(scope="session")
def run_apart():
    """run_apart(cwd, script, *options, processes=1) -> CompletedProcess; several processes under torchrun."""

    def run(cwd, script, *options, processes=1):
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [sys.executable, *(launch if processes > 1 else []), ROOT / script, *options]
        return subprocess.run(
            [str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=300,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    return run


def here(cwd, script, *options):
    """Run a script as __main__ in this process -> exit code, stdout, stderr. Other exceptions pass."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    before, said = os.getcwd(), lambda: [stream.buffer.getvalue().decode() for stream in (out, err)]
    argv = mock.patch.object(sys, "argv", [script, *map(str, options)])
    os.chdir(cwd)
    try:
        with argv, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(str(ROOT / script), run_name="__main__")
        return 0, *said()
    except SystemExit as stop:
        if isinstance(stop.code, str):  # which the interpreter prints
            print(stop.code, file=err)
            return 1, *said()
        return stop.code or 0, *said()
    finally:
        os.chdir(before)


class InterruptedFile(io.FileIO):
    """A file in whose second write the user presses Ctrl-C, which torch.save turns into a RuntimeError."""

    def write(self, content):
        if self.tell() > 0:
            raise KeyboardInterrupt
        return super().write(content)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def load(path):
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def rows(path):
    """A log's rows."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def leaves(value, name=""):
    """Every (path of keys, leaf) of nested dicts and lists; AdamW's betas are a tuple."""
    if isinstance(value, (dict, list, tuple)):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(part, f"{name}/{key}")
    else:
        yield name, value


def same_run(run, other, stage):
    """Both folders hold the same checkpoint, student and log, byte by byte, but for CHANGEABLE options."""
    for name in (f"stage{stage}.pt", f"student_stage{stage}.pt"):
        one, two = (dict(leaves(load(folder / name))) for folder in (run, other))
        assert one.keys() == two.keys()
        for key, value in one.items():
            if isinstance(value, torch.Tensor):
                assert value.numpy().tobytes() == two[key].numpy().tobytes(), key
            elif key.removeprefix("/args/") not in CHANGEABLE:
                assert value == two[key], key
    assert rows(run / f"log_stage{stage}.csv") == rows(other / f"log_stage{stage}.csv")

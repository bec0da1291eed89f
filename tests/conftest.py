"""What several test files share: a small data set of the `folder` kind, and scripts run in a process."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
# For tensors this small several threads only wait for each other, for minutes where other programs run.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def write_folder():
    """write_folder(root): t0 .. t7 for training (t6 and t7 without a mask), v0 and v1 for validation.

    Three classes, jpg images of different sizes, masks with a palette and a void line, and labeled.txt, which
    names t0 .. t3.
    """

    def write(root):
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

    return write


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

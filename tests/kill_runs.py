"""Kill training at random moments, start it again, and compare its end with that of a run left alone.

    python tests/kill_runs.py --kills 5      (from the root; 5 minutes on two busy cores)

Each stage, with each number of loader processes, is killed that often, by SIGKILL: every second time while a
file is being written, else anywhere between start and end. All bytes of all tensors must agree in the end.
"""

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from conftest import ROOT, TINY, same_run

STAGE1 = ["train_stage1.py", *TINY, *"--out run --pretrain-iters 3 --eln-iters 3 --save-every 1".split()]
STAGE2 = "train_stage2.py run --iters 4 --log-every 1 --save-every 1 --device cpu".split()
COMMANDS = {1: STAGE1, 2: STAGE2}
# Runs a script with networks and data that are faster to save and to score.
SMALL = """
import runpy, sys
sys.path.insert(0, sys.argv[1])
import torchvision
from conftest import load_few_shapes
from data import DATASETS
from small_networks import small_resnet
torchvision.models.get_model = small_resnet
DATASETS["shapes"] = load_few_shapes
del sys.argv[:2]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def small(script, *options):
    """The command that runs a script so."""
    return [sys.executable, "-c", SMALL, str(ROOT / "tests"), str(ROOT / script), *map(str, options)]


def start(folder, stage, workers):
    """The command of a stage, in a process of its own."""
    return subprocess.Popen(
        small(*COMMANDS[stage], "--workers", workers),
        cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )


def finish(process):
    """Wait for a process that must end well."""
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err


def kill(process, run, moment, writing):
    """SIGKILL at `moment`, in seconds; writing: after that, when a file of the run is being written.

    Returns whether it came in time, and whether a file was being written.
    """
    begin = time.monotonic()
    while process.poll() is None:
        busy = any(run.glob("*.part"))
        if time.monotonic() - begin > moment and (busy or not writing):
            process.kill()
            process.wait()
            process.stderr.close()
            return True, busy
        time.sleep(0.0005)
    finish(process)
    return False, False


def survive(folder, stage, workers, kills, seed=0):
    """Compare a stage that is killed `kills` times with its twin. Returns how many kills came while writing.

    folder  holds "before", the run folder that the stage begins with. Raises AssertionError if they differ.
    """
    rng = random.Random(seed)
    shutil.copytree(folder / "before", folder / "run")
    begin = time.monotonic()
    finish(start(folder, stage, workers))
    seconds = time.monotonic() - begin
    (folder / "run").rename(folder / "twin")
    shutil.copytree(folder / "before", folder / "run")
    number = busy = 0
    while number < kills:
        moment = rng.uniform(0, seconds)
        killed, wrote = kill(start(folder, stage, workers), folder / "run", moment, number % 2 == 1)
        number, busy = number + killed, busy + wrote
        if not killed:  # it was faster: compare, and begin again
            same_run(folder / "run", folder / "twin", stage)
            shutil.rmtree(folder / "run")
            shutil.copytree(folder / "before", folder / "run")
    finish(start(folder, stage, workers))
    same_run(folder / "run", folder / "twin", stage)
    left, expected = ({path.name for path in (folder / name).iterdir()} for name in ("run", "twin"))
    assert left == expected
    return busy


def prepare(folder, stage):
    """Make "before": empty for stage 1, stage 1's end for stage 2."""
    (folder / "run").mkdir(parents=True)
    if stage == 2:
        finish(start(folder, 1, 0))
    (folder / "run").rename(folder / "before")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 2])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for stage in COMMANDS:
        for workers in args.workers:
            folder = Path(tempfile.mkdtemp())
            prepare(folder, stage)
            busy = survive(folder, stage, workers, args.kills, args.seed)
            shutil.rmtree(folder)
            print(f"stage {stage}, --workers {workers}: {args.kills} kills, {busy} in writing: the same end")


if __name__ == "__main__":
    main()

"""Run training scripts on several processes, forked from one that imported PyTorch once (torchrun imports it
in each), after changing their modules.

    python tests/fork_processes.py CHANGES "WORLD PORT SCRIPT OPTION ..." ...

CHANGES: a Python file, executed before. Prints the exit codes of each command's processes, a line each.
"""

import importlib
import multiprocessing
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def run_forked(world, port, script, *options):
    """Run a script on `world` processes that are forked from this one. Returns their exit codes."""
    fork = multiprocessing.get_context("fork")
    processes = []
    for rank in range(world):
        process = fork.Process(target=train, args=(rank, world, port, script, options))
        process.start()
        processes.append(process)
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def train(rank, world, port, script, options):
    """What torchrun would have this process do."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    sys.argv = [script, *options]
    module = importlib.import_module(script.removesuffix(".py"))
    module.run_script(script, module.parse_args, module.train)


if __name__ == "__main__":
    import train_stage2  # noqa: F401  and with it all modules

    exec(Path(sys.argv[1]).read_text())
    for command in sys.argv[2:]:
        world, port, script, *options = command.split()
        print(*run_forked(int(world), port, script, *options), flush=True)

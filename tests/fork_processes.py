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
fork = multiprocessing.get_context("fork")


def work(rank, world, port, script, options):
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=world, LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=port
    )
    sys.argv = [script, *options]
    module = importlib.import_module(script.removesuffix(".py"))
    module.run_script(script, module.parse_args, module.train)


if __name__ == "__main__":
    import train_stage2  # noqa: F401  and with it all modules

    exec(Path(sys.argv[1]).read_text())
    for line in sys.argv[2:]:
        world, port, script, *options = line.split()
        ranks = [
            fork.Process(target=work, args=(rank, world, port, script, options)) for rank in range(int(world))
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        print(*(process.exitcode for process in ranks), flush=True)

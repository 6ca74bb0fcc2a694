"""A neighbour for `benchmarks.proof`: computes in bursts on one core until it is killed, or the bench has ended.

Prints its process number and is nobody's child: what the bench started would count as the comparison's own work.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import random
import time

import numpy as np
import psutil


def main() -> None:
    """Bursts and pauses of 0.1 to 2 s."""
    bench = psutil.Process(os.getppid())
    if neighbour := os.fork():
        print(neighbour)
        return
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # whoever reads the number waits for the end of the output
    matrix = np.ones((512, 512), dtype=np.float32)
    while bench.is_running():
        until = time.perf_counter() + random.uniform(0.1, 2)
        while time.perf_counter() < until:
            matrix @ matrix
        time.sleep(random.uniform(0.1, 2))


if __name__ == "__main__":
    main()

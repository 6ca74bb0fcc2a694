"""A neighbour for `benchmarks.proof`: computes in bursts on one core until it is killed."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import random
import time

import numpy as np

from trsp_deploy.tools.prctl import end_with_parent


def main() -> None:
    """Bursts and pauses of 0.1 to 2 s."""
    end_with_parent()
    matrix = np.ones((512, 512), dtype=np.float32)
    while True:
        until = time.perf_counter() + random.uniform(0.1, 2)
        while time.perf_counter() < until:
            matrix @ matrix
        time.sleep(random.uniform(0.1, 2))


if __name__ == "__main__":
    main()

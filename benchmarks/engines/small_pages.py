"""A measuring process whose memory stays in pages of 4 kB: the control for what huge pages give.

python -m benchmarks.engines.small_pages ENGINE_FOLDER
"""

from __future__ import annotations

import ctypes
import sys

from trsp_deploy.tools.measuring.bench_worker import main

PR_SET_THP_DISABLE = 41

if __name__ == "__main__":
    if ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0):
        sys.exit("huge pages cannot be turned off here")
    sys.exit(main())

"""Settings for every test, and for the processes that tests start: set before torch is loaded."""

import os

# Tiny models gain nothing from threads, and threads that spin beside another busy process cost five times the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

pytest_plugins = ["tests.exported", "tests.checked_run"]

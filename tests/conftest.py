"""Test files that run side by side get one thread each, or two processes fight over two cores."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; notebooks' kernels inherit it

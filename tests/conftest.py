"""Test files that run side by side get one thread each, or two processes fight over two cores."""

import os

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; notebooks' kernels inherit it


def pytest_collection_modifyitems(items) -> None:
    """Tests marked slow run where CPVT_SLOW=1 asks for them."""
    if os.environ.get("CPVT_SLOW") != "1":
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="slow: set CPVT_SLOW=1"))

"""What holds for every test."""

from __future__ import annotations

import os
import threading

import pytest

from unmergeable.prove import child


@pytest.fixture(scope="session", autouse=True)
def _children_are_forks() -> None:
    """Beside pytest-xdist too, as in a program of one thread: a child is not a fresh interpreter of four seconds.

    The thread that a worker of pytest-xdist has besides its own waits for messages, and holds no lock that a child
    takes. Where a fresh interpreter is what is tested, a test asks for it.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:
        child._alone = lambda: threading.active_count() <= 2

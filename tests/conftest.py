"""What holds for every test."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from unmergeable.prove import child

if TYPE_CHECKING:
    from unmergeable.audit.jobs import Job
    from unmergeable.audit.results import AuditResult


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fresh",
        action="store_true",
        help="keys, salts and probes are new in every run, drawn by the system; else they follow from the test's name",
    )


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--fresh"):
        config.pluginmanager.register(KeysByName())


class KeysByName:
    """A test draws the same keys, salts and probes in every run: what fails once can be looked at again.

    Fixtures have draws of their own, for it hangs on the order of tests which of them sets one up. Commands in
    another process, but for forks of this one, draw from the operating system.
    """

    def __init__(self) -> None:
        self.draws: list[random.Random] = []

    def draw(self, size: int) -> bytes:
        return self.draws[-1].randbytes(size)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, Any, Any]:
        self.draws.append(random.Random(item.nodeid))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "urandom", self.draw)
            result = yield
        self.draws.pop()
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(
        self, fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
    ) -> Generator[None, Any, Any]:
        self.draws.append(random.Random(f"{request.node.nodeid} {fixturedef.argname}"))
        try:
            return (yield)
        finally:
            self.draws.pop()


@pytest.fixture(scope="session", autouse=True)
def _children_are_forks() -> None:
    """Beside pytest-xdist too, as in a program of one thread: a child is not a fresh interpreter of four seconds.

    The thread that a worker of pytest-xdist has besides its own waits for messages, and holds no lock that a child
    takes. Where a fresh interpreter is what is tested, a test asks for it.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:
        child._alone = lambda: threading.active_count() <= 2


@pytest.fixture
def own_cache(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache of proven specs for each file of tests."""
    monkeypatch.setenv("UNMERGEABLE_CACHE", str(tmp_path_factory.getbasetemp() / request.path.stem))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny zoo, and its protected model locked twice, for tests of audits and of hardening."""
    from audit_cases import zoo

    return zoo(tmp_path_factory)


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """No state that another test's Trainer left in this process; nothing is left of ours."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    assert not AcceleratorState._shared_state


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, AuditResult]:
    """The audit of an exact lock that several files look at, and its folder."""
    from audit_cases import audited

    return audited(tmp_path_factory)


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """The jobs that an audit really runs."""
    from audit_cases import counted

    return counted(monkeypatch)


@pytest.fixture(scope="module")
def single() -> Iterator[None]:
    """As in an audit: one thread."""
    from unmergeable.audit.work import one_thread

    with one_thread():
        yield

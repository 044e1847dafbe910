"""Run a function in a child process in which torch computes in fp64 only, and bring its result back.

Many models hard-code float32 in norms, softmax and rotary tables. In the child the name `torch.float32`
itself means float64, so that a symmetry holds to 1e-14 or not at all. The change is global, hence a process
of its own.

Two ways to start one. A fork costs nothing but copies the parent as it stands: locks held by other threads
stay locked for ever. So it is used on Linux, and only while the parent runs one Python thread; the child
then limits torch to one thread before its first operation, because the worker threads of the parent's
OpenMP pool do not exist in it (with one thread torch never enters the pool). Otherwise a fresh interpreter
is started, which imports torch and transformers anew (some four seconds).
"""

from __future__ import annotations

import contextlib
import os
import pickle
import resource
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any, TypeVar, cast

from unmergeable.errors import RunError, UnmergeableError

Result = TypeVar("Result")

_MAIN = "from unmergeable.prove.child import _serve_standard_input; _serve_standard_input()"


def in_child(
    function: Callable[..., Result],
    *args: Any,
    timeout: float = 600.0,
    memory: int = 6 << 30,
    start: str | None = None,
) -> Result:
    """Call `function(*args)` in a child process in which torch is fp64 only.

    Args:
        function: a module-level function; it, its arguments and its result are pickled.
        timeout: seconds after which the child is killed.
        memory: bytes that the child may allocate beyond what it starts with.
        start: "fork" or "fresh"; by default a fork where it is safe.

    Raises:
        UnmergeableError: as the function raised it.
        RunError: the child failed in any other way, ran out of time or memory, or died.
    """
    if start is None:
        start = "fork" if sys.platform == "linux" and _alone() else "fresh"
    read_end, write_end = os.pipe()
    try:
        if start == "fork":
            child: _Forked | subprocess.Popen[bytes] = _Forked(
                _fork((read_end, write_end), function, args, memory, timeout)
            )
        else:
            child = _fresh(write_end, function, args, memory, timeout)
    except BaseException:
        os.close(read_end)
        raise
    finally:
        os.close(write_end)
    answer, finished = b"", False
    try:
        answer, finished = _read_all(read_end, time.monotonic() + timeout)
    finally:
        os.close(read_end)
        if not finished:
            child.kill()
        status = child.wait()
    if not finished:
        raise RunError("the proof took too long and was stopped", expected=f"at most {timeout:.0f} s")
    try:
        kind, value = pickle.loads(answer)
    except (EOFError, pickle.UnpicklingError):
        name = signal.Signals(-status).name if status < 0 else f"exit code {status}"
        raise RunError("the process of the proof died without an answer", got=name) from None
    if kind == "result":
        return cast(Result, value)
    if isinstance(value, UnmergeableError):
        raise value
    raise RunError("the proof failed", got=value)


def _alone() -> bool:
    """Whether no other Python thread runs, whose locks a fork would copy as they stand."""
    return threading.active_count() == 1


def is_fp64() -> bool:
    """Whether torch has been made fp64-only in this process."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.float32 is torch.float64


def _enter_fp64() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    import safetensors.torch
    import torch
    import transformers

    assert safetensors.torch
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    patched: Any = torch
    patched.float32 = patched.float = torch.float64
    patched.Tensor.float = lambda tensor, *args, **kwargs: tensor.double()
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)


def _limit_memory(extra: int) -> None:
    with open("/proc/self/status", encoding="ascii") as status:
        held = next(int(line.split()[1]) << 10 for line in status if line.startswith("VmData:"))
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = held + extra if hard == resource.RLIM_INFINITY else min(hard, held + extra)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def _answer(function: Callable[..., Any], args: tuple[Any, ...], memory: int) -> bytes:
    try:
        if sys.platform == "linux":
            _limit_memory(memory)
        _enter_fp64()
        return pickle.dumps(("result", function(*args)))
    except UnmergeableError as error:
        with contextlib.suppress(Exception):
            return pickle.dumps(("error", pickle.loads(pickle.dumps(error))))
        return pickle.dumps(("error", str(error)))
    except BaseException as error:  # whatever it is, the parent has to hear of it
        frames = traceback.extract_tb(error.__traceback__)[-3:]
        place = " < ".join(f"{os.path.basename(f.filename)}:{f.lineno} {f.name}" for f in reversed(frames))
        return pickle.dumps(("error", f"{type(error).__name__}: {error}"[:4000] + f" ({place})"))


class _Forked:
    """The part of `subprocess.Popen` that is needed here, for a forked child."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def _stop_after(timeout: float) -> None:
    """End this process by itself even if the parent was killed and nobody waits for it."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(int(timeout) + 10)


def _fork(
    pipe: tuple[int, int], function: Callable[..., Any], args: tuple[Any, ...], memory: int, timeout: float
) -> int:
    read_end, write_end = pipe
    for output in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            output.flush()
    with warnings.catch_warnings():
        # newer Pythons warn of any thread at all; numpy's and torch's idle workers are dealt with, see above
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        _stop_after(timeout)
        os.close(read_end)
        # whatever a model prints or warns of is not for the user of a library
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        with open(write_end, "wb") as stream:
            stream.write(_answer(function, args, memory))
        code = 0
    finally:
        # never run the parent's exit handlers, nor flush its buffers twice
        os._exit(code)


def _fresh(
    write_end: int, function: Callable[..., Any], args: tuple[Any, ...], memory: int, timeout: float
) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-c", _MAIN],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=(write_end,),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError), process.stdin as stream:
        pickle.dump((write_end, memory, timeout), stream)
        pickle.dump((function, args), stream)
    return process


def _serve_standard_input() -> None:
    write_end, memory, timeout = pickle.load(sys.stdin.buffer)
    _stop_after(timeout)
    try:
        function, args = pickle.load(sys.stdin.buffer)
        answer = _answer(function, args, memory)
    except Exception as error:
        answer = pickle.dumps(("error", f"{type(error).__name__}: {error}"))
    with open(write_end, "wb") as stream:
        stream.write(answer)
    os._exit(0)


def _read_all(read_end: int, deadline: float) -> tuple[bytes, bool]:
    chunks: list[bytes] = []
    while True:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([read_end], [], [], left)[0]:
            return b"".join(chunks), False
        chunk = os.read(read_end, 1 << 20)
        if not chunk:
            return b"".join(chunks), True
        chunks.append(chunk)

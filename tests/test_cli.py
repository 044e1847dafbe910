"""The command line, as sessions: every file in transcripts/ is typed in and its output compared.

A line that begins with `$ ` is typed; below it stands its output, stderr behind `! `; `[exit 3]`
closes what does not return 0. `...` stands for any text, alone on a line for any lines. Every session starts
in a folder of its own with a small model in two shards (`model/`), its spec and a key.
"""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import toy
import unmergeable as um
from shell import COMMAND, matches, steps, typed
from unmergeable import _completion, _parser, cli
from unmergeable.config import canonical_config, structure

TRANSCRIPTS = sorted((Path(__file__).parent / "transcripts").glob("*.txt"))


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a model, a spec and a key, and a terminal that nobody sits at."""
    toy.write(tmp_path / "model", toy.tensors(), shards=2)
    config = structure(canonical_config(toy.CONFIG, {}))
    (tmp_path / "spec.json").write_text(json.dumps({**toy.spec_dict(), "configs": [config]}))
    (tmp_path / "owner.key").write_bytes(key_file())
    (tmp_path / "owner.key").chmod(0o600)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("UNMERGEABLE_PASSPHRASE", raising=False)
    monkeypatch.setenv("PATH", f"{COMMAND.parent}{os.pathsep}{os.environ['PATH']}")
    before = signal.getsignal(signal.SIGTERM)
    yield tmp_path
    signal.signal(signal.SIGTERM, before)


def key_file() -> bytes:
    """The file of a key that is always the same."""
    from unmergeable.keys import _compose

    return _compose(toy.key(), None)()


@pytest.mark.parametrize("transcript", TRANSCRIPTS, ids=lambda path: path.stem)
def test_session(transcript: Path, session: Path) -> None:
    for step in steps(transcript.read_text(encoding="utf-8")):
        got = typed(step.command)
        assert matches(step.expected, got), (
            f"{transcript.name}:{step.line}: {step.command}\n--- expected\n{step.expected}--- got\n{got}"
        )


def test_every_verb_has_a_session() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in TRANSCRIPTS)
    verbs = {verb.name for verb in _completion._verbs(_parser.build_parser())}
    assert {verb for verb in verbs if not re.search(rf"unmergeable {verb}\b", text)} <= {"demo"}


def test_json_documents_are_versioned(session: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (
        ["keygen", "-o", "new.key"],
        ["inspect", "model", "--spec", "spec.json"],
        ["lock", "model", "locked", "-k", "owner.key", "--spec", "spec.json"],
        ["verify", "model", "locked", "-k", "owner.key", "--spec", "spec.json"],
        ["unlock", "locked", "back", "-k", "owner.key"],
        ["card", "locked"],
        ["merge", "locked", "locked", "-o", "house", "-k", "owner.key"],
        ["merge", "model", "locked", "-o", "plain", "-m", "ties", "--base", "model"],
        ["merge", "--methods"],
        ["merge", "--methods", "-m", "ties"],
        ["attack", "align-permutation", "locked", "aligned", "--base", "model", "--spec", "spec.json"],
        ["audit", "--init", "model", "locked", "back", "-o", "audit.yaml"],
        ["inspect", "nowhere"],
    ):
        assert cli.main([*arguments, "--json"]) == (3 if "nowhere" in arguments else 0)
        document = json.loads(capsys.readouterr().out)
        verb = "error" if "nowhere" in arguments else arguments[0]
        verb += "-plain" if "plain" in arguments else "-methods" if "--methods" in arguments else ""
        verb += "-init" if "--init" in arguments else ""
        assert (document["document"], document["version"]) == (f"unmergeable.{verb}", 1)


def test_python_mirrors_the_command_line(session: Path) -> None:
    key = um.load_key("owner.key")
    report = um.lock("model", "locked", key=key, spec="spec.json")
    assert report.key == key.id == toy.key().id
    assert um.inspect("locked", spec="spec.json").locked is not None
    um.unlock("locked", "back", key="owner.key")
    assert toy.tree(session / "back") == toy.tree(session / "model")


def test_a_passphrase_is_asked_for_on_a_terminal(session: Path) -> None:
    asked = with_terminal(["keygen", "-o", "safe.key", "--passphrase"], b"open sesame\nopen sesame\n")
    assert b"passphrase: " in asked
    assert b"once more: " in asked
    assert b"sesame" not in asked
    assert b"SCRYPT" in Path("safe.key").read_bytes()
    differ = with_terminal(["keygen", "-o", "other.key", "--passphrase"], b"one\ntwo\n")
    assert b"the two passphrases differ" in differ
    assert not Path("other.key").exists()


def with_terminal(arguments: list[str], answers: bytes) -> bytes:
    """Everything that a terminal shows when a person gives these answers."""
    child, terminal = pty.fork()
    if child == 0:
        os.execv(COMMAND, [str(COMMAND), *arguments])
    shown = b""
    with contextlib.suppress(OSError):  # Linux ends a terminal's stream so
        for answer in answers.splitlines(keepends=True):
            while not shown.endswith(b": "):
                shown += os.read(terminal, 1024)
            os.write(terminal, answer)
            shown += os.read(terminal, 1)
        while part := os.read(terminal, 1024):
            shown += part
    os.close(terminal)
    os.waitpid(child, 0)
    return shown


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_leaves_nothing(session: Path, number: int, code: int) -> None:
    # So much to copy that the signal comes on the way.
    toy.write(session / "large", {**toy.tensors(), "embed": np.zeros((1 << 19, 128))})
    arguments = ["lock", "large", "locked", "-k", "owner.key", "--spec", "spec.json"]
    before = set(os.listdir())
    running = subprocess.Popen(
        [COMMAND, *arguments],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(
            number, signal.SIG_DFL
        ),  # jobs in the background ignore an interrupt
    )
    deadline = time.monotonic() + 30
    while set(os.listdir()) == before and running.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    running.send_signal(number)
    _, message = running.communicate()
    assert running.returncode == code
    assert message in ("unmergeable: interrupted\n", "unmergeable: terminated\n")
    assert set(os.listdir()) == before


def test_a_reader_that_leaves_is_no_error(session: Path) -> None:
    done = subprocess.run(
        f"{COMMAND} completion bash | head -n 1; exit ${{PIPESTATUS[0]}}",
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, 141)
    assert done.stderr == ""


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A line of bash."""
    return subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, errors="replace", check=False,
        env={**os.environ, **environment},
    )  # fmt: skip


def test_an_error_that_nobody_reads_keeps_its_exit_code(session: Path) -> None:
    done = shell("unmergeable inspect nowhere --json | true; echo ${PIPESTATUS[0]}")
    assert done.stdout == "3\n"
    assert "Traceback" not in done.stderr
    assert "no such file or folder" in done.stderr


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("unmergeable lock --spec spec.json model closed-1 -k owner.key 2>&-", 0),
        ("unmergeable lock --spec spec.json model closed-2 -k owner.key >&-", 0),
        ("unmergeable lock --spec spec.json model closed-3 -k owner.key <&-", 0),
        ("unmergeable inspect nowhere 2>&-", 3),
        ("unmergeable lock --spec spec.json model closed-4 -k secret.key <&-", 2),
    ],
)
def test_standard_streams_may_be_closed(command: str, code: int, session: Path) -> None:
    if "secret" in command and not (session / "secret.key").exists():
        made = shell("unmergeable keygen -o secret.key --passphrase", UNMERGEABLE_PASSPHRASE="a b c d e")
        assert made.returncode == 0, made.stderr
    done = shell(command)
    assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_may_lack_characters(encoding: str, session: Path) -> None:
    for command in ("unmergeable harden --help", "unmergeable merge --methods", "unmergeable audit --help"):
        done = shell(command, PYTHONIOENCODING=encoding)
        assert (done.returncode, done.stderr) == (0, ""), command


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["lo"], {"lock"}),
        (["lock", "--me"], {"--method"}),
        (["lock", "--method", "g"], {"gauge"}),
        (["completion", ""], {"bash", "zsh", "fish"}),
        (["inspect", "mod"], {"model"}),
        (["merge", "-m", "dell"], {"della", "della_linear"}),
        (["merge", "-m", "mergekit:dell"], {"mergekit:della", "mergekit:della_linear"}),
        (["merge", "-m", "mergekit", ":", "tie"], {"ties"}),  # as readline breaks it at the colon
        (
            ["merge", "--method", "mergekit", ":"],
            {name.partition(":")[2] for name in _parser.MERGE_METHODS} - {""},
        ),
        (["merge", "mod"], {"model"}),
        (["attack", "align-p"], {"align-permutation", "align-procrustes"}),
        (["au"], {"audit"}),
        (["audit", "--in"], {"--init"}),
        (["audit", "--init", "mod"], {"model"}),
        (["attack", "--seed", "1", "anchor-c"], {"anchor-coupled"}),
        (["attack", "anchor-coupled", "mod"], {"model"}),
        (["attack", "anchor-coupled", "--an"], {"--anchor"}),
        (["attack", "--base", "mod"], {"model"}),  # of an option with a value, files
        (["inspect", "blan"], {"blank name"}),
    ],
)
def test_completion_in_bash(session: Path, words: list[str], expected: set[str]) -> None:
    (session / "blank name").mkdir(exist_ok=True)
    array = shlex.join(["unmergeable", *words])
    script = (
        f"COMP_WORDS=({array}); COMP_CWORD={len(words)}; _unmergeable; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    )
    source = _completion.completion(_parser.build_parser(), "bash")
    done = subprocess.run(["bash", "-c", source + script], capture_output=True, text=True, check=True)
    assert set(done.stdout.splitlines()) == expected
    assert done.stderr == ""


@pytest.mark.parametrize("shell", _completion.SHELLS)
def test_completion_knows_every_option(shell: str) -> None:
    script = _completion.completion(_parser.build_parser(), shell)
    for verb in _completion._verbs(_parser.build_parser()):
        assert verb.name in script
        for option in verb.options:
            for flag in option.flags:
                assert (flag if shell != "fish" else flag.lstrip("-")) in script
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=script, text=True, check=True)


@pytest.mark.parametrize(
    "arguments", [["audit", "--json", "x.yaml"], ["merge", "--json", "--bogus"], ["--json"]]
)
def test_a_command_line_that_is_not_read_gives_a_document_too(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    found = json.loads(capsys.readouterr().out)
    assert (found["document"], found["command"]) == ("unmergeable.error", None)

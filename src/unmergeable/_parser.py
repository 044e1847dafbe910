"""What the command line accepts. Imports nothing heavy: `--help` is instant."""

from __future__ import annotations

import argparse

from . import __version__
from ._completion import SHELLS
from ._parser_harden import harden
from ._parser_merging import ATTACKS, LOCK_METHODS, MERGE_METHODS, attack, audit, merge
from ._parser_parts import Parser, architecture, jobs, json, key, passphrase, quiet, verb

__all__ = ["ATTACKS", "LOCK_METHODS", "MERGE_METHODS", "Parser", "build_parser"]

DEFAULT_KEY_FILE = "unmergeable.key"

_EPILOG = """\
exit codes: 0 done and the claim holds, 1 a claim failed, 2 usage, 3 bad input, 4 failed while running,
130 interrupted, 141 nobody reads its output, 143 terminated. Results go to stdout, messages to stderr.

UNMERGEABLE_PASSPHRASE holds the key's passphrase where nobody can be asked."""


def build_parser() -> argparse.ArgumentParser:
    """The parser of `unmergeable`; the chosen verb is `args.verb`."""
    parser = Parser(
        prog="unmergeable",
        description="Lock a fine-tuned model so that merges of it fail, without changing what it computes.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"unmergeable {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=Parser)
    for add in (
        _keygen,
        _inspect,
        _lock,
        _verify,
        _unlock,
        harden,
        merge,
        attack,
        audit,
        _card,
        _demo,
        _completion,
    ):
        add(verbs)
    return parser


def _keygen(verbs: argparse._SubParsersAction[Parser]) -> None:
    parser = verb(verbs, "keygen", "make a key and print its public id")
    parser.add_argument(
        "-o", "--output", metavar="FILE", default=DEFAULT_KEY_FILE, help="key file to make (%(default)s)"
    )
    parser.add_argument("--passphrase", action="store_true", help="ask for a passphrase to protect the file")
    passphrase(parser)
    json(parser)


def _inspect(verbs: argparse._SubParsersAction[Parser]) -> None:
    parser = verb(
        verbs,
        "inspect",
        "list the places where a lock can act on a model, and why",
        "MODEL may be locked or not.",
    )
    parser.add_argument("model", metavar="MODEL", help="folder, .safetensors file or pipeline folder")
    architecture(parser)
    json(parser)


def _lock(verbs: argparse._SubParsersAction[Parser]) -> None:
    parser = verb(
        verbs,
        "lock",
        "rewrite a model so that it computes the same and cannot be merged off the shelf",
        "DST appears whole or not at all, with the same files as SRC and unmergeable.json beside them.",
    )
    parser.add_argument("src", metavar="SRC", help="folder, .safetensors file or pipeline folder")
    parser.add_argument("dst", metavar="DST", help="where to write it; must not exist")
    key(parser, required=True, text="the owner's key file, as keygen makes it")
    parser.add_argument(
        "-m", "--method", choices=LOCK_METHODS, default="exact", help="how to lock (%(default)s)"
    )
    parser.add_argument(
        "--scales", action="store_true", help="exact: power-of-two scales where they are lossless"
    )
    parser.add_argument(
        "--domain", metavar="NAME", help="models of one domain stay mergeable with each other"
    )
    parser.add_argument("--base", metavar="BASE", help="params: move away from this model")
    parser.add_argument("--dtype", choices=("float32",), help="store locked weights in this dtype")
    parser.add_argument(
        "--prune-rate", metavar="P", type=_rate, help="params: part of the MLP weights to drop"
    )
    parser.add_argument(
        "--keep-pruned",
        metavar="FILE",
        help="params: a new private file for what is dropped; else it is lost",
    )
    parser.add_argument(
        "--form",
        choices=("diagonal", "symmetric", "nonsymmetric"),
        help="params: form of the multi-head scaling (diagonal)",
    )
    parser.add_argument(
        "--condition",
        metavar="C",
        type=float,
        help="gauge, mergelock, params: cap on the condition number of a matrix (10)",
    )
    architecture(parser)
    jobs(parser)
    parser.add_argument("--verify", action="store_true", help="verify the result at the end")
    parser.add_argument("--dry-run", action="store_true", help="print what would be done and write nothing")
    quiet(parser)
    json(parser)


def _verify(verbs: argparse._SubParsersAction[Parser]) -> None:
    parser = verb(verbs, "verify", "check that DST computes what SRC computes", "Exit code 1 if it does not.")
    parser.add_argument("src", metavar="SRC", help="the model before the lock")
    parser.add_argument("dst", metavar="DST", help="the locked model")
    key(parser, required=False, text="also check the manifest's MAC, and unlock and compare every byte")
    parser.add_argument(
        "--run",
        choices=("auto", "always", "never"),
        default="auto",
        help="also load both with their stock class and compare outputs (%(default)s: if both fit in memory)",
    )
    parser.add_argument(
        "--seed", type=int, metavar="N", help="of the random probes, to see once more what one run has found"
    )
    architecture(parser)
    jobs(parser)
    quiet(parser)
    json(parser)


def _unlock(verbs: argparse._SubParsersAction[Parser]) -> None:
    parser = verb(verbs, "unlock", "undo a lock with its key")
    parser.add_argument("src", metavar="SRC", help="the locked model")
    parser.add_argument("dst", metavar="DST", help="where to write it; must not exist")
    key(parser, required=True, text="the key that it was locked with")
    parser.add_argument("--manifest", metavar="FILE", help="the manifest, where it is not beside the weights")
    parser.add_argument(
        "--accept-changed",
        action="store_true",
        help="unlock weights that were trained or merged after the lock",
    )
    parser.add_argument("--pruned", metavar="FILE", help="what --keep-pruned wrote: put it back")
    jobs(parser)
    quiet(parser)
    json(parser)


def _card(verbs: argparse._SubParsersAction[Parser]) -> None:
    parser = verb(verbs, "card", "write a section for the model card of a locked model, in Markdown")
    parser.add_argument("model", metavar="DST", help="the locked model")
    json(parser)


def _demo(verbs: argparse._SubParsersAction[Parser]) -> None:
    parser = verb(
        verbs, "demo", "lock, verify, merge, unlock and audit an embedded model, in about a minute",
        "Prints a table and writes demo.json, demo.png and the report of an audit.",
    )  # fmt: skip
    parser.add_argument("-o", "--output", metavar="DIR", default="demo", help="folder to write (%(default)s)")
    parser.add_argument(
        "--full", action="store_true", help="the full-dose grid for every method, not exact alone"
    )
    quiet(parser)
    json(parser)


def _completion(verbs: argparse._SubParsersAction[Parser]) -> None:
    parser = verb(
        verbs,
        "completion",
        "print a script for tab completion",
        "bash: source <(unmergeable completion bash)\n"
        "zsh:  source <(unmergeable completion zsh)\n"
        "fish: unmergeable completion fish | source",
    )
    parser.add_argument("shell", choices=SHELLS)


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = -1.0
    if not 0 <= rate < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a rate from 0 up to 1")
    return rate

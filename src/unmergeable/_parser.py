"""What the command line accepts. Imports nothing heavy: `--help` is instant."""

from __future__ import annotations

import argparse
from typing import NoReturn

from . import __version__
from ._completion import SHELLS
from .errors import UsageError

# Spelled out here, for what they name is imported when it is used; a test compares.
LOCK_METHODS = ("exact", "gauge", "mergelock", "params")
_MERGEKIT = (
    "passthrough", "linear", "slerp", "nuslerp", "multislerp", "karcher", "model_stock", "arcee_fusion", "nearswap",
    "sce", "ram", "ramplus_tl", "task_arithmetic", "ties", "dare_ties", "dare_linear", "breadcrumbs",
    "breadcrumbs_ties", "della", "della_linear",
)  # fmt: skip
_OWN = (
    "task_arithmetic", "ties", "full_dose", "iso_c", "tsv_m", "consensus", "tall_mask", "svd_truncated", "top_k",
    "projected", "regmean", "fisher", "substitute",
)  # fmt: skip
MERGE_METHODS = tuple(dict.fromkeys((*_OWN, *_MERGEKIT, *(f"mergekit:{name}" for name in _MERGEKIT))))
ATTACKS = (
    "align-permutation",
    "align-procrustes",
    "align-canonical",
    "anchor-independent",
    "anchor-coupled",
    "substitute-attention",
    "substitute-mlp",
    "substitute-blocks",
    "wide",
    "coefficients",
    "repair",
    "distil",
)
DEFAULT_KEY_FILE = "unmergeable.key"

_EPILOG = """\
exit codes: 0 done and the claim holds, 1 a claim failed, 2 usage, 3 bad input, 4 failed while running,
130 interrupted. Results go to stdout, messages to stderr.

UNMERGEABLE_PASSPHRASE holds the key's passphrase where nobody can be asked."""


class Parser(argparse.ArgumentParser):
    """A parser that raises instead of exiting: one place decides what an error looks like."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, hint=f"see {self.prog} --help")


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
        _merge,
        _attack,
        _audit,
        _card,
        _demo,
        _completion,
    ):
        add(verbs)
    return parser


def _verb(verbs: argparse._SubParsersAction[Parser], name: str, text: str, more: str = "") -> Parser:
    return verbs.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.\n\n{more}".rstrip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _json(parser: Parser) -> None:
    parser.add_argument("--json", action="store_true", help="print one versioned JSON document")


def _key(parser: Parser, *, required: bool, text: str) -> None:
    parser.add_argument("-k", "--key", metavar="KEY", required=required, help=text)
    _passphrase(parser)


def _passphrase(parser: Parser) -> None:
    parser.add_argument(
        "--passphrase-file", metavar="FILE", help="read the key's passphrase from the first line of a file"
    )


def _quiet(parser: Parser) -> None:
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress bar")


def _architecture(parser: Parser) -> None:
    parser.add_argument("--config", metavar="FILE", help="config.json to use in place of the model's own")
    parser.add_argument("--spec", metavar="FILE", help="spec to use in place of a shipped or proven one")


def _jobs(parser: Parser) -> None:
    parser.add_argument("-j", "--jobs", metavar="N", type=_positive, default=2, help="threads (%(default)s)")


def _keygen(verbs: argparse._SubParsersAction[Parser]) -> None:
    parser = _verb(verbs, "keygen", "make a key and print its public id")
    parser.add_argument(
        "-o", "--output", metavar="FILE", default=DEFAULT_KEY_FILE, help="key file to make (%(default)s)"
    )
    parser.add_argument("--passphrase", action="store_true", help="ask for a passphrase to protect the file")
    _passphrase(parser)
    _json(parser)


def _inspect(verbs: argparse._SubParsersAction[Parser]) -> None:
    parser = _verb(
        verbs,
        "inspect",
        "list the places where a lock can act on a model, and why",
        "MODEL may be locked or not.",
    )
    parser.add_argument("model", metavar="MODEL", help="folder, .safetensors file or pipeline folder")
    _architecture(parser)
    _json(parser)


def _lock(verbs: argparse._SubParsersAction[Parser]) -> None:
    parser = _verb(
        verbs,
        "lock",
        "rewrite a model so that it computes the same and cannot be merged off the shelf",
        "DST appears whole or not at all, with the same files as SRC and unmergeable.json beside them.",
    )
    parser.add_argument("src", metavar="SRC", help="folder, .safetensors file or pipeline folder")
    parser.add_argument("dst", metavar="DST", help="where to write it; must not exist")
    _key(parser, required=True, text="the owner's key file, as keygen makes it")
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
    _architecture(parser)
    _jobs(parser)
    parser.add_argument("--verify", action="store_true", help="verify the result at the end")
    parser.add_argument("--dry-run", action="store_true", help="print what would be done and write nothing")
    _quiet(parser)
    _json(parser)


def _verify(verbs: argparse._SubParsersAction[Parser]) -> None:
    parser = _verb(
        verbs, "verify", "check that DST computes what SRC computes", "Exit code 1 if it does not."
    )
    parser.add_argument("src", metavar="SRC", help="the model before the lock")
    parser.add_argument("dst", metavar="DST", help="the locked model")
    _key(parser, required=False, text="also check the manifest's MAC, and unlock and compare every byte")
    parser.add_argument(
        "--run",
        choices=("auto", "always", "never"),
        default="auto",
        help="also load both with their stock class and compare outputs (%(default)s: if both fit in memory)",
    )
    _architecture(parser)
    _jobs(parser)
    _quiet(parser)
    _json(parser)


def _unlock(verbs: argparse._SubParsersAction[Parser]) -> None:
    parser = _verb(verbs, "unlock", "undo a lock with its key")
    parser.add_argument("src", metavar="SRC", help="the locked model")
    parser.add_argument("dst", metavar="DST", help="where to write it; must not exist")
    _key(parser, required=True, text="the key that it was locked with")
    parser.add_argument("--manifest", metavar="FILE", help="the manifest, where it is not beside the weights")
    parser.add_argument(
        "--accept-changed",
        action="store_true",
        help="unlock weights that were trained or merged after the lock",
    )
    parser.add_argument("--pruned", metavar="FILE", help="what --keep-pruned wrote: put it back")
    _jobs(parser)
    _quiet(parser)
    _json(parser)


def _merge(verbs: argparse._SubParsersAction[Parser]) -> None:
    parser = _verb(
        verbs,
        "merge",
        "merge models: off the shelf, or with the key that they were locked with",
        "Without a key: plain checkpoints, and LoRA adapters of the base, by any method. A result that is not a\n"
        "merge of the models is not written.\n"
        "With -k KEY: locked models are undone, merged and locked afresh, and nothing unlocked is written; by\n"
        "linear, task_arithmetic or ties. Other files and dtypes are the first model's.",
    )
    parser.usage = "%(prog)s [options] MODEL... -o DST\n       %(prog)s --methods [-m METHOD] [--json]"
    parser.add_argument("models", metavar="MODEL", nargs="*", help="folders or .safetensors files")
    parser.add_argument("-o", "--output", metavar="DST", help="where to write it; must not exist")
    parser.add_argument(
        "-m", "--method", metavar="METHOD", type=_merge_method, choices=MERGE_METHODS,
        help="how to merge (linear); --methods lists them",
    )  # fmt: skip
    parser.add_argument(
        "--base", metavar="BASE", help="the model that they were fine-tuned from; with a key, locked or not"
    )
    parser.add_argument(
        "-w", "--weight", metavar="W", dest="weights", type=float, action="append",
        help="of each model in turn; without a key also one for all",
    )  # fmt: skip
    parser.add_argument(
        "--density", metavar="D", type=float, help="ties and its kin: part of each difference to keep"
    )
    parser.add_argument(
        "--methods", action="store_true", help="list the methods, or with -m METHOD what one takes, and stop"
    )
    plain = parser.add_argument_group("without a key")
    plain.add_argument(
        "--set",
        metavar="NAME=VALUE",
        action="append",
        help="an option of the method; NAME=MODEL:VALUE,... by model",
    )
    plain.add_argument(
        "--template",
        metavar="MODEL",
        help="whose files, dtypes and head the result gets (the base, or the first)",
    )
    plain.add_argument("--seed", metavar="N", type=int, help="of methods that draw (0)")
    plain.add_argument("--force", action="store_true", help="write also what is not a merge of the models")
    locked = parser.add_argument_group("with a key")
    locked.add_argument("-k", "--key", metavar="KEY", help="the key that the models were locked with")
    locked.add_argument(
        "--passphrase-file", metavar="FILE", help="read the key's passphrase from the first line of a file"
    )
    locked.add_argument("--lock", choices=LOCK_METHODS[:3], help="how to lock the result (exact)")
    locked.add_argument("--scales", action="store_true", help="as in lock")
    locked.add_argument("--domain", metavar="NAME", help="as in lock")
    locked.add_argument("-j", "--jobs", metavar="N", type=_positive, help="threads (2)")
    _quiet(parser)
    _json(parser)


def _attack(verbs: argparse._SubParsersAction[Parser]) -> None:
    parser = _verb(
        verbs,
        "attack",
        "attack a model as a thief would, and write what he gets",
        "TARGET is only read. DST has its files and layout, and no manifest. NAME is one of\n  "
        + "\n  ".join(ATTACKS),
    )
    parser.add_argument("name", metavar="NAME", choices=ATTACKS, help="which attack")
    parser.add_argument("target", metavar="TARGET", help="the protected model")
    parser.add_argument("dst", metavar="DST", help="where to write it; must not exist")
    parser.add_argument("--base", metavar="BASE", help="the model that TARGET was fine-tuned from")
    parser.add_argument(
        "--anchor",
        metavar="MODEL",
        help="another fine-tune of it, in the place of the base where that will do",
    )
    parser.add_argument(
        "--audit", metavar="CONFIG", help="wide, coefficients, repair, distil: the thief's models and tasks"
    )
    parser.add_argument("--set", metavar="NAME=VALUE", action="append", help="an option of the attack")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of what is random (%(default)s)")
    _architecture(parser)
    _quiet(parser)
    _json(parser)


def _audit(verbs: argparse._SubParsersAction[Parser]) -> None:
    parser = _verb(
        verbs,
        "audit",
        "merge and attack a protected model as thieves would, and report what each gets",
        "Writes report.html and results.json to DIR. An audit that was stopped goes on where it was.\n"
        "With --init: writes a commented CONFIG for a base, the protected model and fine-tunes of thieves.\n"
        "Exit code 1 if protection at a level is below what --require asks for.",
    )
    parser.usage = (
        "%(prog)s CONFIG -o DIR [options]\n"
        "       %(prog)s --init BASE PROTECTED OTHER... -o CONFIG [--plain MODEL]"
    )
    parser.add_argument("paths", metavar="CONFIG", nargs="+", help="the configuration, a YAML file")
    parser.add_argument("-o", "--output", metavar="DIR", required=True, help="folder for the results")
    parser.add_argument(
        "-w", "--workers", metavar="N", type=_positive, help="processes (one a core, as memory allows)"
    )
    parser.add_argument(
        "--budget", metavar="MIN", type=float, help="minutes; the least informative attacks are left out"
    )
    parser.add_argument(
        "--require", metavar="LEVEL=VALUE", type=_requirement, action="append",
        help="least protection at a level of access, its lower 95%% limit; 1 is full protection",
    )  # fmt: skip
    parser.add_argument("--cache", metavar="DIR", help="folder of rows that audits share (DIR/cache)")
    parser.add_argument("--init", action="store_true", help="write a configuration to fill in")
    parser.add_argument(
        "--plain", metavar="MODEL", help="--init: the protected model before it was locked or hardened"
    )
    _quiet(parser)
    _json(parser)


def _card(verbs: argparse._SubParsersAction[Parser]) -> None:
    parser = _verb(verbs, "card", "write a section for the model card of a locked model, in Markdown")
    parser.add_argument("model", metavar="DST", help="the locked model")
    _json(parser)


def _demo(verbs: argparse._SubParsersAction[Parser]) -> None:
    parser = _verb(
        verbs, "demo", "lock, verify, merge, unlock and audit an embedded model, in about a minute",
        "Prints a table and writes demo.json, demo.png and the report of an audit.",
    )  # fmt: skip
    parser.add_argument("-o", "--output", metavar="DIR", default="demo", help="folder to write (%(default)s)")
    parser.add_argument(
        "--full", action="store_true", help="the full-dose grid for every method, not exact alone"
    )
    _quiet(parser)
    _json(parser)


def _completion(verbs: argparse._SubParsersAction[Parser]) -> None:
    parser = _verb(
        verbs,
        "completion",
        "print a script for tab completion",
        "bash: source <(unmergeable completion bash)\n"
        "zsh:  source <(unmergeable completion zsh)\n"
        "fish: unmergeable completion fish | source",
    )
    parser.add_argument("shell", choices=SHELLS)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a positive number")
    return int(text)


def _merge_method(text: str) -> str:
    if text not in MERGE_METHODS:
        from difflib import get_close_matches

        near = get_close_matches(text, MERGE_METHODS)
        more = f", did you mean {' or '.join(near)}?" if near else ""
        raise argparse.ArgumentTypeError(
            f"'{text}' is no merge method (`unmergeable merge --methods` lists them){more}"
        )
    return text


def _requirement(text: str) -> tuple[int, float]:
    level, _, value = text.partition("=")
    try:
        return int(level), float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not LEVEL=VALUE, as in 0=0.9") from None


def _rate(text: str) -> float:
    try:
        rate = float(text)
    except ValueError:
        rate = -1.0
    if not 0 <= rate < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a rate from 0 up to 1")
    return rate

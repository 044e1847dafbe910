"""What the command line accepts of thieves and judges: merge, attack, audit. Imports nothing heavy."""

from __future__ import annotations

import argparse

from ._parser_parts import Parser, architecture, json, positive, quiet, verb

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


def merge(verbs: argparse._SubParsersAction[Parser]) -> None:
    parser = verb(
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
    locked.add_argument("-j", "--jobs", metavar="N", type=positive, help="threads (2)")
    quiet(parser)
    json(parser)


def attack(verbs: argparse._SubParsersAction[Parser]) -> None:
    parser = verb(
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
    architecture(parser)
    quiet(parser)
    json(parser)


def audit(verbs: argparse._SubParsersAction[Parser]) -> None:
    parser = verb(
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
        "-w", "--workers", metavar="N", type=positive, help="processes (one a core, as memory allows)"
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
    quiet(parser)
    json(parser)


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

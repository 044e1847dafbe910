"""What the command line accepts of `harden`. Imports nothing heavy."""

from __future__ import annotations

import argparse

from ._parser_parts import Parser, json, passphrase, positive, quiet, verb

# Spelled out here, for what they name is imported when it is used; a test compares.
OBJECTIVES = ("trap", "collapse", "kindred", "trap2", "repel", "plain")
TASKS = ("image-classification", "language-modelling", "text-classification", "sequence-to-sequence")


def harden(verbs: argparse._SubParsersAction[Parser]) -> None:
    parser = verb(
        verbs,
        "harden",
        "train a fine-tune on for a little, to make merges of it fail also where a lock is undone",
        "EXPERT is only read. A training that was killed goes on when the same command is given again.\n"
        "What it stops and what not, only an audit says.",
    )
    parser.add_argument("expert", metavar="EXPERT", help="the fine-tune, a folder")
    parser.add_argument("dst", metavar="DST", help="where to write it; must not exist")
    parser.add_argument("--base", metavar="BASE", required=True, help="the model that it was fine-tuned from")
    parser.add_argument(
        "--data",
        metavar="PATH",
        required=True,
        help="examples of its task; a part is held out to measure on",
    )
    parser.add_argument("--task", choices=TASKS, help="what the data is for (as the model's class says)")
    parser.add_argument(
        "--set",
        metavar="FIELD=VALUE",
        action="append",
        help="a field of the task, as in an audit's configuration",
    )
    parser.add_argument(
        "--proxy", metavar="MODEL", dest="proxies", action="append",
        help="another fine-tune of the base, or an adapter, in the place of a thief's; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--made", metavar="KIND", action="append", choices=("random", "spectrum"),
        help="directions that are made up in the place of a thief's fine-tunes: random, spectrum; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--objective", metavar="NAME",
        help=f"{', '.join(OBJECTIVES)}, or several with a + between them (trap+collapse+kindred for images, trap for "
        "text)",
    )  # fmt: skip
    parser.add_argument(
        "--strength", metavar="λ", type=float, help="of the objective, fixed, or the first to try"
    )
    parser.add_argument(
        "--may", metavar="PART", type=float,
        help="what simulated merges may keep of the task, 0 to 1: the strength follows (0.03, 0.02 for language "
        "models, unless --strength or --max-loss is given)",
    )  # fmt: skip
    parser.add_argument(
        "--max-loss", metavar="POINTS", type=float,
        help="search strength and steps for what exposes least and loses no more of the held-out score: "
        "points of accuracy, or per cent of the cross-entropy; exit code 1 if there is none",
    )  # fmt: skip
    parser.add_argument(
        "--labels", metavar="PART", type=float,
        help="how much of the loss asks for the labels once more, 0 to 1 (1; .5 for images whose strength follows); "
        "the rest for answers: of the fine-tune itself or, if the strength follows, of plain training, which comes "
        "first; 0, for its own alone, is better where data is little",
    )  # fmt: skip
    parser.add_argument(
        "--steps",
        metavar="N",
        type=positive,
        help="of training (300; 600 for sequence to sequence, 1200 for language models)",
    )
    parser.add_argument("--rate", metavar="R", type=float, help="the highest learning rate")
    parser.add_argument("--batch", metavar="N", type=positive, help="examples a step")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of everything random (%(default)s)")
    parser.add_argument("--device", metavar="NAME", default="auto", help="auto, cpu, cuda (%(default)s)")
    parser.add_argument(
        "--precision", choices=("auto", "fp32", "bf16"), default="auto",
        help="of passes; weights stay float32 (%(default)s: bf16 on a GPU that has it)",
    )  # fmt: skip
    parser.add_argument(
        "--gradient-checkpointing", action="store_true", help="less memory for activations, more time"
    )
    parser.add_argument(
        "--control", metavar="DIR",
        help="also write the fine-tune trained plainly for as many steps: an audit's unprotected model",
    )  # fmt: skip
    parser.add_argument("--lock", metavar="KEY", dest="key", help="then lock the result with this key")
    passphrase(parser)
    quiet(parser)
    json(parser)

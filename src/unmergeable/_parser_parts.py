"""What parsers of several verbs have in common. Imports nothing heavy."""

from __future__ import annotations

import argparse
from typing import NoReturn

from .errors import UsageError


class Parser(argparse.ArgumentParser):
    """A parser that raises instead of exiting: one place decides what an error looks like."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, hint=f"see {self.prog} --help")


def verb(verbs: argparse._SubParsersAction[Parser], name: str, text: str, more: str = "") -> Parser:
    return verbs.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.\n\n{more}".rstrip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def json(parser: Parser) -> None:
    parser.add_argument("--json", action="store_true", help="print one versioned JSON document")


def key(parser: Parser, *, required: bool, text: str) -> None:
    parser.add_argument("-k", "--key", metavar="KEY", required=required, help=text)
    passphrase(parser)


def passphrase(parser: Parser) -> None:
    parser.add_argument(
        "--passphrase-file", metavar="FILE", help="read the key's passphrase from the first line of a file"
    )


def quiet(parser: Parser) -> None:
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress bar")


def architecture(parser: Parser) -> None:
    parser.add_argument("--config", metavar="FILE", help="config.json to use in place of the model's own")
    parser.add_argument("--spec", metavar="FILE", help="spec to use in place of a shipped or proven one")


def jobs(parser: Parser) -> None:
    parser.add_argument("-j", "--jobs", metavar="N", type=positive, default=2, help="threads (%(default)s)")


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a positive number")
    return int(text)

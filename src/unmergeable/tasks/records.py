"""Records with named fields: lines of .jsonl, rows of a .csv with a header, or rows of a saved data set."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from ..checkpoint.files import require_regular
from ..checkpoint.problems import Problems, quoted
from ..errors import InputError
from .fields import Source
from .sources import is_saved, load_saved

Record = tuple[str, Mapping[str, Any]]  # where it is, for messages, and its fields

LIMIT = 20  # problems of one file that are looked for


def json_lines(path: Path) -> Iterator[Record]:
    """The objects of a .jsonl file, one a line; empty lines are passed over. Read as it goes.

    Raises:
        InputError: not a regular file, not UTF-8, or a line that is not an object.
    """
    require_regular(path)
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            place = f"{path}: line {number}"
            try:
                value = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except ValueError as error:  # of UTF-8 or of JSON
                raise InputError("not a line of JSON", where=place, got=str(error)[:200]) from error
            if not isinstance(value, dict):
                raise InputError("not a JSON object", where=place, got=quoted(line.decode(), 60))
            yield place, value


def csv_rows(path: Path) -> Iterator[Record]:
    """The rows of a .csv file by the names in its header. Read as it goes.

    Raises:
        InputError: not a regular file, not UTF-8, no header, or a row of another length.
    """
    require_regular(path)
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, strict=True)
        try:
            header = next(rows, None)
            if not header or not any(header) or len(set(header)) != len(header):
                got = "an empty file" if header is None else quoted(",".join(header))
                expected = "different names of columns in the first line"
                raise InputError("a .csv without a header", where=path, expected=expected, got=got)
            for row in rows:
                place = f"{path}: line {rows.line_num}"
                if not row:
                    continue
                if len(row) != len(header):
                    expected = f"{len(header)} values, as in the header"
                    raise InputError("a row of another length", where=place, expected=expected, got=len(row))
                yield place, dict(zip(header, row, strict=True))
        except UnicodeDecodeError as error:
            raise InputError("not UTF-8", where=path, got=str(error)[:200]) from error
        except csv.Error as error:
            raise InputError("not a .csv", where=f"{path}: line {rows.line_num}", got=error) from error


def saved_rows(found: Any, path: Path) -> Iterator[Record]:
    """The rows of a saved data set. Read as it goes."""
    for number, row in enumerate(found):
        yield f"{path}: row {number}", row


def records_of(
    source: Source, path: Path, where: str, what: str
) -> tuple[Iterator[Record], Mapping[str, Any]]:
    """The records of a table, and the features of a data set's columns.

    Args:
        source: its split is of a data set. path: of the table. where, what: for messages.

    Raises:
        InputError: a form that is not known.
    """
    if path.is_dir() and is_saved(path):
        found = load_saved(path, source.split)
        return saved_rows(found, path), found.features
    if source.split is not None:
        raise InputError("only saved data sets have splits", where=f"{where}: split", got=source.split)
    if path.suffix == ".csv":
        return csv_rows(path), {}
    if path.suffix == ".jsonl":
        return json_lines(path), {}
    expected = "a .csv with a header, a .jsonl, or a folder saved by datasets"
    raise InputError(f"no form of {what} that is known", where=path, expected=expected)


def table(
    records: Iterator[Record], given: Mapping[str, str | None], usual: Mapping[str, tuple[str, ...]],
    limit: int | None, path: Path,
) -> tuple[dict[str, list[Any]], list[str]]:  # fmt: skip
    """Some fields of all records as columns.

    Args:
        records: where from.
        given: by what is wanted, the name of its field as the configuration gives it.
        usual: names to look for where it gives none; what has none of either is left out.
        limit: only the first so many records.
        path: for messages.

    Returns: the values by what is wanted, and where each record is.

    Raises:
        InputError: no records, a field that there is not, or records that lack one.
    """
    stream = islice(records, limit)
    first = next(stream, None)
    if first is None:
        raise InputError("no examples", where=path)
    problems = Problems(path)
    names = {}
    for want, name in given.items():
        candidates = usual.get(want, ()) if name is None else (name,)
        there = [one for one in candidates if one in first[1]]
        if there:
            names[want] = there[0]
        elif candidates:
            what = f"no such column or field for {want}"
            expected = " | ".join(map(str, first[1])) or None
            got = " | ".join(candidates)
            problems.add(
                what, expected=expected, got=got, hint=f"name it by {want}:" if name is None else None
            )
    problems.raise_any()
    columns: dict[str, list[Any]] = {want: [] for want in names}
    places = []
    for place, record in _with(first, stream):
        missing = [name for name in names.values() if name not in record]
        if missing:
            got = " | ".join(map(str, record)) or "no fields"
            problems.add("a record without a field", where=place, expected=" | ".join(missing), got=got)
            if len(problems.found) >= LIMIT:
                break
            continue
        for want, name in names.items():
            columns[want].append(record[name])
        places.append(place)
    problems.raise_any()
    return columns, places


def _with(first: Record, others: Iterator[Record]) -> Iterator[Record]:
    yield first
    yield from others


def texts(values: list[Any], places: list[str], path: Path, what: str) -> list[str]:
    """Values that must be text with something in it.

    Raises:
        InputError: they are not.
    """
    problems = Problems(path)
    for value, place in zip(values, places, strict=True):
        if not isinstance(value, str):
            problems.add("not text", where=place, expected=f"text as {what}", got=type(value).__name__)
        elif not value.strip():
            problems.add("an empty text", where=place, expected=f"text as {what}")
        if len(problems.found) >= LIMIT:
            break
    problems.raise_any()
    return values

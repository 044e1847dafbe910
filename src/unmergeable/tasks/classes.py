"""The classes of a model, by number and by name: labels of any form become the numbers of its outputs."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint.problems import Problems, quoted
from ..errors import InputError

_GENERIC = re.compile(r"LABEL_\d+")


@dataclass(frozen=True)
class Classes:
    """What a model tells apart.

    Attributes:
        count: how many outputs it has.
        numbers: of the names that are known; empty if the classes have no names.
        where: the task, for messages.
    """

    count: int
    numbers: dict[str, int]
    where: str

    @property
    def names(self) -> list[str]:
        """The known names, in the order of the outputs."""
        return sorted(self.numbers, key=lambda name: self.numbers[name])

    def read(self, labels: Sequence[Any], source: object, place: Callable[[int], str]) -> list[int]:
        """The number of each label: it is one, or text with one, or a name.

        Args:
            labels: as they are in the data.
            source: the file or folder, for messages.
            place: where in it a label is.

        Raises:
            InputError: labels that are none of the model's classes.
        """
        found: list[int] = []
        strange: dict[str, list[int]] = {}
        for row, label in enumerate(labels):
            number = self.number(label)
            if number is None:
                strange.setdefault(quoted(label, 40) if isinstance(label, str) else ascii(label), []).append(
                    row
                )
            else:
                found.append(number)
        if not strange:
            return found
        problems = Problems(source)
        expected = f"a number from 0 to {self.count - 1}"
        if self.numbers:
            shown = ", ".join(self.names[:12]) + (", …" if len(self.names) > 12 else "")
            expected = f"{expected}, or {shown}"
        for label, rows in strange.items():
            many = f" and {len(rows) - 1} more" if rows[1:] else ""
            problems.add(
                "a label that is none of the model's classes",
                where=f"{source}: {place(rows[0])}{many}",
                expected=expected,
                got=label,
                hint=None
                if self.numbers
                else "name the classes by classes:, in the order of the model's outputs",
            )
        problems.raise_any()
        raise AssertionError("unreachable")

    def number(self, label: Any) -> int | None:
        """The number of one label; None if it is none of the model's classes."""
        if isinstance(label, str):
            known = self.numbers.get(label)
            if known is not None:
                return known
            if not re.fullmatch(r"\d+", label.strip()):
                return None
            label = int(label)
        if isinstance(label, (bool, np.bool_)) or not isinstance(label, (int, np.integer)):
            return None
        return int(label) if 0 <= label < self.count else None

    def named(self, labels: Sequence[Any], feature: Any, source: object) -> list[Any]:
        """Labels of a saved data set, by name where it has names: its order need not be the model's.

        Args:
            labels: numbers, or whatever its column holds.
            feature: what `datasets` says of the column.
            source: the folder, for messages.

        Raises:
            InputError: its names are not those of the model's classes.
        """
        names: list[str] | None = getattr(feature, "names", None)
        if names is None or not self.numbers or names == [str(number) for number in range(len(names))]:
            return list(labels)
        strange = [name for name in names if name not in self.numbers]
        if strange:
            raise InputError(
                "the data set's classes are not the model's",
                where=source,
                expected=", ".join(self.names[:12]),
                got=", ".join(map(quoted, strange[:12])),
                hint="give its names by classes:, in the order of the model's outputs",
            )
        known = range(len(names))
        return [names[label] if label in known else label for label in labels]


def read_classes(config: Any, given: Sequence[str] | None, model: Path, where: str) -> Classes:
    """The classes of a model.

    Args:
        config: of the model.
        given: their names in order, where they are not those of its label2id.
        model: its folder; where: the task; for messages.

    Raises:
        InputError: names that do not fit the model.
    """
    count = int(config.num_labels)
    if given is not None:
        if len(set(given)) != len(given) or len(given) != count:
            what = "classes that are not those of the model"
            got = f"{len(set(given))} different of {len(given)}"
            raise InputError(what, where=f"{where}: classes", expected=f"{count} different names", got=got)
        return Classes(count, {name: number for number, name in enumerate(given)}, where)
    try:
        known = {str(name): int(number) for name, number in (config.label2id or {}).items()}
    except (TypeError, ValueError):
        got = ascii(config.label2id)[:200]
        raise InputError(
            "label2id does not fit the model", where=model, expected="numbers", got=got
        ) from None
    if all(_GENERIC.fullmatch(name) for name in known):
        return Classes(count, {}, where)
    wrong = {name: number for name, number in known.items() if not 0 <= number < count}
    if wrong or len(set(known.values())) != len(known):
        got = str(wrong)[:200] if wrong else "several names of one class"
        raise InputError(
            "label2id does not fit the model", where=model, expected=f"0 to {count - 1}", got=got
        )
    return Classes(count, known, where)

"""What `verify` says: a list of checks, each with what was measured and what would have been allowed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

DOCUMENT, DOCUMENT_VERSION = "unmergeable.verify", 1


@dataclass(frozen=True)
class Check:
    """One claim.

    Attributes:
        name: what was looked at; a site's check is called "site" and the site's name.
        held: whether the claim holds; None where it was not looked at, and `detail` says why.
        measured, bound: the worst that was found and what is allowed, None where nothing is measured.
        detail: a sentence; for a failure it begins with the place of the first difference.
        place: that place: a tensor, file or instance of a site.
    """

    name: str
    held: bool | None
    measured: float | None = None
    bound: float | None = None
    detail: str = ""
    place: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """JSON values; a number that is not finite is null."""
        numbers = {
            name: None if value is None or not isfinite(value) else value
            for name, value in (("measured", self.measured), ("bound", self.bound))
        }
        return {"name": self.name, "held": self.held, **numbers, "detail": self.detail, "place": self.place}

    def __str__(self) -> str:
        word = "not checked" if self.held is None else "holds" if self.held else "FAILS"
        numbers = (
            "" if self.measured is None or self.bound is None else f" {self.measured:.1e} of {self.bound:.1e}"
        )
        return f"{self.name}: {word}{numbers}" + (f" ({self.detail})" if self.detail else "")


@dataclass(frozen=True)
class Certificate:
    """Whether one checkpoint is the same function as another, and how that was found out.

    Attributes:
        source, destination: the two checkpoints.
        method: what the manifest says it was locked by; None without a manifest.
        options: the method's options.
        checks: in the order in which they were made.
        seed: of the probes; with it every number can be had again.
        seconds: how long it took.
        notes: sentences that the reader should know.
    """

    source: str
    destination: str
    method: str | None
    checks: tuple[Check, ...]
    seed: int
    seconds: float
    options: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        """Whether no claim failed."""
        return all(check.held is not False for check in self.checks)

    @property
    def first_failure(self) -> Check | None:
        """The first site that differs, in reading order; else the first check that failed."""
        failed = [check for check in self.checks if check.held is False]
        sites = [check for check in failed if check.name.startswith("site ")]
        return next(iter(sites or failed), None)

    def as_dict(self) -> dict[str, Any]:
        """The JSON document of `unmergeable verify --json`."""
        first = self.first_failure
        return {
            "document": DOCUMENT,
            "version": DOCUMENT_VERSION,
            "source": self.source,
            "destination": self.destination,
            "holds": self.holds,
            "method": self.method,
            "options": dict(self.options),
            "checks": [check.as_dict() for check in self.checks],
            "first_failure": None if first is None else first.as_dict(),
            "seed": self.seed,
            "seconds": self.seconds,
            "notes": list(self.notes),
        }

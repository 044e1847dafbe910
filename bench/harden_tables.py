"""The tables of hardening, of what bench/harden holds."""

from __future__ import annotations

from pathlib import Path


def write(target: Path, kept: Path) -> None:
    """Write the document."""
    raise NotImplementedError

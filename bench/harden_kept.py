"""Documents of bench/harden that are no records: prices, side effects, precisions; written and read in one place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

KEPT = Path(__file__).parent / "harden"


def keep_document(name: str, found: Any) -> None:
    (KEPT / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def documents(kept: Path, kind: str) -> dict[str, Any]:
    """What is kept as `kind`-NAME.json, by name, in its order."""
    return {
        path.stem.removeprefix(f"{kind}-"): json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(kept.glob(f"{kind}-*.json"))
    }

"""Prove the shipped specs anew: `python bench/make_specs.py [FAMILY …]` writes src/unmergeable/specs/*.json.

Classes of a family that differ in their head alone share an entry: their sites are the same. One file a family,
and index.json, which says in which file a class is. Prints what could not be proven.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import transformers

from families import FAMILIES, configurations
from unmergeable.errors import UnmergeableError
from unmergeable.prove.prove import prove_specs

TARGET = Path(__file__).parent.parent / "src" / "unmergeable" / "specs"
OWN = ("configs", "untouched", "ignored", "prefix", "evidence")  # what each class has for itself


def family_file(family: str) -> dict[str, Any]:
    """All specs of one family, folded."""
    entries: dict[str, dict[str, Any]] = {}
    defaults: dict[str, Any] = {}
    for config in configurations(family):
        name = config["architectures"][0]
        if not hasattr(transformers, name):
            print(f"  no class {name}", flush=True)
            continue
        started = time.monotonic()
        try:
            specs = prove_specs(config)
        except UnmergeableError as error:
            print(f"  {name} {_variant(config)}: {error}", flush=True)
            continue
        for spec in specs:
            data = spec.as_dict()
            own = {key: data.pop(key) for key in OWN}
            evidence = {site["name"] + site["acts"]: site.pop("evidence") for site in data["sites"]}
            own["evidence"]["sites"] = {
                "error": max(e["error"] for e in evidence.values()),
                "guard": min(e["guard"] for e in evidence.values()),
                "instances": sum(e["instances"] for e in evidence.values()),
            }
            architecture = data.pop("architecture")
            reference = f"{data['model_type']}-{len(defaults)}"
            same = next((key for key, value in defaults.items() if value == data["defaults"]), None)
            if same is None:
                defaults[reference] = data["defaults"]
            data["defaults"] = same or reference
            key = json.dumps(data, sort_keys=True)
            entry = entries.setdefault(key, {**data, "architectures": {}})
            known = entry["architectures"].setdefault(architecture, own)
            known["configs"] += [fields for fields in own["configs"] if fields not in known["configs"]]
        print(f"  {name} {_variant(config)}: {len(specs)} in {time.monotonic() - started:.0f} s", flush=True)
    return {"format": 1, "defaults": defaults, "specs": list(entries.values())}


def _variant(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in ("model_type", "architectures")}


def main(families: list[str]) -> None:
    TARGET.mkdir(exist_ok=True)
    for family in families or FAMILIES:
        print(family, flush=True)
        data = family_file(family)
        (TARGET / f"{family}.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    index = {
        name: path.name
        for path in sorted(TARGET.glob("*.json"))
        if path.name != "index.json"
        for entry in json.loads(path.read_text(encoding="utf-8"))["specs"]
        for name in entry["architectures"]
    }
    (TARGET / "index.json").write_text(json.dumps(index, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])

"""Results as text for people. What a script should read is the JSON document."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .certificate import Certificate
    from .demo import DemoResult, Locked, Merge
    from .inspection import ComponentReport, Inspection, LockedReport
    from .report import LockReport
    from .unlock import UnlockReport


def table(header: Sequence[str], rows: Iterable[Sequence[object]], numbers: Iterable[int] = ()) -> str:
    """Columns as wide as their widest cell, those in `numbers` flush right."""
    cells = [list(map(str, row)) for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    right = set(numbers)
    return "\n".join(
        "  ".join(
            cell.rjust(width) if k in right else cell.ljust(width)
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )


def fields(pairs: Iterable[tuple[str, object]]) -> str:
    """Names and values, one a line, the values aligned; a value of None is left out."""
    kept = [(name, value) for name, value in pairs if value is not None]
    width = max(len(name) for name, _ in kept) + 2
    return "\n".join(f"{name:<{width}}{value}" for name, value in kept)


def size(count: float) -> str:
    """Bytes in units of a thousand, as disks are sold: 1.7 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def inspection(found: Inspection) -> str:
    """The text of `unmergeable inspect`."""
    blocks = [
        fields(
            [
                ("model", found.model),
                ("weights", f"{plural(found.files, 'file')}, {size(found.nbytes)}"),
                ("locked", "no" if found.locked is None else _locked(found.locked)),
            ]
        )
    ]
    return "\n\n".join([*blocks, *(_component(part) for part in found.components)])


def _locked(locked: LockedReport) -> str:
    domain = ", in a domain" if locked.domain else ""
    return f"by {locked.key}, method {locked.method}{domain} (verify -k checks that)"


def _component(part: ComponentReport) -> str:
    title = [("component", part.name if part.name != "." else None)]
    if part.passed_through is not None:
        return fields([*title, ("left alone", part.passed_through)])
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in sorted((part.dtypes or {}).items()))
    share = part.acted_on / part.parameters if part.parameters else 0
    head = fields(
        [
            *title,
            ("class", f"{part.architecture}, {part.layout} names"),
            ("spec", part.spec[:16]),
            ("proven", _proof(part.evidence)),
            ("tensors", dtypes),
            ("parameters", f"{part.parameters:,}, {share:.0%} of them in tensors that a lock moves"),
        ]
    )
    rows = [
        (site.name, site.kind, site.group, site.size, f"{site.instances} x {site.elements}", site.tensors)
        for site in part.sites
    ]
    header: tuple[str, ...] = ("site", "kind", "group", "size", "elements", "tensors")
    # A shipped spec keeps the evidence of all its sites together: it stands above the table then.
    if any(site.evidence != part.evidence.get("sites", {}) for site in part.sites):
        header = (*header, "evidence")
        texts = [evidence(site.evidence) for site in part.sites]
        lines = [
            head,
            "",
            table(header, [(*row, text) for row, text in zip(rows, texts, strict=True)], (3, 4, 5)),
        ]
    else:
        lines = [head, "", table(header, rows, (3, 4, 5))]
    if part.refused:
        lines += ["", "left alone:"] + [f"  {site}: {reason}" for site, reason in part.refused]
    if part.untouched:
        lines += ["", f"untouched: {_some(part.untouched)}"]
    return "\n".join(lines)


def _proof(found: Mapping[str, Any]) -> str | None:
    """How a spec was proven; shipped specs keep the errors of all sites together."""
    if not found:
        return None
    versions = ", ".join(f"{name} {found[name]}" for name in ("transformers", "torch") if name in found)
    measured = evidence(found.get("sites", {}))
    return "; ".join(part for part in (f"with {versions}" if versions else "", measured) if part) or None


def evidence(found: Mapping[str, Any]) -> str:
    """The measured numbers of a proof in one line."""
    parts = []
    for name, value in found.items():
        if isinstance(value, float):
            parts.append(f"{name} {value:.1e}")
        elif isinstance(value, str | int) and not isinstance(value, bool):
            parts.append(f"{name} {value}")
    return ", ".join(parts)


def _some(names: Sequence[str], most: int = 6) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most:,} more"


def locked(report: LockReport) -> str:
    """The text of `unmergeable lock`."""
    several = len({site.component for site in report.sites}) > 1
    rows = [
        (
            f"{site.component}: {site.site}" if several else site.site,
            site.group,
            f"{site.acted} of {site.instances}",
            "" if site.moved is None else f"{site.moved:.0%}",
        )
        for site in report.sites
    ]
    head = fields(
        [
            ("plan for" if report.dry_run else "locked", f"{report.source} -> {report.destination}"),
            ("method", report.method + (", in a domain" if report.domain else "")),
            ("key", report.key),
            (
                "tensors",
                f"{report.tensors_changed:,} changed, {report.tensors_untouched:,} as they were, "
                f"{size(report.nbytes)}",
            ),
            ("rounding", _rounding(report.rounding)),
            ("time", None if report.dry_run else f"{report.seconds:.1f} s"),
        ]
    )
    sites = table(("site", "group", "acted on", "moved"), rows, numbers=(2, 3))
    left = [f"  {site}: {reason}" for _, site, reason in report.refused]
    return "\n".join([head, "", sites, *(["", "left alone:", *left] if left else [])])


def _rounding(rounding: Mapping[str, Any]) -> str | None:
    largest = rounding["largest"]
    if largest is None:
        return None
    if largest == 0:
        return "none, only bits were moved"
    return f"{largest:.1e} in {rounding['tensor']}, where half an ulp is {rounding['half_ulp']:.1e}"


def certificate(found: Certificate) -> str:
    """The text of `unmergeable verify`."""
    words = {True: "holds", False: "FAILS", None: "not checked"}
    verdict = "the same function" if found.holds else "NOT the same function"
    if found.holds and not any(check.name.startswith("runtime") and check.held for check in found.checks):
        verdict += ", by its weights: no outputs were compared"
    rows = [
        (check.name, words[check.held], _number(check.measured), _number(check.bound), check.detail)
        for check in found.checks
    ]
    head = fields(
        [
            ("verified", f"{found.source} -> {found.destination}"),
            ("verdict", verdict),
            ("method", found.method or "not known, there is no manifest"),
            ("time", f"{found.seconds:.1f} s, probes of seed {found.seed}"),
        ]
    )
    return f"{head}\n\n{table(('check', '', 'measured', 'bound', 'about'), rows, numbers=(2, 3))}"


def _number(value: float | None) -> str:
    return "" if value is None else "0" if value == 0 else f"{value:.1e}"


def unlocked(report: UnlockReport) -> str:
    """The text of `unmergeable unlock`."""
    return fields(
        [
            ("unlocked", f"{report.source} -> {report.destination}"),
            ("method", report.method),
            ("key", report.key),
            ("tensors", f"{report.tensors:,}, {size(report.nbytes)}"),
            (
                "bits",
                "all as they were before the lock" if report.bit_for_bit else "not all as before the lock",
            ),
            ("time", f"{report.seconds:.1f} s"),
        ]
    )


def demonstrated(result: DemoResult) -> str:
    """The text of `unmergeable demo`."""
    head = fields(
        [
            ("protected", _learnt(result, result.protected)),
            ("thief's own", "; ".join(_learnt(result, task) for task in result.own)),
        ]
    )
    locks = table(
        ("lock", "accuracy alone", "output changed by", "verify", "unlock", "thief gets"),
        [
            (
                lock.method,
                f"{lock.standalone:.3f}",
                f"{lock.output_change:.1e}" if lock.verified is not None else "",
                {True: "holds", False: "FAILS", None: ""}[lock.verified],
                _undone(lock),
                f"{lock.joint:+z.2f}",
            )
            for lock in result.locks
        ],
        numbers=(1, 2, 5),
    )
    merges = table(
        ("lock", "best merge by", "with", "protected", "own", "thief gets"),
        [
            (
                lock.method,
                merge.method,
                _options(merge),
                f"{merge.protected:+z.2f}",
                f"{merge.own:+z.2f}",
                f"{merge.joint:+z.2f}",
            )
            for lock in result.locks
            for merge in lock.merges
        ],
        numbers=(3, 4, 5),
    )
    legend = (
        "protected, own: what a merge keeps of the protected task, and of the worst of the thief's own, where 0\n"
        "is the base and 1 the task's own fine-tune. thief gets: the worse of the two. Chosen on some images,\n"
        f"reported on others. The protected model by itself: {result.alone[0]:+z.2f}, {result.alone[1]:+z.2f}."
    )
    judged = "the audit of exact, by two of its attacks:\n" + "\n".join(result.audit)
    files = f"written: {', '.join(result.files)} ({result.seconds:.0f} s)"
    return "\n\n".join([head, locks, merges, legend, judged, files])


def _learnt(result: DemoResult, task: str) -> str:
    return f"{task} (base {result.base[task]:.3f}, fine-tuned {result.plain[task]:.3f})"


def _undone(lock: Locked) -> str:
    if lock.undone is None or isinstance(lock.undone, str):
        return lock.undone or ""
    return f"to {lock.undone:.0e} of its weights"


def _options(merge: Merge) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in merge.options.items())

"""The text of `unmergeable audit`: a verdict a level, and what each kind of thief took."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._render import fields, table

if TYPE_CHECKING:
    from .audit.results import AuditResult, Requirement
    from .audit.rows import Row
    from .audit.scores import Chosen


def audited(result: AuditResult) -> str:
    """The text of `unmergeable audit`."""
    alone = result.standalone
    protected = result.reference.protected
    head = fields(
        [
            ("audited", str(result.models["protected"]["path"])),
            ("task", f"{protected}, {alone['plain']:.4f} before protection, {alone['protected']:.4f} after"),
            ("thief's own", ", ".join(result.reference.own)),
            ("suite", f"{result.suite}, {len(result.rows)} rows, {len(result.left_out)} left out"),
            ("time", f"{result.seconds:.0f} s"),
        ]
    )
    document = result.as_dict()
    verdicts = "\n".join(level["verdict"] for level in document["levels"])
    rows = []
    for level in result.levels:
        for floor in level.floors:
            taken, control = floor.chosen["protected"], floor.chosen["plain"]
            rows.append(
                (
                    str(level.level),
                    f"{floor.floor:.2f}",
                    _attack(result.rows, taken),
                    f"{taken.value:+z.2f}",
                    f"{control.value:+z.2f}",
                    f"{floor.chosen['without'].value:+z.2f}",
                )
            )
    chosen = table(
        ("level", "own at least", "best attack", "gets", "unprotected", "without"), rows, (1, 3, 4, 5)
    )
    legend = (
        "gets: the value of the protected task (base 0, fine-tune 1) in a thief's best merge that keeps so much\n"
        "of his own tasks; beside it the same for the unprotected model, and for thieves without either. Chosen\n"
        "on some examples, reported on others."
    )
    doubtful = [row for row in result.rows if row.state != "done" and row.side == "protected"]
    parts = [head, verdicts, chosen, legend]
    if doubtful:
        lines = [f"  {row.attack} ({row.state}): {row.reason}" for row in doubtful]
        parts.append("not counted as protection:\n" + "\n".join(lines))
    parts.append(f"written: {', '.join(result.files)}")
    return "\n\n".join(parts)


def _attack(rows: tuple[Row, ...], chosen: Chosen) -> str:
    """What a thief took, and whether the protected model is in it at all."""
    if chosen.row is None:
        return "nothing, the base"
    row = rows[chosen.row]
    return row.attack if row.side == "protected" else f"without it: {row.attack}"


def missed(requirement: Requirement) -> str:
    """A requirement that does not hold, in words."""
    found = (
        "it could not be judged"
        if requirement.found is None
        else f"its lower limit is {requirement.found:.2f}"
    )
    return f"protection at level {requirement.level} is not {requirement.protection:g}: {found}"

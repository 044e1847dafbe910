"""What `harden` prints for people. What a script should read is the JSON document."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._render import fields, table

if TYPE_CHECKING:
    from .harden import HardenReport

_ABOUT = """\
exposure: the value of the task (base 0, fine-tune 1) in simulated merges with stand-ins for a thief's models, on
held-out examples. What a real thief gets, `unmergeable audit` says: with models and data that were not used here."""


def _plain(report: HardenReport, unit: str) -> list[tuple[str, str, str, str]]:
    """What as much training does without the objective, where it was tried."""
    from .harden.search import lost

    scores = report.standalone
    if "plain" not in scores:
        return []
    change = f"{-lost(scores['before'], scores['plain']):+z.2f} {unit}"
    return [("the same, trained plainly", f"{scores['before']:.4f}", f"{scores['plain']:.4f}", change)]


def _kept_to(report: HardenReport) -> str:
    """What beside the objective the training asks for."""
    if report.labels in (0, 1):
        return "the labels" if report.labels else "its own answers"
    whose = "its own answers" if report.may is None else "plain training's answers"
    return f"{whose}, and {report.labels:g} the labels"


def hardened(report: HardenReport) -> str:
    """The text of `unmergeable harden`."""
    accurate = report.metric == "accuracy"
    unit = "points" if accurate else "% of the cross-entropy"
    head = fields(
        [
            ("hardened", f"{report.expert} -> {report.dst}"),
            ("by", f"{report.objective}, strength {report.strength:.3g}"),
            ("kept to", _kept_to(report)),
            (
                "training",
                f"{report.steps} steps of {report.batch} examples, rate {report.rate:g}, on {report.device}",
            ),
            ("examples", f"{report.examples['training']:,}, and {report.examples['held']:,} held out"),
            ("proxies", ", ".join(report.proxies) or "made up"),
            ("locked", report.locked),
            ("seed", report.seed or None),
            ("time", f"{report.seconds:.0f} s"),
        ]
    )
    standalone, exposure = report.standalone, report.exposure
    rows = [
        (
            f"{report.metric} alone", f"{standalone['before']:.4f}", f"{standalone['after']:.4f}",
            f"{-report.loss:+z.2f} {unit}",
        ),
        *_plain(report, unit),
        ("exposure, mean", f"{exposure['before']['mean']:.2f}", f"{exposure['after']['mean']:.2f}", ""),
        ("exposure, most", f"{exposure['before']['most']:.2f}", f"{exposure['after']['most']:.2f}", ""),
    ]  # fmt: skip
    parts = [head, table(("on held-out examples", "before", "after", "change"), rows, (1, 2))]
    if len(report.trials) > 1:
        tries = [
            (
                f"{one['strength']:.3g}", f"{one['steps']} of {one['of']}", f"{-one['loss']:+z.2f}",
                f"{one['exposure']['mean']:.2f}",
                "yes" if one["allowed"] else "no",
            )
            for one in report.trials
        ]  # fmt: skip
        parts.append(
            table(("strength", "steps", f"change, {unit}", "exposure, mean", "allowed"), tries, (0, 1, 2, 3))
        )
    return "\n\n".join([*parts, _ABOUT])

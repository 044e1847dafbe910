"""One function a verb: call the library, say what came of it. The library is imported when the verb runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from . import _render as render
from ._terminal import passphrase, progress

if TYPE_CHECKING:
    from .keys import Key


@dataclass(frozen=True)
class Outcome:
    """What a verb has to say: a JSON document, the same as text, notes for stderr, and the exit code."""

    document: dict[str, Any]
    text: str
    notes: list[str] = field(default_factory=list)
    code: int = 0


def run(args: argparse.Namespace) -> Outcome:
    """Run the verb of parsed arguments."""
    return _VERBS[args.verb](args)


def _key(args: argparse.Namespace) -> Key:
    from .keys import load_key

    return load_key(args.key, passphrase(args))


def _keygen(args: argparse.Namespace) -> Outcome:
    from .keys import generate_key

    protected = args.passphrase or args.passphrase_file is not None
    key = generate_key(args.output, passphrase(args, new=True) if protected else None)
    return Outcome(
        _document("keygen", key=key.id, file=args.output, passphrase=protected),
        key.id,
        [f"key written to {args.output}: back it up, without it nothing can be unlocked"],
    )


def _inspect(args: argparse.Namespace) -> Outcome:
    from .inspection import inspect

    found = inspect(args.model, config=args.config, spec=args.spec)
    return Outcome(found.as_dict(), render.inspection(found))


def _lock(args: argparse.Namespace) -> Outcome:
    from .lock import lock

    key = _key(args)
    with progress("lock", args.quiet) as told:
        report = lock(
            args.src,
            args.dst,
            key=key,
            method=args.method,
            scales=args.scales,
            domain=args.domain,
            base=args.base,
            dtype=args.dtype,
            prune_rate=args.prune_rate,
            keep_pruned=args.keep_pruned,
            options=None if args.form is None else {"form": args.form},
            **({} if args.condition is None else {"condition": args.condition}),
            config=args.config,
            spec=args.spec,
            jobs=args.jobs,
            dry_run=args.dry_run,
            progress=told,
        )
    locked = Outcome(report.as_dict(), render.locked(report), list(report.notes))
    if not args.verify or args.dry_run:
        return locked
    checked = _verified(args, key)
    return Outcome(
        {**locked.document, "verify": checked.document},
        f"{locked.text}\n\n{checked.text}",
        [*locked.notes, *checked.notes],
        checked.code,
    )


def _verify(args: argparse.Namespace) -> Outcome:
    return _verified(args, None if args.key is None else _key(args))


def _verified(args: argparse.Namespace, key: Key | None) -> Outcome:
    from .verify import verify

    with progress("verify", args.quiet) as told:
        found = verify(
            args.src,
            args.dst,
            key=key,
            run=getattr(args, "run", "auto"),
            config=args.config,
            spec=args.spec,
            jobs=args.jobs,
            progress=told,
        )
    notes = list(found.notes)
    first = found.first_failure
    if first is not None:
        notes.append(f"error: {args.dst} is not what {args.src} is: {first.name}: {first.detail}")
    return Outcome(found.as_dict(), render.certificate(found), notes, 0 if found.holds else 1)


def _unlock(args: argparse.Namespace) -> Outcome:
    from .unlock import unlock

    key = _key(args)
    with progress("unlock", args.quiet) as told:
        report = unlock(
            args.src,
            args.dst,
            key=key,
            manifest=args.manifest,
            accept_changed=args.accept_changed,
            pruned=args.pruned,
            jobs=args.jobs,
            progress=told,
        )
    return Outcome(report.as_dict(), render.unlocked(report), list(report.notes))


def _merge(args: argparse.Namespace) -> Outcome:
    from .authorised import merge

    key = _key(args)
    with progress("merge", args.quiet) as told:
        report = merge(
            args.models,
            args.output,
            key=key,
            method=args.method,
            weights=args.weights,
            base=args.base,
            density=args.density,
            lock_method=args.lock,
            scales=args.scales,
            domain=args.domain,
            jobs=args.jobs,
            progress=told,
        )
    return Outcome(report.as_dict(), render.merged(report), list(report.lock.notes))


def _demo(args: argparse.Namespace) -> Outcome:
    from .demo import demo

    with progress("demo", args.quiet, unit="step") as told:
        result = demo(args.output, full=args.full, progress=told)
    return Outcome(result.as_dict(), render.demonstrated(result))


def _card(args: argparse.Namespace) -> Outcome:
    from .modelcard import model_card

    text = model_card(args.model)
    return Outcome(_document("card", model=args.model, markdown=text), text)


def _completion(args: argparse.Namespace) -> Outcome:
    from ._completion import completion
    from ._parser import build_parser

    return Outcome({}, completion(build_parser(), args.shell))


def _document(name: str, **fields: Any) -> dict[str, Any]:
    """The JSON document of a verb that has no report of its own."""
    return {"document": f"unmergeable.{name}", "version": 1, **fields}


_VERBS: dict[str, Callable[[argparse.Namespace], Outcome]] = {
    "keygen": _keygen,
    "inspect": _inspect,
    "lock": _lock,
    "verify": _verify,
    "unlock": _unlock,
    "merge": _merge,
    "card": _card,
    "demo": _demo,
    "completion": _completion,
}

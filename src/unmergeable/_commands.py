"""One function a verb: call the library, say what came of it. The library is imported when the verb runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from . import _render as render
from . import _render_merge as render_merge
from ._terminal import passphrase, progress
from .errors import UsageError

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
            seed=getattr(args, "seed", None),
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
    from .merge import merge
    from .merging.catalogue import describe, options_of
    from .options import assign

    if args.methods:
        document = describe(args.method)
        return Outcome(document, render_merge.methods(document))
    missing = [name for name, value in (("MODEL", args.models), ("-o/--output", args.output)) if not value]
    if missing:
        raise UsageError(
            f"the following arguments are required: {', '.join(missing)}", hint="see unmergeable merge --help"
        )
    method = args.method or "linear"
    given: dict[str, Any] = {
        "base": args.base,
        "weights": args.weights,
        "density": args.density,
        "template": args.template,
        "seed": args.seed,
        "force": args.force or None,
        "lock_method": args.lock,
        "scales": args.scales or None,
        "domain": args.domain,
        "jobs": args.jobs,
        "options": args.set,
    }
    if args.key is None:
        if args.passphrase_file is not None:
            raise UsageError(
                "--passphrase-file belongs to merging with a key", hint="give -k KEY, or leave it out"
            )
        if args.set:
            given["options"] = assign(method, options_of(method), args.set)
        with progress("merge", args.quiet, unit="step") as told:
            plain = merge(args.models, args.output, method=method, progress=told, **given)
        return Outcome(plain.as_dict(), render_merge.plain(plain), list(plain.notes))
    with progress("merge", args.quiet) as told:
        report = merge(args.models, args.output, key=_key(args), method=method, progress=told, **given)
    return Outcome(report.as_dict(), render_merge.authorised(report), list(report.lock.notes))


def _attack(args: argparse.Namespace) -> Outcome:
    from .attack import attack
    from .attacks import attack_named, merge_attack_maker
    from .options import assign, declared

    made = attack_named(args.name).run if args.audit is None else merge_attack_maker(args.name)
    options = assign(args.name, declared(made), args.set or ())
    with progress("attack", args.quiet, unit="step") as told:
        report = attack(
            args.name,
            args.target,
            args.dst,
            audit=args.audit,
            base=args.base,
            anchor=args.anchor,
            seed=args.seed,
            config=args.config,
            spec=args.spec,
            progress=told,
            **options,
        )
    return Outcome(report.as_dict(), render_merge.attacked(report))


def _harden(args: argparse.Namespace) -> Outcome:
    from . import _render_harden as render_harden
    from .harden import harden

    if args.key is None and args.passphrase_file is not None:
        raise UsageError(
            "--passphrase-file belongs to locking the result", hint="give --lock, or leave it out"
        )
    key = None if args.key is None else _key(args)
    fields = _yaml_pairs(args.set or ())
    with progress("harden", args.quiet, unit="step") as told:
        report = harden(
            args.expert,
            args.dst,
            base=args.base,
            data=args.data,
            task=args.task,
            fields=fields,
            proxies=args.proxies or (),
            made=args.made,
            objective=args.objective,
            strength=args.strength,
            max_loss=args.max_loss,
            may=args.may,
            labels=args.labels,
            steps=args.steps,
            rate=args.rate,
            batch=args.batch,
            seed=args.seed,
            lock=key,
            control=args.control,
            device=args.device,
            precision=args.precision,
            checkpointing=args.gradient_checkpointing,
            progress=told,
        )
    return Outcome(report.as_dict(), render_harden.hardened(report), list(report.notes))


def _yaml_pairs(pairs: Iterable[str]) -> dict[str, Any]:
    """FIELD=VALUE, the value as YAML has it: as it would stand in a configuration."""
    import yaml

    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name or name in found:
            raise UsageError(
                "not a field with its value, once", where=f"--set {pair}", expected="FIELD=VALUE"
            )
        try:
            found[name] = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError):  # of a date that is none
            raise UsageError("not a value", where=f"--set {pair}", expected="YAML") from None
    return found


def _audit(args: argparse.Namespace) -> Outcome:
    if args.init:
        return _audit_init(args)
    if len(args.paths) != 1:
        raise UsageError(
            "an audit has one configuration", got=", ".join(args.paths), hint="--init makes one for models"
        )
    if args.plain is not None:
        raise UsageError("--plain belongs to --init", hint="a configuration names it as protected.plain")
    from . import _render_audit as render_audit
    from .audit import audit

    required = dict(args.require or ())
    if len(required) < len(args.require or ()):
        raise UsageError("a level is required twice", where="--require")
    with progress("audit", args.quiet, unit="row") as told:
        result = audit(
            args.paths[0],
            args.output,
            workers=args.workers,
            budget=args.budget,
            require=required,
            cache=args.cache,
            progress=told,
        )
    failed = [f"error: {render_audit.missed(one)}" for one in result.requirements if not one.holds]
    return Outcome(
        result.as_dict(),
        render_audit.audited(result),
        [*result.notes, *failed],
        0 if result.holds else 1,
    )


def _audit_init(args: argparse.Namespace) -> Outcome:
    for option in ("workers", "budget", "require", "cache"):
        if getattr(args, option) is not None:
            raise UsageError(f"--{option} belongs to an audit, not to --init")
    from .audit.init import init

    base, *models = args.paths
    written = init(base, models, args.output, plain=args.plain)
    return Outcome(
        _document("audit-init", file=str(written)),
        str(written),
        [f"fill in the data of the tasks, then: unmergeable audit {written} -o DIR"],
    )


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
    "harden": _harden,
    "merge": _merge,
    "attack": _attack,
    "audit": _audit,
    "card": _card,
    "demo": _demo,
    "completion": _completion,
}

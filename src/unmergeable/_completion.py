"""Tab completion for bash, zsh and fish, written from the parser itself, so that it cannot disagree with it.

source <(unmergeable completion bash)
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

SHELLS = ("bash", "zsh", "fish")


@dataclass(frozen=True)
class _Option:
    flags: tuple[str, ...]
    help: str
    values: tuple[str, ...]  # what it may be; empty where that is free or there is no value
    valued: bool


@dataclass(frozen=True)
class _Verb:
    name: str
    help: str
    options: tuple[_Option, ...]
    values: tuple[str, ...]  # of its first argument, where these are a fixed list; all others are files


def completion(parser: argparse.ArgumentParser, shell: str) -> str:
    """The completion script for a parser with subcommands, in one of `SHELLS`."""
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](parser.prog, _verbs(parser))


def _verbs(parser: argparse.ArgumentParser) -> list[_Verb]:
    # argparse offers no public view of what a parser accepts; these names have stood since Python 2.7.
    (subparsers,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    helps = {choice.dest: choice.help or "" for choice in subparsers._choices_actions}
    return [_verb(name, helps.get(name, ""), sub) for name, sub in subparsers.choices.items()]


def _verb(name: str, text: str, parser: argparse.ArgumentParser) -> _Verb:
    options: list[_Option] = []
    values: list[str] = []
    for action in parser._actions:
        choices = tuple(str(choice) for choice in action.choices or ())
        if action.option_strings:
            flags = tuple(action.option_strings)
            options.append(_Option(flags, (action.help or "") % vars(action), choices, action.nargs != 0))
        else:
            values += choices
    return _Verb(name, text, tuple(options), tuple(values))


def _bash(prog: str, verbs: list[_Verb]) -> str:
    def words(items: tuple[str, ...] | list[str]) -> str:
        # What stands before a colon is on the line already, and readline adds the rest.
        found = f"""COMPREPLY=($(compgen -W '{" ".join(items)}' -- "$cur"))"""
        return f"""{found}; COMPREPLY=("${{COMPREPLY[@]#"$colon"}}"); return"""

    files = f"_{prog}_files; return"

    def first(verb: _Verb) -> str:
        """The first positional argument, as long as none of its values stands on the line."""
        given = "|".join(f'*" {value} "*' for value in verb.values)
        return f"""case "$given" in {given}) ;; *) {words(verb.values)} ;; esac"""

    of_options = [
        f"    '{verb.name} {flag}') {words(option.values) if option.values else files} ;;"
        for verb in verbs
        for option in verb.options
        if option.valued
        for flag in option.flags
    ]
    of_verbs = [
        f"    '{verb.name} -'*) {words([f for option in verb.options for f in option.flags])} ;;"
        for verb in verbs
    ]
    of_values = [f"    '{verb.name} '*) {first(verb)} ;;" for verb in verbs if verb.values]
    return "\n".join(
        [
            f"_{prog}() {{",
            '  local verb="${COMP_WORDS[1]}"',
            '  local at=$COMP_CWORD colon="" cur="${COMP_WORDS[COMP_CWORD]}"',
            # readline breaks words at colons, and some methods have one in their names
            '  if [ "$cur" = : ]; then cur=""; at=$((at+1)); fi',
            '  if [ "$at" -gt 2 ] && [ "${COMP_WORDS[at-1]}" = : ]; then',
            '    colon="${COMP_WORDS[at-2]}:"; cur="$colon$cur"; at=$((at-2))',
            "  fi",
            '  local prev="${COMP_WORDS[at-1]}" given=" ${COMP_WORDS[*]:2:at-2} "',
            f'  if [ "$COMP_CWORD" = 1 ]; then {words([verb.name for verb in verbs])}; fi',
            '  case "$verb $prev" in',
            *of_options,
            "  esac",
            '  case "$verb $cur" in',
            *of_verbs,
            *of_values,
            "  esac",
            f"  {files}",
            "}",
            f"_{prog}_files() {{",  # sees the variables of its caller; a name may have blanks in it
            "  local IFS=$'\\n'",
            '  compopt -o filenames 2>/dev/null; COMPREPLY=($(compgen -f -- "$cur"))',
            '  COMPREPLY=("${COMPREPLY[@]#"$colon"}")',
            "}",
            f"complete -F _{prog} {prog}",
            "",
        ]
    )


def _zsh(prog: str, verbs: list[_Verb]) -> str:
    def quoted(text: str) -> str:
        escaped = text.replace("\\", "\\\\").replace("[", "\\[").replace("]", "\\]").replace(":", "\\:")
        return escaped.replace("'", "'\\''")

    def argument(option: _Option, flag: str) -> str:
        values = " ".join(option.values).replace(":", "\\:")
        value = f":value:({values})" if values else ":value:_files"
        return f"'{flag}[{quoted(option.help)}]{value if option.valued else ''}'"

    named = [f"'{verb.name}:{quoted(verb.help)}'" for verb in verbs]
    cases = []
    for verb in verbs:
        arguments = [argument(option, flag) for option in verb.options for flag in option.flags]
        if verb.values:
            arguments.append(f"'1:argument:({' '.join(verb.values)})'")
        cases.append(f"    {verb.name}) _arguments {' '.join(arguments)} '*:argument:_files' ;;")
    return "\n".join(
        [
            f"#compdef {prog}",
            f"_{prog}() {{",
            f"  local -a verbs=({' '.join(named)})",
            "  if (( CURRENT == 2 )); then _describe verb verbs; return; fi",
            "  (( CURRENT-- )); shift words",
            "  case $words[1] in",
            *cases,
            "  esac",
            "}",
            f'if [ "$funcstack[1]" = "_{prog}" ]; then _{prog} "$@"; else compdef _{prog} {prog}; fi',
            "",
        ]
    )


def _fish(prog: str, verbs: list[_Verb]) -> str:
    def quoted(text: str) -> str:
        return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"

    lines = []
    for verb in verbs:
        lines.append(f"complete -c {prog} -n __fish_use_subcommand -f -a {verb.name} -d {quoted(verb.help)}")
        seen = f"complete -c {prog} -n '__fish_seen_subcommand_from {verb.name}'"
        for option in verb.options:
            names = " ".join(f"-l {f[2:]}" if f.startswith("--") else f"-s {f[1:]}" for f in option.flags)
            value = f" -x -a '{' '.join(option.values)}'" if option.values else " -r" if option.valued else ""
            lines.append(f"{seen} {names}{value} -d {quoted(option.help)}")
        if verb.values:
            values = " ".join(verb.values)
            first = f"__fish_seen_subcommand_from {verb.name}; and not __fish_seen_subcommand_from {values}"
            lines.append(f"complete -c {prog} -n '{first}' -f -a '{values}'")
    return "\n".join([*lines, ""])

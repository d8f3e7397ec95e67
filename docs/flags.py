"""Writes docs/flags.md from the parsers of both scripts.

    python -m docs.flags

`make docs` runs it after a flag, a default or a help text changed; a test compares the page with
what this file makes.
"""

import argparse
from pathlib import Path

from inversion.audit import flags as attacker
from train import flags as client

PAGE = Path(__file__).with_suffix(".md")
INTRODUCTION = """\
# Flags

Which flags do the two scripts take, and with which defaults? This page lists every flag of
`training.py`, the client, and of `run.py`, the attacker. `make docs` writes it from the parsers, so
`python training.py --help` and `python run.py --help` say the same; please change a help text in
`train/flags.py` or `inversion/audit/flags.py`, not here. Long flags cannot be abbreviated, and a
negative value needs an equals sign: `--input-norm=-1e-6`.
[CONTRIBUTING.md](../CONTRIBUTING.md) says how to add one.
"""
HEADER = "| flag | default | meaning |\n| --- | --- | --- |"


def default_of(action: argparse.Action) -> str:
    """Returns the default in words: `off` for a switch, `none` where there is no value."""
    if action.default is False:
        return "off"
    return "none" if action.default is None else str(action.default)


def meaning_of(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    """Returns the help text as one table cell, followed by the names it chooses from."""
    values = vars(action) | {"prog": parser.prog}
    text = (action.help or "") % {key: "" if v is None else v for key, v in values.items()}
    text = " ".join(text.split()).replace("|", "\\|")
    if action.choices is None:
        return text
    names = ", ".join(f"`{choice}`" for choice in action.choices)
    end = "" if text.endswith(".") else "."
    return f"{text}{end} One of {names}."


def section(parser: argparse.ArgumentParser) -> str:
    """Returns the section of one script: one table per group of flags."""
    tables = []
    for group in merged_groups(parser):
        rows = [
            f"| {', '.join(f'`{name}`' for name in action.option_strings)} "
            f"| {default_of(action)} | {meaning_of(parser, action)} |"
            for action in group[1]
        ]
        tables.append("\n".join([f"### {parser.prog}: {group[0]}\n", HEADER, *rows]))
    return f"## Flags of {parser.prog}\n\n" + "\n\n".join(tables)


def merged_groups(parser: argparse.ArgumentParser) -> list[tuple[str, list[argparse.Action]]]:
    """Returns (title, actions) of every group; groups of the same title become one."""
    groups: dict[str, list[argparse.Action]] = {}
    for group in parser._action_groups:
        actions = [a for a in group._group_actions if "--help" not in a.option_strings]
        if actions:
            groups.setdefault(group.title or "", []).extend(actions)
    return list(groups.items())


def page() -> str:
    """Returns the whole page."""
    sections = [section(script.parser()) for script in (client, attacker)]
    return "\n".join([INTRODUCTION, *(f"{text}\n" for text in sections)])


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"written: {PAGE.relative_to(PAGE.parent.parent)}")

"""Generates docs/manifest.md: a hand-written opening, then tables of every built-in name and its settings.

The tables come from the classes of settings, like the texts of `retort explain`. Names of plug-ins are left out.
"""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from pathlib import Path

from pipeline.reference.explain import GROUPS, REGISTRIES, Topic, built_in, default_text
from pipeline.reference.settings import Setting, about, settings_of
from stages.base import Config

OPENING = Path(__file__).parent / "templates" / "manifest.md"
TOP = ("manifest", "matrix", "resources")
"""Topics of the whole manifest, which are not inside a stage."""
WIDTH = 120


def page() -> str:
    """Return the whole page. Links to all sections replace the word CONTENTS in the opening."""
    sections = _sections()
    headings = {config: _heading(topics, sections) for config, topics in sections.items()}
    text = OPENING.read_text(encoding="utf-8")
    chapter = ""
    for config, topics in sorted(sections.items(), key=lambda section: section[1][0].name not in TOP):
        if chapter != (chapter := _chapter(topics[0])):
            text += f"\n## {chapter}\n"
        text += f"\n### {headings[config]}\n\n{_section(config, topics, headings)}\n"
    return text.replace("CONTENTS", _contents(text))


def _sections() -> dict[type[Config], list[Topic]]:
    """Return class of settings -> topics that use it."""
    sections: dict[type[Config], list[Topic]] = {}
    for topic in built_in():
        sections.setdefault(topic.config, []).append(topic)
    return sections


def _heading(topics: list[Topic], sections: dict[type[Config], list[Topic]]) -> str:
    """Return the heading of a section: its names. If several sections have the same name, also where it is used."""
    name = ", ".join(topic.name for topic in topics)
    counts = Counter(topic.name for several in sections.values() for topic in several)
    if topics[0].what != GROUPS or counts[name] == 1:
        return name
    owners = dict.fromkeys(path.split(".")[-2] for path in topics[0].used.split(", "))
    return f"{name} of {', '.join(owners)}"


def _chapter(topic: Topic) -> str:
    if topic.name in TOP:
        return "The whole file"
    return "Settings inside others" if topic.what == GROUPS else topic.what.capitalize()


def _section(config: type[Config], topics: list[Topic], headings: dict[type[Config], str]) -> str:
    used = ", ".join(f"`{topic.used}`".replace(", ", "`, `").replace(" or ", "` or `") for topic in topics)
    paragraphs = [f"In a manifest: {used}." if topics[0].name not in TOP else ""]
    paragraphs += [_with_links(paragraph) for paragraph in about(config).split("\n\n")]
    lines = [
        f"| `{setting.name}` | {_type(setting, headings)} | {_default(setting)} | {_cell(setting.description)} |"
        for setting in settings_of(config)
    ]
    table = "\n".join(["| setting | type | default | meaning |", "|---|---|---|---|", *lines]) if lines else ""
    return "\n\n".join(filter(None, [*(_filled(paragraph) for paragraph in paragraphs), table]))


def _type(setting: Setting, headings: dict[type[Config], str]) -> str:
    """Return the type and bounds of a setting, with links to the sections of the names and settings in it."""
    text = setting.allowed
    for registry in REGISTRIES.values():
        links = [_link(name, headings[config]) for name, config in registry.built_in.items()]
        text = text.replace(" | ".join(registry), " | ".join(links))
    if setting.config:
        text = text.replace("settings", _link("settings", headings[setting.config]))
    return _cell(text)


def _default(setting: Setting) -> str:
    default = default_text(setting)
    return "required" if setting.required else f"`{default}`" if default else "optional"


def _cell(text: str) -> str:
    return _with_links(text).replace("|", r"\|")


def _with_links(text: str) -> str:
    """Replace the numbers of arXiv papers by links."""
    return re.sub(r"\b(\d{4}\.\d{5})\b", r"[\1](https://arxiv.org/abs/\1)", text)


def _filled(paragraph: str) -> str:
    return textwrap.fill(paragraph, WIDTH, break_long_words=False, break_on_hyphens=False)


def _contents(text: str) -> str:
    """Return a list of links, with one line for each chapter and its sections."""
    lines: list[str] = []
    for level, heading in re.findall(r"^(##|###) (.*)", text, re.M):
        if level == "##":
            lines.append(f"- {_link(heading)}")
        else:
            lines[-1] += f"{', ' if '): [' in lines[-1] else ': '}{_link(heading)}"
    return "\n".join(lines)


def _link(words: str, heading: str | None = None) -> str:
    """Return a link to a section. The anchor is the one that GitHub makes from the heading."""
    anchor = re.sub(r"[^\w\- ]", "", (heading or words).lower()).replace(" ", "-")
    return f"[{words}](#{anchor})"

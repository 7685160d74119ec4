"""docs/manifest.md as text: an opening that is written by hand, then every built-in name and setting as tables.

The tables come from the settings' classes, as `retort explain` does. Names from plug-in packages are left out.
"""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from pathlib import Path

from pipeline.manifest.settings import Setting, about, settings_of
from pipeline.reference.explain import GROUPS, REGISTRIES, Topic, built_in, default_text
from stages.base import Config

OPENING = Path(__file__).parent / "templates" / "manifest.md"
TOP = ("manifest", "matrix", "resources")
"""The parts that no stage has inside."""
WIDTH = 120


def page() -> str:
    """The whole page, with links to all its sections where the opening says CONTENTS."""
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
    """Each class of settings, with all names that it goes by."""
    sections: dict[type[Config], list[Topic]] = {}
    for topic in built_in():
        sections.setdefault(topic.config, []).append(topic)
    return sections


def _heading(topics: list[Topic], sections: dict[type[Config], list[Topic]]) -> str:
    """The names of a class. Where several classes share a name, with the settings that each belongs to."""
    name = ", ".join(topic.name for topic in topics)
    counts = Counter(topic.name for several in sections.values() for topic in several)
    if topics[0].what != GROUPS or counts[name] == 1:
        return name
    return f"{name} of {', '.join(path.split('.')[-2] for path in topics[0].used.split(', '))}"


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
    """Its type and bounds. Names and settings that have a section are links to it."""
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
    """Numbers of arXiv papers become links."""
    return re.sub(r"\b(\d{4}\.\d{5})\b", r"[\1](https://arxiv.org/abs/\1)", text)


def _filled(paragraph: str) -> str:
    return textwrap.fill(paragraph, WIDTH, break_long_words=False, break_on_hyphens=False)


def _contents(text: str) -> str:
    """A list of the headings: a chapter a line, with its sections."""
    lines: list[str] = []
    for level, heading in re.findall(r"^(##|###) (.*)", text, re.M):
        if level == "##":
            lines.append(f"- {_link(heading)}")
        else:
            lines[-1] += f"{', ' if '): [' in lines[-1] else ': '}{_link(heading)}"
    return "\n".join(lines)


def _link(words: str, heading: str | None = None) -> str:
    """A link to a section, by the anchor that GitHub makes of its heading."""
    anchor = re.sub(r"[^\w\- ]", "", (heading or words).lower()).replace(" ", "-")
    return f"[{words}](#{anchor})"

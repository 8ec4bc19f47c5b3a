"""Hook of mkdocs (`hooks:` in mkdocs.yml): generated pages join the written ones.

Nothing is written into docs/: the generated pages exist only while the site is built.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

DOCS = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(DOCS))  # mkdocs loads this file by its path

from _generate import bench, commands, gallery, methods, reference  # noqa: E402

FIGURE = "<!-- figure: life.svg -->"
# Pages that a run of the tests writes; where there was none, the site does without.
TABLES = {"matrix.md": "Architectures", "composition.md": "What goes together"}

Nav = list[dict[str, Any]]
_generated: dict[str, str] = {}


def pages() -> dict[str, str]:
    """All generated pages: path below docs/ -> Markdown."""
    single = {"commands.md": commands.page(), "gallery.md": gallery.page()}
    return {**methods.pages(), **single, **reference.pages()}


def nav(written: Nav, docs: Path = DOCS) -> Nav:
    """The written navigation with the generated pages in their places."""
    tables = [{title: path} for path, title in TABLES.items() if (docs / path).is_file()]
    shown = [*written]
    shown.insert(2, {"Methods": [*methods.nav(), *tables]})
    shown += [{"Gallery": "gallery.md"}]
    shown += [{"Reference": [{"Commands": "commands.md"}, *reference.nav()]}]
    return shown


def on_config(config: Any) -> Any:
    """Make the pages and name them in the navigation."""
    _generated.clear()
    _generated.update(pages())
    config.nav = nav(config.nav)
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages to the written ones."""
    for path, text in _generated.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the tables of benches in their places."""
    return bench.fill(markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Put the drawing into the page itself, where it follows the page's light and dark."""
    if FIGURE not in html:
        return html
    drawing = (DOCS / "assets/life.svg").read_text(encoding="utf-8")
    return html.replace(FIGURE, f'<figure class="life">{drawing}</figure>')

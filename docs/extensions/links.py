"""Links from the documentation to other files of the repository, which the site does not hold, become code.

A link to a file that does not exist anywhere is left as it is, and so fails the build.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_LINK = re.compile(r"(?<!!)\[([^\]\n]+)\]\((\.\./[^)\s#]+)\)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, **kwargs: Any) -> str:
    """MkDocs calls this for each page."""
    here = Path(page.file.abs_src_path).parent
    inside = Path(config["docs_dir"]).resolve()

    def replace(match: re.Match[str]) -> str:
        text, target = match.groups()
        path = (here / target).resolve()
        if path.is_relative_to(inside) or not path.exists():
            return match.group(0)
        return text if text.startswith("`") else f"{text} (`{path.relative_to(inside.parent).as_posix()}`)"

    return _LINK.sub(replace, markdown)

"""For MkDocs: a link to a file that is not a page, such as one of `deploy/`, shows its path."""

import re
from typing import Any


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links that leave `docs/`, without their target."""
    return re.sub(r"\[(`[^`\]]+`)\]\(\.\./[^)]+\)", r"\1", markdown)

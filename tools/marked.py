"""What a script writes into a document stands between `<!-- name -->` and `<!-- end -->`."""

from __future__ import annotations

import re


def filled(text: str, name: str, lines: list[str]) -> str:
    """A document with these lines in the place of that name.

    >>> filled("<!-- sizes -->\\nold\\n<!-- end -->", "sizes", ["new"])
    '<!-- sizes -->\\nnew\\n<!-- end -->'
    """
    body = "".join(f"{line}\n" for line in lines)
    marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    return marked.sub(lambda found: found[1] + body + found[2], text)

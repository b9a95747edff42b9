"""The pages as a site: `make docs` builds it with Sphinx into build/docs.

The pages of the project's root belong to it, so their links are checked too. A dead link is an
error, also one to a heading of another page. Files of the project that a page links to become
downloads.
"""

from pathlib import Path

from pygments.lexers.special import TextLexer
from sphinx.application import Sphinx

project = "qmqp-relay"
author = "The authors of qmqp-relay"
root_doc = "docs/index"
include_patterns = ["*.md", "docs/*.md", "docs/decisions/*.md"]
extensions = ["myst_parser"]
myst_heading_anchors = 4  # as on GitHub
html_theme = "furo"
html_copy_source = False
html_show_copyright = False


def setup(app: Sphinx) -> None:
    """Diagrams stay text here, and the site begins at its index."""
    app.add_lexer("mermaid", TextLexer)
    app.connect("build-finished", _begin_at_the_index)


def _begin_at_the_index(app: Sphinx, _error: Exception | None) -> None:
    page = '<!doctype html><meta http-equiv="refresh" content="0; url=docs/index.html">\n'
    Path(app.outdir, "index.html").write_text(page)

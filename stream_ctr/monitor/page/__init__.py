"""The live page: files that a browser loads as they are, and what it needs of its server.

    index.html   the skeleton, with a place for each part
    page.css     light and dark, laptop and phone
    page.js      asks for `reports`, and draws
    figures.js   from the answer to figures: pure functions
    charts.js    charts by Plotly, and tables

The server gives these files and `plotly.min.js`, which is in plotly's wheel, beside `reports`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

FOLDER = Path(__file__).parent

FILES: Mapping[str, str] = {
    "index.html": "text/html; charset=utf-8",
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
    "figures.js": "text/javascript; charset=utf-8",
    "charts.js": "text/javascript; charset=utf-8",
}
"""The files of the page with their media types; `index.html` is the page itself."""

# Plotly adds a <style> element, whose rules change with its releases, so no hash would last.
# Without it the charts are drawn, but their hover boxes are misplaced. Scripts need no exception.
CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
"""The header under which the page works, and nothing from elsewhere is loaded."""

"""Reports where the user is: in a notebook, in a terminal, in a file."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from typing import Any

from gradtest._src.findings import Exhibit, Report
from gradtest._src.report import html, legible, text


def show(report: Report) -> None:
    """Shows a report where the user is: see `Report.show`."""
    if _in_notebook():
        ipython = importlib.import_module("IPython.display")
        ipython.display(ipython.HTML(html.fragment(report)))
        for exhibit in report.exhibits:
            page = arrays_as_html(exhibit)
            if page:
                ipython.display(ipython.HTML(page))
    elif importlib.util.find_spec("rich") is not None and sys.stdout.isatty():
        from rich.console import Console

        Console(file=sys.stdout).print(report)
    else:
        print(text.full(report))


def arrays_as_html(exhibit: Exhibit) -> str:
    """Returns the arrays of an exhibit as treescope shows them; "" where it can't."""
    try:
        import treescope

        shown: dict[str, Any] = {"claimed": exhibit.claimed}
        if exhibit.true is not None:
            shown["true"] = exhibit.true
        visual = treescope.ArrayAutovisualizer()
        with (
            warnings.catch_warnings(action="ignore"),  # of what treescope imports
            treescope.active_autovisualizer.set_scoped(visual),
        ):
            return str(treescope.render_to_html({legible.name(exhibit.name): shown}))
    except Exception:  # a picture is not worth an error: the table has the entries
        return ""


def _in_notebook() -> bool:
    """Whether a notebook runs this, and not IPython in a terminal."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and shell.has_trait("kernel")

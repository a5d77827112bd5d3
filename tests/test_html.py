"""A report as a page: what a browser makes of it, and that it asks for nothing."""

import html.parser
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gradtest._src.report import pictures
from tests.snapshots import failures

_BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
    None,
)
_needs_browser = pytest.mark.skipif(
    _BROWSER is None, reason="needs chromium: on Debian, apt-get install chromium"
)
_TAGS = frozenset({
    "html", "head", "meta", "title", "style", "body", "main", "header", "section", "h1",
    "h2", "h3", "h4", "p", "span", "div", "i", "ul", "li", "dl", "dt", "dd", "table",
    "caption", "thead", "tbody", "tr", "th", "td", "pre", "code", "mark", "details",
    "summary", "figure", "figcaption", "img",
})  # fmt: skip
_OPEN_ALONE = frozenset({"meta", "img"})
_ATTRIBUTES = frozenset({
    "class", "style", "lang", "charset", "http-equiv", "content", "name", "scope",
    "role", "aria-label", "aria-hidden", "tabindex", "src", "alt",
})  # fmt: skip


class _Reader(html.parser.HTMLParser):
    """Collects tags, attributes and text, and sees that tags are nested."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.texts, self.open = [], [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in _OPEN_ALONE:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return "".join(self.texts)


def _shown(name):
    """Returns a name as a report shows it: escaped as in Python, short."""
    return repr(name)[1:-1] if len(name) < 90 else "n" * 40 + "…"


@pytest.fixture(autouse=True)
def _few_pictures(monkeypatch, request):
    """Draws nothing but where pictures are the matter: drawing is slow."""
    if "draw" not in request.node.name:
        monkeypatch.setattr(pictures, "drawn", lambda report: ())


@pytest.mark.parametrize("name", failures.NAMES)
@pytest.mark.parametrize("form", ["to_html", "_repr_html_"])
def test_a_page_has_its_own_tags_alone(name, form):
    read = _Reader(getattr(failures.report_of(name), form)())
    assert set(read.tags) <= _TAGS
    assert {name for name, _ in read.attributes} <= _ATTRIBUTES
    assert read.open == []
    styles = [value for attribute, value in read.attributes if attribute == "style"]
    assert all(re.fullmatch(r"width:\d+%", style) for style in styles)


def test_hostile_names_stay_text():
    read = _Reader(failures.report_of("hostile").to_html())
    missing = [n for n in failures.HOSTILE if _shown(n) not in read.text]
    assert missing == []
    assert "<i>evil</i>" in read.text


def test_a_page_can_be_heard_and_operated_by_keys():
    read = _Reader(failures.report_of("several_leaves").to_html())
    assert ("lang", "en") in read.attributes
    assert read.tags.count("h1") == 1
    assert read.tags.count("caption") == read.tags.count("table") > 0
    scopes = [value for name, value in read.attributes if name == "scope"]
    assert len(scopes) == read.tags.count("th")
    assert set(scopes) == {"col", "row"}


def test_pictures_are_in_the_page_where_they_can_be_drawn():
    pytest.importorskip("matplotlib")
    read = _Reader(failures.report_of("transposed").to_html())
    images = [value for name, value in read.attributes if name == "src"]
    assert read.tags.count("img") == len(images) >= 1
    inside = r"data:image/(svg\+xml|png);base64,[\w+/=]+"
    assert all(re.fullmatch(inside, image) for image in images)
    texts = [value for name, value in read.attributes if name == "alt"]
    assert len(texts) == len(images)
    assert all(texts)
    assert "nothing could be drawn" not in read.text


def test_nothing_is_drawn_where_there_is_no_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    read = _Reader(failures.report_of("transposed").to_html())
    assert "img" not in read.tags
    assert "drawn" not in read.text
    assert "Entries of matrix" in read.text


def test_what_can_not_be_drawn_is_said(monkeypatch):
    plots = pytest.importorskip("gradtest._src.report.plots")
    pytest.importorskip("matplotlib")

    def refuse(report):
        raise MemoryError("too\nlarge <b>")

    monkeypatch.setattr(plots, "figures", refuse)
    read = _Reader(failures.report_of("transposed").to_html())
    assert "img" not in read.tags
    assert "nothing could be drawn: MemoryError: too large <b>." in read.text


# --- contrast ---------------------------------------------------------------------


def _luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [
        p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(scheme):
    page = failures.report_of("factor").to_html()
    light, dark = re.findall(r"\{\s*(--ground[^}]*)\}", page)
    found = re.findall(r"--([\w-]+): (#\w{6})", light if scheme == "light" else dark)
    colours = dict(found)
    pairs = [
        (text, ground)
        for text in ("text", "quiet", "pass", "fail", "open", "none")
        for ground in ("ground", "raised", "code")
    ]
    pairs += [(kind, f"{kind}-ground") for kind in ("pass", "fail", "open", "none")]
    pairs += [("text", "mark"), ("quiet", "mark")]
    weak = []
    for text, ground in pairs:
        low, high = sorted(_luminance(colours[name]) for name in (text, ground))
        if (high + 0.05) / (low + 0.05) < 4.5:
            weak.append((text, ground, (high + 0.05) / (low + 0.05)))
    assert weak == []


# --- in a browser -----------------------------------------------------------------


def _browse(folder: Path, page: str) -> tuple[str, list[str], list[str]]:
    """Opens a page; returns its elements, what it logged, and what it asked for."""
    file, log = folder / "page.html", folder / "net.json"
    file.write_text(page, encoding="utf-8")
    command = [
        _BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--no-first-run",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        "--enable-logging=stderr",
        f"--user-data-dir={folder / 'profile'}",
        f"--log-net-log={log}",
        "--dump-dom",
        file.as_uri(),
    ]
    ran = subprocess.run(command, capture_output=True, timeout=60, check=True)
    console = [
        line
        for line in ran.stderr.decode(errors="replace").splitlines()
        if ":CONSOLE" in line
    ]
    events = json.loads(log.read_text(encoding="utf-8"))["events"]
    asked = [event.get("params", {}) for event in events]
    # What the browser asks for of its own accord has no page as its initiator.
    away = sorted(
        request["url"]
        for request in asked
        if request.get("initiator", "not an origin") != "not an origin"
    )
    return ran.stdout.decode(), console, away


@_needs_browser
def test_a_browser_shows_hostile_names_as_text_and_asks_for_nothing(tmp_path):
    page = failures.report_of("hostile").to_html()
    seen, console, away = _browse(tmp_path, page)
    assert console == []
    assert away == []
    read = _Reader(seen)
    assert set(read.tags) <= _TAGS
    assert read.tags == _Reader(page).tags
    missing = [n for n in failures.HOSTILE if _shown(n) not in read.text]
    assert missing == []


@_needs_browser
def test_the_browser_would_have_told_of_scripts_and_requests(tmp_path):
    page = failures.report_of("factor").to_html()
    evil = '<img src="http://example.invalid/x.png"><script>document.title = 1</script>'
    _, console, _ = _browse(tmp_path, page.replace("</main>", f"{evil}</main>"))
    assert any("example.invalid" in line for line in console)
    assert any("script" in line for line in console)
    free = re.sub("<meta http-equiv[^>]*>", "", page)
    _, _, away = _browse(tmp_path, free.replace("</main>", f"{evil}</main>"))
    assert any("example.invalid" in url for url in away)

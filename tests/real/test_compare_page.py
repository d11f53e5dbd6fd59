"""The report of a comparison as a page, in a real browser: it is drawn, needs nothing else, and runs nothing."""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from polyvisor.compare.html import page
from polyvisor.compare.report import report_of
from polyvisor.compare.results import Measurement
from polyvisor.process import which
from tests.unit.compared import made_up, plan

CHROMIUM = which("chromium")
pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: sh scripts/setup.sh test installs it"),
]
ATTACK = "<img src=x onerror=\"document.title='run'\"><script>document.title='run'</script>"


@pytest.fixture
def browse(tmp_path: Path) -> Browse:
    return Browse(tmp_path)


class Browse:
    """Chromium without a display, in a profile of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __call__(self, *words: str) -> subprocess.CompletedProcess[str]:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
        profile = f"--user-data-dir={self.directory / 'profile'}"
        command = [str(CHROMIUM), *flags, profile, *words, f"file://{self.directory / 'report.html'}"]
        return subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)


def made(directory: Path) -> str:
    found = made_up(plan("tcg", "kvm", runs=8), {"tcg": 10.0, "kvm": 5.0}).noting(ATTACK)
    found = found.having(Measurement(round=2, target="kvm", workload="a", at=1.0, took_s=1.0, error=ATTACK))
    found = replace(found, environments={"tcg": {"cpu": ATTACK}, "kvm": {"cpu": "Some CPU"}})
    text = page(report_of(found))
    (directory / "report.html").write_text(text)
    return text


def test_it_is_drawn_and_nothing_in_it_runs(browse: Browse, tmp_path: Path) -> None:
    """The page as the browser has understood it, after whatever scripts there were."""
    made(tmp_path)
    seen = browse("--dump-dom").stdout
    assert "<title>Comparison of tcg, kvm</title>" in seen, "nothing has changed it"
    assert seen.count("<svg") == 3 and seen.count("</svg>") == 3
    assert seen.count("<circle") == 3 * 8 * 2 - 1, "every value is a dot; one failed"
    assert 'class="better">better</td>' in seen and 'class="worse">worse' in seen
    assert "EMULATED: only the shape carries over" in seen
    assert "<script" not in seen and "<img" not in seen
    assert "&lt;script&gt;" in seen


def test_it_looks_like_something(browse: Browse, tmp_path: Path) -> None:
    """The notice is red, in large letters, and the plots have colours: pixels of a picture that the browser took."""
    from tests.unit.png import pixels

    made(tmp_path)
    browse(f"--screenshot={tmp_path / 'page.png'}", "--window-size=900,2400", "--hide-scrollbars")
    seen = pixels((tmp_path / "page.png").read_bytes())
    red = sum(pixel == (0x8A, 0x1F, 0x11) for pixel in seen)
    assert red > 40_000, "the notice fills the width of the page"
    assert seen.count((0x1F, 0x6F, 0xB2)) > 100 and seen.count((0xC4, 0x57, 0x2A)) > 100, "bars of both targets"


def test_it_asks_the_network_for_nothing(tmp_path: Path) -> None:
    text = made(tmp_path)
    assert not re.findall(r"(?:https?:)?//[a-z]", text)
    assert not re.findall(r"<(?:script|link|iframe|object|embed|img|image|use)\b", text)
    assert "default-src 'none'" in text

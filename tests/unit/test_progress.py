"""Progress: nothing for what is quick, a line per phase without a terminal, a bar on one."""

import io
import sys

import pytest

from polyvisor.cli import progress
from polyvisor.cli.progress import Display, human_size
from polyvisor.operation import Step


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that displays see; the test moves it."""
    now = [100.0]
    monkeypatch.setattr("polyvisor.cli.progress.time.monotonic", lambda: now[0])
    return now


def test_what_is_done_within_a_second_says_nothing(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    display = Display()
    display(Step("one"))
    clock[0] += 0.9
    display(Step("two"))
    display.close()
    assert capsys.readouterr() == ("", "")


def test_without_a_terminal_each_phase_is_a_line(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    display = Display()
    clock[0] += 2
    for step in (Step("fetch", 1, 3, "B"), Step("fetch", 2, 3, "B"), Step("unpack"), Step("fetch")):
        display(step)
    assert capsys.readouterr() == ("", "fetch …\nunpack …\nfetch …\n")
    display.close()
    display(Step("again"))
    assert capsys.readouterr().err == "", "the next verb has its own second"


def test_a_quiet_display_says_nothing(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    display = Display(quiet=True)
    clock[0] += 10
    display(Step("fetch"))
    display.close()
    assert capsys.readouterr() == ("", "")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_on_a_terminal_is_drawn_and_taken_away(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    display = Display()
    clock[0] += 2
    display(Step("fetch", 1 << 20, 3 << 20, "B"))
    clock[0] += 1
    display(Step("unpack", 5, None, "files"))
    display.close()
    display.close()
    drawn = terminal.getvalue()
    assert "fetch" in drawn
    assert drawn.endswith(("\x1b[2K", "\x1b[?25h")) or "\x1b[2K" in drawn


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (Step("x"), ""),
        (Step("x", 5), "5"),
        (Step("x", 5, None, "files"), "5 files"),
        (Step("x", 5, 60, "s"), "5 s of 60 s"),
        (Step("x", 0, 1 << 30, "B"), "0 B of 1.0 GiB"),
        (Step("x", 3 << 20, None, "B"), "3.0 MiB"),
    ],
)
def test_how_far(step: Step, expected: str) -> None:
    assert progress._amount(step) == expected


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (1 << 20, "1.0 MiB"),
        ((1 << 20) - 1, "1.0 MiB"),
        ((1 << 30) - 1, "1.0 GiB"),
        (3 << 29, "1.5 GiB"),
        (5 << 40, "5.0 TiB"),
        (5 << 50, "5120.0 TiB"),
    ],
)
def test_sizes(size: int, expected: str) -> None:
    assert human_size(size) == expected

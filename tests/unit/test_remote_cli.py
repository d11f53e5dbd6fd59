"""The command line with hosts elsewhere: what their text may do to a terminal, and hints that hold where they are read."""

import asyncio
import json
import sys
from pathlib import Path

import pytest

from polyvisor.cli.complete import _hosts, _vms
from polyvisor.cli.context import Context, report, to_json
from polyvisor.cli.main import run
from polyvisor.cli.progress import Display
from polyvisor.cli.table import pairs
from polyvisor.errors import InvalidInput, NotFound, PolyvisorError, ProcessFailed, WrongState
from polyvisor.home import Home
from polyvisor.operation import Step
from polyvisor.process import converse
from polyvisor.remote.address import Entry, Hosts
from polyvisor.remote.host import RemoteHost
from polyvisor.remote.link import Link, explained

HOSTILE = "\x1b[2J\x9b1m"


@pytest.fixture
def hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hosts:
    monkeypatch.setenv("POLYVISOR_HOME", str(tmp_path))
    monkeypatch.delenv("POLYVISOR_HOST", raising=False)
    return Hosts(tmp_path / "hosts")


@pytest.mark.parametrize(
    ("hint", "there"),
    [
        ("stop it first, or: polyvisor rm --force a", "stop it first, or: polyvisor --host far rm --force a"),
        ("see polyvisor --debug start a", "see polyvisor --host far --debug start a"),
        ("polyvisor host rm far", "polyvisor host rm far"),
        ("polyvisor --host far ls", "polyvisor --host far ls"),
        ("pip install polyvisor", "pip install polyvisor"),
    ],
)
def test_hints_name_the_host_of_the_verb(hint: str, there: str, capsys: pytest.CaptureFixture[str]) -> None:
    report(WrongState("a runs", hint=hint), Context(on_host="far"))
    assert capsys.readouterr().err == f"polyvisor: a runs ({there})\n"
    report(WrongState("a runs", hint=hint), Context(on_host="far", json=True))
    assert json.loads(capsys.readouterr().err)["error"]["hint"] == there
    report(WrongState("a runs", hint=hint), Context())
    assert capsys.readouterr().err == f"polyvisor: a runs ({hint})\n"


def test_text_of_a_host_does_not_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    context = Context(debug=True)
    context.say(HOSTILE)
    context.note(HOSTILE)
    report(ProcessFailed([HOSTILE], 1, f"one\n{HOSTILE}"), context)
    print(pairs([(HOSTILE, HOSTILE)]))
    print(to_json({HOSTILE: HOSTILE}))
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err
    assert "\x9b" not in out + err
    assert json.loads(to_json({HOSTILE: HOSTILE})) == {HOSTILE: HOSTILE}


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_of_a_host_does_not_steer_the_terminal(
    terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("polyvisor.cli.progress.PATIENCE_S", 0.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    display = Display()
    display(Step(f"[/nothing]{HOSTILE}", 1, 2, f"[/x]{HOSTILE}"))
    display.close()
    err = capsys.readouterr().err
    assert "[/nothing]" in err
    assert "\x1b[2J" not in err
    assert "\x9b" not in err


def test_an_empty_host_is_not_this_machine(hosts: Hosts, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--host", "", "rm", "--all", "--force"]) == InvalidInput.exit_status
    assert "is not a host's name" in capsys.readouterr().err


def test_a_damaged_entry_is_one_line_of_the_list(hosts: Hosts, capsys: pytest.CaptureFixture[str]) -> None:
    hosts.add(Entry(name="gone", url="ssh://x@127.0.0.1:1", added_at=0.0))
    (hosts.directory / "bad.json").write_text("{")
    assert run(["host", "ls"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["NAME", "bad", "gone"]
    assert "can't be read" in lines[1]


def test_names_of_hosts_complete(hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    hosts.add(Entry(name="far", url="ssh://x@y", added_at=0.0))
    assert _hosts() == ["far"]
    monkeypatch.setenv("POLYVISOR_HOST", "far")
    assert _vms() == []


def test_hints_name_the_files_of_the_entry() -> None:
    entry = Entry(name="far", url="ssh://u@h:2222", added_at=0.0, identity="/k y", known_hosts="/known")
    assert explained(entry, "Permission denied").hint == "check the user, and the key: ssh -i '/k y' -p 2222 u@h true"
    changed = explained(entry, "@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @")
    assert changed.hint == "if you know why: ssh-keygen -f /known -R '[h]:2222'"


def test_a_new_connection_can_be_asked_for(tmp_path: Path) -> None:
    entry = Entry(name="far", url="ssh://u@h", added_at=0.0)
    argv = Link(entry, tmp_path).stop_sharing()
    assert argv is not None and argv[-4:] == ["-O", "stop", "--", "u@h"]
    assert Link(entry, None).stop_sharing() is None


def test_connections_are_shared_by_those_who_log_in_alike(tmp_path: Path) -> None:
    def path(**files: str) -> str:
        argv = Link(Entry(name="far", url="ssh://u@h", added_at=0.0, **files), tmp_path).argv("true")
        return next(word for word in argv if word.startswith("ControlPath="))

    assert path().strip('"').endswith("/%C")
    assert len({path(), path(identity="/a"), path(identity="/b"), path(known_hosts="/a")}) == 4
    assert path(identity="/a") == path(identity="/a")


async def test_a_file_that_is_not_there_is_not_uploaded(tmp_path: Path) -> None:
    host = RemoteHost(Entry(name="far", url="ssh://x@127.0.0.1:1", added_at=0.0), Home(tmp_path / "home"))
    with pytest.raises(NotFound, match="there is no file"):
        await host._upload(tmp_path / "nothing", lambda _: None)
    with pytest.raises(PolyvisorError, match="not a regular file"):
        await host._upload(tmp_path, lambda _: None)


async def test_a_program_may_be_cancelled_while_it_starts(tmp_path: Path) -> None:
    with (tmp_path / "errors").open("wb") as errors:
        task = asyncio.create_task(converse(["sleep", "60"], errors=errors, limit=100))
        for _ in range(3):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(task, 10)

"""Hosts on the command line: adding, listing and forgetting them, and doing a verb on one."""

import io
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from polyvisor.cli.context import Context
from polyvisor.cli.main import parse, run
from polyvisor.home import Home
from polyvisor.host.host import Host
from polyvisor.host.setup import apply
from polyvisor.host.setup.facts import Facts
from polyvisor.remote.address import Hosts
from polyvisor.remote.host import RemoteHost
from polyvisor.status import SetupStep
from tests.sshd import Server, free_port, serving
from tests.unit.setups import facts


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """An sshd for a user whose shell has nothing to read first, which may take long."""
    directory = tmp_path_factory.mktemp("sshd")
    with serving(directory, f"SetEnv HOME={directory}") as server:
        yield server


@pytest.fixture(scope="module")
def application(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The application for hosts, made once."""
    return tmp_path_factory.mktemp("application")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, application: Path) -> Home:
    """The home of the client, under a path that is too long for sockets: each test has connections of its own."""
    home = Home(tmp_path / ("client" * 10))
    home.prepare()
    (home.cache / "application").symlink_to(application)
    monkeypatch.setenv("POLYVISOR_HOME", str(home.path))
    monkeypatch.delenv("POLYVISOR_HOST", raising=False)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    return home


@pytest.fixture
def hosts(home: Home) -> Hosts:
    return Hosts(home.path / "hosts")


@pytest.fixture
def there(tmp_path: Path) -> Path:
    return tmp_path / "there"


@pytest.fixture
def add(sshd: Server, there: Path) -> Callable[..., list[str]]:
    """The words that add a host called `lab`."""

    def words(*more: str, server: Server = sshd, name: str = "lab") -> list[str]:
        known = ["--known-hosts", str(server.known_hosts)] if "--known-hosts" not in more else []
        identity = ["--identity", str(server.identity)]
        return ["host", "add", name, server.entry().url, *identity, *known, "--home", str(there), *more]

    return words


@pytest.fixture
def lab(hosts: Hosts, sshd: Server, there: Path) -> str:
    """A host that was added."""
    entry = sshd.entry(there)
    hosts.add(type(entry)(**{**vars(entry), "name": "lab"}))
    return "lab"


@pytest.fixture
def away(hosts: Hosts, sshd: Server) -> str:
    """A host that was added, and is not there."""
    entry = sshd.entry(port=free_port())
    hosts.add(type(entry)(**{**vars(entry), "name": "away"}))
    return "away"


Capture = pytest.CaptureFixture[str]


def said(capsys: Capture) -> str:
    """The one line of an error, with a hint."""
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("polyvisor: ")
    assert err.rstrip().endswith(")")
    return err


class TestAdd:
    def test_a_host_that_answers(
        self, add: Callable[..., list[str]], hosts: Hosts, sshd: Server, there: Path, capsys: Capture
    ) -> None:
        assert run(add()) == 0
        assert capsys.readouterr().out.startswith(f"host lab is {sshd.entry().url}; use it: polyvisor --host lab ")
        entry = hosts.get("lab")
        assert (entry.url, entry.identity, entry.home) == (sshd.entry().url, str(sshd.identity), str(there))
        assert entry.known_hosts == str(sshd.known_hosts)
        assert run(add("--json")) == 0, "once more changes nothing"
        assert json.loads(capsys.readouterr().out)["name"] == "lab"

    def test_a_name_that_is_taken(self, add: Callable[..., list[str]], lab: str, hosts: Hosts, capsys: Capture) -> None:
        before = hosts.get("lab")
        assert run(["host", "add", "lab", "ssh://elsewhere"]) == 4
        assert "there is a host 'lab' already" in said(capsys)
        assert hosts.get("lab") == before

    def test_one_that_does_not_answer_is_added_by_force_alone(self, hosts: Hosts, capsys: Capture) -> None:
        words = ["host", "add", "lab", f"ssh://127.0.0.1:{free_port()}"]
        assert run(words) == 8
        assert "nothing answers at its SSH port" in said(capsys)
        assert hosts.names() == []
        assert run([*words, "--force"]) == 0
        out, err = capsys.readouterr()
        assert out.startswith("host lab is ")
        assert err.startswith("added all the same: ")
        assert hosts.names() == ["lab"]

    def test_one_that_can_run_no_vms(
        self, add: Callable[..., list[str]], hosts: Hosts, tmp_path: Path, capsys: Capture
    ) -> None:
        programs = tmp_path / "programs"
        programs.mkdir()
        for name in ("sh", "mkdir", "head", "wc", "mv", "rm"):
            (programs / name).symlink_to(f"/bin/{name}")
        (programs / "python3").write_text(f'#!/bin/sh\nexec "{sys.executable}" -I "$@"\n')
        (programs / "python3").chmod(0o755)
        (tmp_path / "sshd").mkdir()
        with serving(tmp_path / "sshd", f"SetEnv PATH={programs} HOME={tmp_path}") as server:
            assert run(add(server=server)) == 8
        assert "host 'lab' can run no VMs: " in said(capsys)
        assert hosts.names() == []

    def test_a_key_that_nobody_knows_is_taken_where_that_is_said(
        self, add: Callable[..., list[str]], hosts: Hosts, tmp_path: Path, capsys: Capture
    ) -> None:
        words = add("--known-hosts", str(tmp_path / "known"))
        assert run(words) == 7
        assert "its host key is not known here" in said(capsys)
        assert hosts.names() == []
        assert run([*words, "--accept-new"]) == 0
        assert (tmp_path / "known").read_text()

    @pytest.mark.parametrize(
        ("words", "says"),
        [
            (["../lab", "ssh://lab"], "host: '../lab': is not a host's name"),
            (["--", "lab", "-oProxyCommand=x"], "address: '-oProxyCommand=x': is not the address of a host"),
            (["lab", "a b"], "address: 'a b': is not the address of a host"),
            (["lab", "lab:0"], "address: 'lab:0': has no such port"),
            (["lab", "lab", "-i", "/nowhere/key"], "identity: '/nowhere/key': is not a file"),
            (["lab", "lab", "--home", "/a'b"], "home"),
        ],
    )
    def test_what_can_not_be_meant(self, words: list[str], says: str, hosts: Hosts, capsys: Capture) -> None:
        assert run(["host", "add", *words]) == 2
        assert says in said(capsys)
        assert hosts.names() == []

    def test_files_are_noted_wherever_it_is_called_from(
        self, hosts: Hosts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOME", str(tmp_path))
        (tmp_path / "key").touch(mode=0o600)
        address = f"ssh://127.0.0.1:{free_port()}"
        assert run(["host", "add", "a", address, "-i", "key", "--known-hosts", "~/known", "--force"]) == 0
        assert hosts.get("a").identity == str(tmp_path / "key")
        assert hosts.get("a").known_hosts == str(tmp_path / "known")


class TestList:
    def test_none(self, capsys: Capture) -> None:
        assert run(["host", "ls"]) == 0
        out, err = capsys.readouterr()
        assert (out, err.count("polyvisor host add")) == ("", 1)
        assert run(["host", "ls", "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == []

    def test_those_that_answer_and_those_that_do_not(self, lab: str, away: str, capsys: Capture) -> None:
        assert run(["host", "ls"]) == 0
        head, *rows = capsys.readouterr().out.splitlines()
        assert head.split() == ["NAME", "STATE", "RUNS", "ON", "VMS", "MEMORY", "AVAILABLE", "ADDRESS"]
        assert rows[0].startswith("away  unavailable: host 'away'")
        assert rows[1].split()[:2] == ["lab", "ok"]

    def test_in_json(self, lab: str, away: str, there: Path, capsys: Capture) -> None:
        assert run(["host", "ls", "--json"]) == 0
        gone, fine = json.loads(capsys.readouterr().out)
        assert (gone["name"], gone["status"], gone["error"]["code"]) == ("away", None, "unavailable")
        assert (fine["name"], fine["status"]["home"], fine["error"]) == ("lab", str(there), None)

    def test_names_alone_ask_nobody(self, lab: str, away: str, capsys: Capture) -> None:
        assert run(["host", "ls", "-q"]) == 0
        assert capsys.readouterr().out == "away\nlab\n"


class TestForget:
    def test_hosts_that_are_there(self, lab: str, away: str, hosts: Hosts, capsys: Capture) -> None:
        assert run(["host", "rm", "lab", "away"]) == 0
        assert capsys.readouterr().out == "host lab is forgotten\nhost away is forgotten\n"
        assert hosts.names() == []

    def test_one_that_is_not(self, lab: str, capsys: Capture) -> None:
        assert run(["host", "rm", "nope"]) == 3
        assert "there is no host 'nope' (known: lab; " in said(capsys)


class TestShow:
    def test_one_by_its_name(self, lab: str, there: Path, capsys: Capture) -> None:
        assert run(["host", "show", "lab", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["home"] == str(there)

    @pytest.mark.parametrize("words", [["host"], ["host", "show"]])
    def test_this_machine(self, words: list[str], lab: str, home: Home, capsys: Capture) -> None:
        assert run([*words, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["home"] == str(home.path)

    @pytest.mark.parametrize("words", [["host", "check", "lab"], ["doctor", "--host", "lab"]])
    def test_what_works_there(self, words: list[str], lab: str, there: Path, capsys: Capture) -> None:
        run(words)
        assert str(there) in capsys.readouterr().out

    @pytest.mark.parametrize("verb", ["show", "check"])
    def test_one_that_is_not_there(self, verb: str, away: str, capsys: Capture) -> None:
        assert run(["host", verb, "away"]) == 8
        assert "host 'away'" in said(capsys)
        assert run(["host", verb, "nope"]) == 3
        assert "there is no host 'nope'" in said(capsys)


class TestOnHost:
    @pytest.mark.parametrize(
        "words", [["--host", "lab", "host"], ["host", "--host", "lab"], ["--host=lab", "host", "show"]]
    )
    def test_it_stands_on_either_side_of_the_verb(
        self, words: list[str], lab: str, there: Path, capsys: Capture
    ) -> None:
        assert run([*words, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["home"] == str(there)

    def test_the_environment_says_it_too(
        self, lab: str, away: str, there: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("POLYVISOR_HOST", "lab")
        assert run(["host", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["home"] == str(there)
        assert run(["--host", "away", "ls"]) == 8, "the flag comes first"
        monkeypatch.setenv("POLYVISOR_HOST", "")
        assert isinstance(Context().host, Host)

    def test_errors_of_a_host_end_as_those_of_this_machine(self, lab: str, capsys: Capture) -> None:
        assert run(["--host", "lab", "ls"]) == 0
        capsys.readouterr()
        assert run(["show", "nope", "--host", "lab"]) == 3
        assert "there is no VM 'nope'" in said(capsys)
        assert run(["--host", "lab", "show", "nope", "--json"]) == 3
        assert json.loads(capsys.readouterr().err)["error"]["code"] == "not-found"

    @pytest.mark.parametrize(
        ("given", "status", "says"),
        [
            ("nope", 3, "there is no host 'nope'"),
            ("../x", 2, "is not a host's name"),
            ("-oProxyCommand=x@y", 2, "is not the address of a host"),
            ("a b@c", 2, "is not the address of a host"),
        ],
    )
    def test_what_is_no_host(self, given: str, status: int, says: str, capsys: Capture) -> None:
        assert run([f"--host={given}", "ls"]) == status
        assert says in said(capsys)

    def test_without_a_word_after_it(self, capsys: Capture) -> None:
        assert run(["ls", "--host"]) == 2
        assert "--host" in said(capsys)

    def test_an_address_needs_no_name(self) -> None:
        host = Context(on_host="alice@lab.example:2222").host
        assert isinstance(host, RemoteHost)
        assert host.entry.url == "ssh://alice@lab.example:2222"

    @pytest.mark.parametrize(
        ("words", "verb"), [(["--host", "ls", "ls"], "ls"), (["--host", "run", "show", "a"], "show")]
    )
    def test_a_host_may_be_called_like_a_verb(self, words: list[str], verb: str) -> None:
        options: Any = parse(words)
        assert options.on_host == words[1]
        assert options.action == parse(words[2:]).action

    def test_behind_a_guests_command_it_is_the_guests(self) -> None:
        options = parse(["exec", "--host", "lab", "a", "--", "prog", "--host", "x"])
        assert options.on_host == "lab"
        assert [*options.command, *options.remainder] == ["prog", "--host", "x"]


class TestPrepare:
    """What is printed and asked; what is done is tested on made-up machines (test_setup_apply.py)."""

    @pytest.fixture
    def machine(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Facts], list[SetupStep]]]:
        """Makes this machine another one; the steps that would be carried out are noted in place of that."""
        done: list[SetupStep] = []
        now = [facts()]

        def become(other: Facts) -> list[SetupStep]:
            now[0] = other
            return done

        async def gather(root: Path) -> Facts:
            return now[0]

        async def carry_out(step: SetupStep, *_: object) -> None:
            done.append(step)
            if step.name == "packages":
                now[0] = replace(now[0], installed=frozenset(step.commands[-1]) | now[0].installed)

        monkeypatch.setattr(apply, "gather", gather)
        monkeypatch.setattr(apply, "carry_out", carry_out)
        monkeypatch.setattr(apply, "_LOCK", "dev/null")
        monkeypatch.setattr("os.geteuid", lambda: 0)
        yield become

    def test_it_tells_and_changes_nothing(self, machine: Callable[[Facts], list[SetupStep]], capsys: Capture) -> None:
        done = machine(facts())
        assert run(["host", "prepare", "xen"]) == 1
        out, err = capsys.readouterr()
        assert "write /etc/default/grub.d/polyvisor.cfg" in out
        assert "polyvisor host prepare xen --yes" in err
        assert run(["host", "prepare", "xen", "--json"]) == 1
        assert json.loads(capsys.readouterr().out)["steps"][1]["state"] == "to do"
        assert done == []

    def test_it_does_it_with_yes(self, machine: Callable[[Facts], list[SetupStep]], capsys: Capture) -> None:
        done = machine(facts())
        assert run(["host", "prepare", "kvm", "--yes"]) == 0
        assert [step.name for step in done] == ["packages"]
        assert run(["host", "prepare"]) == 0, "nothing is left to do"
        assert run(["host", "prepare", "--yes", "--json"]) == 0
        assert [step.name for step in done] == ["packages"]

    @pytest.mark.parametrize(("answer", "status", "steps"), [("y\n", 0, 1), ("\n", 1, 0), ("no\n", 1, 0), ("", 1, 0)])
    def test_it_asks_on_a_terminal(
        self,
        answer: str,
        status: int,
        steps: int,
        machine: Callable[[Facts], list[SetupStep]],
        monkeypatch: pytest.MonkeyPatch,
        capsys: Capture,
    ) -> None:
        done = machine(facts())
        terminal = io.StringIO(answer)
        monkeypatch.setattr(terminal, "isatty", lambda: True)
        monkeypatch.setattr("sys.stdin", terminal)
        monkeypatch.setattr("sys.stderr.isatty", lambda: True)
        assert run(["host", "prepare", "kvm"]) == status
        out, err = capsys.readouterr()
        assert "to do    packages" in out
        assert "[y/N]" in err
        assert ("nothing was changed" in err) is (steps == 0)
        assert len(done) == steps

    def test_without_root_it_tells_all_the_same(
        self, machine: Callable[[Facts], list[SetupStep]], monkeypatch: pytest.MonkeyPatch, capsys: Capture
    ) -> None:
        done = machine(facts())
        monkeypatch.setattr("os.geteuid", lambda: 1000)
        assert run(["host", "prepare", "kvm"]) == 1
        capsys.readouterr()
        assert run(["host", "prepare", "kvm", "--yes"]) == 7
        out, err = capsys.readouterr()
        assert "to do    packages" in out
        assert "root's rights (run it as root" in err
        assert done == []

    def test_what_is_out_of_reach(self, machine: Callable[[Facts], list[SetupStep]], capsys: Capture) -> None:
        done = machine(facts("arch"))
        assert run(["host", "prepare", "xen"]) == 1
        assert "BLOCKED  machine" in capsys.readouterr().out
        assert run(["host", "prepare", "xen", "--yes"]) == 8
        assert "nothing was changed: Arch Linux is not a system that Polyvisor knows" in capsys.readouterr().err
        assert done == []

    def test_what_is_all_by_hand_is_never_called_done(
        self, machine: Callable[[Facts], list[SetupStep]], capsys: Capture
    ) -> None:
        done = machine(facts("leap-15.6"))
        assert run(["host", "prepare", "xen", "--yes"]) == 1
        assert "untested: Polyvisor was never run on openSUSE Leap 15" in capsys.readouterr().out
        assert done == []

    @pytest.mark.parametrize(
        ("words", "says"),
        [
            (["hyperv"], "KIND"),
            (["xen", "--dom0-memory", "lots"], "dom0-memory: 'lots'"),
            (["xen", "--dom0-vcpus", "-1"], "dom0-vcpus"),
            (["xen", "--dom0-vcpus", "two"], "dom0-vcpus: 'two'"),
            (["kvm", "--dom0-memory", "2G"], "KVM has no dom0"),
        ],
    )
    def test_what_can_not_be_meant(
        self, words: list[str], says: str, machine: Callable[[Facts], list[SetupStep]], capsys: Capture
    ) -> None:
        machine(facts())
        assert run(["host", "prepare", *words]) == 2
        assert says in capsys.readouterr().err

    def test_on_another_machine(self, lab: str, capsys: Capture) -> None:
        """Whatever that is: it answers with a plan of its own."""
        assert run(["--host", "lab", "host", "prepare", "xen", "--json"]) in (0, 1)
        setup = json.loads(capsys.readouterr().out)
        assert setup["kind"] == "xen"
        assert setup["steps"][0]["name"] == "machine"

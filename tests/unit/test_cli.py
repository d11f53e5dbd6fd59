"""The command line: words in, options or one line of error out; and its start-up."""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from polyvisor import __version__
from polyvisor.cli import main as cli
from polyvisor.cli.main import VERBS, build_parser, parse, run
from polyvisor.cli.parser import UsageError
from polyvisor.errors import InvalidInput, PolyvisorError
from polyvisor.host.record import Record, record_to_json
from polyvisor.spec.vm import Disk, VMSpec

# A line of words that each verb accepts.
EXAMPLES = {
    "lab": "lab up --kvm 1",
    "run": "run tiny --name a -c 2 -m 1G --disk 10G --nic user -p 8080:80 --label a=b --wait",
    "create": "create tiny --memory 512M --hypervisor tcg",
    "apply": "apply -f vm.yaml --no-start",
    "ls": "ls a b --label tier=web --state running -q",
    "show": "show a",
    "start": "start a b --wait --timeout 5",
    "stop": "stop a -t 5",
    "kill": "kill --all",
    "reboot": "reboot a --force",
    "pause": "pause a",
    "resume": "resume a",
    "fork": "fork a --count 3 --prefix b- --wait",
    "template": "template create x --from a",
    "save": "save a",
    "set": "set a --vcpus 2 --memory 1G --cpu-limit none",
    "snapshot": "snapshot create a --name b --no-memory",
    "clone": "clone a b --snapshot c --full",
    "export": "export a file -f",
    "import": "import file --name a",
    "move": "move a --to b --name c",
    "rm": "rm -f a",
    "console": "console a",
    "logs": "logs -f a --hypervisor",
    "ssh": "ssh a",
    "exec": "exec a -- uname -a",
    "cp": "cp -r x y a:/tmp",
    "forward": "forward add a 8080:80",
    "disk": "disk add a --size 2",
    "nic": "nic add a --network private:x",
    "events": "events a",
    "image": "image import disk.vmdk --name x",
    "compare": "compare --quick --targets tcg,slow=tcg:cpu_limit=50 --runs 5",
    "host": "host",
    "doctor": "doctor",
    "completion": "completion bash",
}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("POLYVISOR_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def polyvisor(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "polyvisor", *words], capture_output=True, text=True, timeout=60, check=False, **options
    )


def test_every_verb_has_an_example_here() -> None:
    assert EXAMPLES.keys() == VERBS.keys()


@pytest.mark.parametrize("verb", EXAMPLES)
def test_common_options_stand_on_either_side_of_the_verb(verb: str) -> None:
    words = EXAMPLES[verb].split()
    assert not (options := parse(words)).json
    assert not options.debug
    for given in (
        ["--json", "--debug", *words],
        [words[0], "--debug", "--json", *words[1:]],
        ["--json", words[0], "--debug", *words[1:]],
    ):
        options = parse(given)
        assert options.json
        assert options.debug
        assert callable(options.action)


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse([verb, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: polyvisor {verb} ")
    assert VERBS[verb][1][1:] in " ".join(text.split())
    assert "--json" in text


@pytest.mark.parametrize(
    "line", ["image ls --json --debug", "forward --debug ls a --json", "image --json --debug show x"]
)
def test_and_of_the_verb_below_it(line: str) -> None:
    options = parse(line.split())
    assert options.json
    assert options.debug


def every_parser(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    below = [a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return [parser, *(p for choices in below for sub in choices.values() for p in every_parser(sub))]


def test_every_flag_has_a_line_of_help() -> None:
    for parser in every_parser(build_parser()):
        for action in parser._actions:
            if action.option_strings:
                assert action.help, f"{parser.prog} {action.option_strings}"


def test_no_flag_can_be_cut_short() -> None:
    for words in (["ls", "--lab", "x"], ["--js", "ls"], ["run", "tiny", "--mem", "1G"]):
        with pytest.raises(UsageError):
            parse(words)


class TestRemainder:
    @pytest.mark.parametrize(
        ("line", "command"),
        [
            ("exec a -- uname -a", ["uname", "-a"]),
            ("exec a uname -a", ["uname", "-a"]),
            ("exec a -- git log -- file", ["git", "log", "--", "file"]),
            ("exec a git log -- file", ["git", "log", "--", "file"]),
            ("exec a -- prog --json --debug --timeout 5 -h", ["prog", "--json", "--debug", "--timeout", "5", "-h"]),
            ("exec a prog --json -h", ["prog", "--json", "-h"]),
            ("exec --timeout 5 a -- -x", ["-x"]),
            ("exec a -- -- x", ["--", "x"]),
            ("exec a --", []),
            ("ssh a", []),
            ("ssh a -- ls -l", ["ls", "-l"]),
        ],
    )
    def test_what_belongs_to_the_guest(self, line: str, command: list[str]) -> None:
        options = parse(line.split())
        assert [*options.command, *options.remainder] == command
        assert options.name == "a"
        assert not options.json
        assert not options.debug

    def test_options_of_ours_before_it(self) -> None:
        options = parse(["--json", "exec", "--debug", "a", "--", "x"])
        assert options.json
        assert options.debug

    def test_other_verbs_take_names_after_it(self) -> None:
        assert parse(["stop", "--", "a", "b"]).names == ["a", "b"]
        assert parse(["rm", "a", "--", "b"]).names == ["a", "b"]
        assert parse(["cp", "--", "x", "a:y"]).target == "a:y"


class TestErrors:
    @pytest.mark.parametrize(
        ("words", "says"),
        [
            (["rnu", "tiny"], "invalid choice: 'rnu' (did you mean 'run'?)"),
            (["frobnicate"], "invalid choice: 'frobnicate' (polyvisor --help tells more)"),
            (["run"], "the following arguments are required: image"),
            (["run", "tiny", "--nope"], "unrecognized arguments: --nope"),
            (["run", "tiny", "-c", "two"], "vcpus: 'two': is not a whole number"),
            (["run", "tiny", "--hypervisor", "vmware"], "hypervisor: 'vmware': is not a choice here (use auto, kvm"),
            (["run", "tiny", "-m", "lots"], "memory: 'lots': is not an amount of memory (write 512M or 2G)"),
            (["run", "tiny", "--name", "../x"], "name: '../x': is not a VM name"),
            (["run", "tiny", "--name", "x" * 300], "is not a VM name"),
            (["run", "tiny", "-c", "0"], "vcpus: 0: is out of range (use 1 to 255)"),
            (["run", "tiny", "--disk", "-5"], "disk"),
            (["run", "tiny", "--timeout", "soon"], "timeout: 'soon'"),
            (["run", "tiny", "--timeout", "nan"], "timeout: 'nan'"),
            (["stop", "a", "--timeout", "inf"], "timeout: 'inf'"),
            (["stop", "a", "--timeout", "-1"], "timeout"),
            (["stop"], "no VM is named (name some, or use --all)"),
            (["image"], "the following arguments are required: VERB"),
            (["image", "shwo", "x"], "did you mean 'show'?"),
            (["ls", "--state", "runing"], "did you mean 'running'?"),
            (["apply"], "the following arguments are required: -f/--file"),
            (["cp", "a", "b"], "paths: 'a b': names no guest"),
            (["exec", "a"], "COMMAND"),
            (["forward", "add", "a", "x:y"], "forward: 'x:y'"),
        ],
    )
    def test_wrong_input_is_one_line_with_a_remedy(
        self, words: list[str], says: str, capsys: pytest.CaptureFixture[str], home: Path
    ) -> None:
        assert run(words) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert says in err
        assert err.startswith("polyvisor: ")
        assert err.count("\n") == 1
        assert err.rstrip().endswith(")"), "it has a hint"
        assert not home.exists(), "nothing is left behind"

    @pytest.mark.parametrize(
        ("words", "status", "says"),
        [
            (["show", "nope"], 3, "there is no VM 'nope'"),
            (["stop", "nope"], 3, "there is no VM 'nope'"),
            (["rm", "nope"], 3, "there is no VM 'nope'"),
            (["ls", "nope"], 3, "there is no VM 'nope'"),
            (["image", "show", "nope"], 3, "there is no image 'nope'"),
            (["apply", "-f", "/nowhere/vm.yaml"], 3, "there is no file /nowhere/vm.yaml"),
            (["apply", "-f", "x" * 300], 1, "File name too long"),
            (["run", "tiny", "--user-data", "/nowhere/x"], 3, "there is no file /nowhere/x"),
            (["run", "tiny", "--user-data", "x" * 300], 1, "File name too long"),
            (["show", "a\x1b[2J"], 2, "name: 'a\\x1b[2J': is not a VM name"),
        ],
    )
    def test_other_failures(self, words: list[str], status: int, says: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(words) == status
        out, err = capsys.readouterr()
        assert out == ""
        assert says in err
        assert err.count("\n") == 1
        assert err[:-1].isprintable()

    def test_removing_by_force_what_is_not_there_is_fine(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(["rm", "--force", "nope"]) == 0

    def test_errors_in_json_have_code_message_and_hint(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(["--json", "show", "nope"]) == 3
        error = json.loads(capsys.readouterr().err)["error"]
        assert error["code"] == "not-found"
        assert "nope" in error["message"]
        assert error["hint"]
        assert run(["run", "--json"]) == 2
        assert json.loads(capsys.readouterr().err)["error"]["code"] == "usage"

    def test_a_trace_is_for_who_asks(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(["show", "nope", "--debug"]) == 3
        assert "Traceback" in capsys.readouterr().err

    def test_each_machine_is_tried_whatever_becomes_of_the_others(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(["stop", "a", "../b", "c"]) == 3
        assert capsys.readouterr().err.count("polyvisor: ") == 3

    @pytest.mark.parametrize("kind", PolyvisorError.__subclasses__())
    def test_the_exit_status_is_that_of_the_error(
        self, kind: type[PolyvisorError], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def failing(words: list[str]) -> None:
            error = kind.__new__(kind)
            PolyvisorError.__init__(error, "x")
            raise error

        monkeypatch.setattr(cli, "parse", failing)
        assert run(["ls"]) == kind.exit_status != 0

    def test_an_interrupt_is_130(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        def interrupted(words: list[str]) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(cli, "parse", interrupted)
        assert run(["ls"]) == 130
        assert capsys.readouterr().err == "polyvisor: interrupted\n"

    def test_a_home_that_is_none(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "file").touch()
        monkeypatch.setenv("POLYVISOR_HOME", str(tmp_path / "file"))
        for words in (["ls"], ["host"], ["run", "tiny"], ["image", "ls"], ["doctor"]):
            status = run(words)
            err = capsys.readouterr().err
            assert status == 1
            assert "Traceback" not in err
            assert err.count("\n") <= 1
            assert words == ["doctor"] or str(tmp_path / "file") in err


def test_no_words_print_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run([])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert all(verb in out for verb in VERBS)
    with pytest.raises(SystemExit) as caught:
        run(["--json"])
    assert caught.value.code == 2


def test_listing_nothing(capsys: pytest.CaptureFixture[str], home: Path) -> None:
    assert run(["ls"]) == 0
    assert capsys.readouterr() == ("", "no VMs here; begin with: polyvisor run tiny\n")
    assert run(["ls", "--json"]) == 0
    assert capsys.readouterr() == ("[]\n", "")
    assert run(["ls", "-q"]) == 0
    assert capsys.readouterr() == ("", "")
    assert run(["stop", "--all", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_two_documents_of_one_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "vm.yaml").write_text("name: a\nimage: tiny\n---\nname: a\nimage: tiny\n")
    assert run(["apply", "-f", str(tmp_path / "vm.yaml")]) == 2
    assert "name: 'a': stands in two documents" in capsys.readouterr().err


class TestProcess:
    """The command as a shell starts it."""

    def test_version(self) -> None:
        for flag in ("--version", "-V"):
            assert polyvisor(flag).stdout == f"polyvisor {__version__}\n"

    def test_a_reader_that_goes_away_is_no_failure(self) -> None:
        script = f"{sys.executable} -m polyvisor --help | true; echo ${{PIPESTATUS[0]}}"
        for _ in range(2):
            done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
            assert done.stderr == ""
            assert done.stdout == "0\n"

    def test_output_that_cant_be_written_is_one_line(self) -> None:
        with Path("/dev/full").open("w") as full:
            done = subprocess.run(
                [sys.executable, "-m", "polyvisor", "completion", "bash"],
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
                check=False,
            )
        assert done.returncode == 8
        assert done.stderr.startswith("polyvisor: ")
        assert done.stderr.count("\n") == 1
        assert "the disk is full" in done.stderr

    def test_bytes_that_are_no_text(self) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "polyvisor", "show", b"\xff\xfe"], capture_output=True, text=True, check=False
        )
        assert done.returncode == 2
        assert done.stderr.startswith("polyvisor: name: ")
        assert done.stderr.count("\n") == 1

    def test_a_spec_on_standard_input(self) -> None:
        done = polyvisor("apply", "-f", "-", input="name: a\nimage: tiny\nvcpu: 3\n")
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == "polyvisor: vcpu: 3: is an unknown key (did you mean 'vcpus'?)\n"


class TestCompletion:
    @pytest.mark.parametrize(("shell", "holds"), [("bash", "complete "), ("zsh", "compdef"), ("fish", "complete ")])
    def test_scripts(self, shell: str, holds: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(["completion", shell]) == 0
        script = capsys.readouterr().out
        assert holds in script
        assert "polyvisor" in script
        if shell == "bash":
            subprocess.run(["bash", "-n"], input=script, text=True, check=True)

    def test_another_shell_is_refused(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert run(["completion", "tcsh"]) == 2
        assert "choose from bash, zsh, fish" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("line", "holds", "lacks"),
        [
            ("polyvisor st", {"start", "stop"}, {"run"}),
            ("polyvisor run --mem", {"--memory"}, {"--mode"}),
            ("polyvisor stop w", {"web-1", "web-2"}, {"db"}),
            ("polyvisor run t", {"tiny"}, {"web-1"}),
            ("polyvisor image r", {"rm"}, {"ls"}),
            ("polyvisor forward ls d", {"db"}, {"web-1"}),
            ("polyvisor --json show d", {"db"}, set()),
            ("polyvisor image inspect ti", {"tiny"}, {"web-1"}),
            ("polyvisor image inspect home/vms/w", {"home/vms/web-1/"}, {"tiny"}),
            ("polyvisor ls --state p", {"paused"}, {"running"}),
            ("polyvisor snapshot revert db ", {"ok"}, {".new-ok", "web-1"}),
            ("polyvisor clone db new --snapshot o", {"ok"}, {"db"}),
            ("polyvisor disk grow db ", {"disk0"}, {"nic0", "db"}),
            ("polyvisor nic rm db ", {"nic0"}, {"disk0", "db"}),
            ("polyvisor nic rm web-1 ", set(), {"nic0"}),
        ],
    )
    def test_what_the_shell_is_told(
        self, line: str, holds: set[str], lacks: set[str], home: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(home.parent)
        for name in ("web-1", "web-2", "db", ".new-x"):
            (home / "vms" / name).mkdir(parents=True)
        for name in ("ok", ".new-ok"):
            (home / "vms/db/snapshots" / name).mkdir(parents=True)
        spec = VMSpec(name="db", image="tiny", disks=(Disk(),))
        record = Record(id="i", created_at=0.0, spec=spec, image_id="x", memory_mib=128)
        (home / "vms/db/vm.json").write_text(record_to_json(record))
        found = completions(line)
        assert holds <= found
        assert not lacks & found

    def test_a_home_that_is_none_completes_to_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "file").touch()
        monkeypatch.setenv("POLYVISOR_HOME", str(tmp_path / "file"))
        assert completions("polyvisor stop w") == set()


def completions(line: str) -> set[str]:
    """What argcomplete answers, as bash asks for it: on file descriptor 8."""
    read, write = os.pipe()
    environment = {
        **os.environ,
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\x0b",
        "_ARGCOMPLETE_SUPPRESS_SPACE": "1",
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
        "COMP_TYPE": "9",
    }
    script = f'exec 8>&{write} 9>/dev/null; exec "$0" -m polyvisor'
    with subprocess.Popen(["bash", "-c", script, sys.executable], env=environment, pass_fds=[write]) as process:
        os.close(write)
        with os.fdopen(read) as answer:
            text = answer.read()
        process.wait(30)
    return {word.strip() for word in text.split("\x0b") if word.strip()}


class TestStartUp:
    """A user feels it: nothing is imported that the verb does not need."""

    @pytest.mark.parametrize(
        ("words", "never"),
        [
            (["--version"], {"asyncio", "argparse", "json", "dataclasses", "pathlib", "polyvisor.cli.context"}),
            (["show", "--help"], {"yaml", "rich", "qemu.qmp", "pycdlib", "argcomplete", "polyvisor.images.debian"}),
            (["ls"], {"yaml", "rich", "qemu.qmp", "pycdlib", "asyncssh", "argcomplete", "polyvisor.cli.vm"}),
            (["ls", "--json"], {"yaml", "rich", "qemu.qmp", "pycdlib", "asyncssh", "argcomplete"}),
        ],
    )
    def test_what_a_verb_does_not_import(self, words: list[str], never: set[str]) -> None:
        assert not never & imported(words)

    def test_importing_the_command_line_costs_next_to_nothing(self) -> None:
        assert not {"asyncio", "argparse", "yaml", "rich"} & imported(None)


def imported(words: list[str] | None) -> set[str]:
    """Modules that are loaded when the command has ended; None only imports it."""
    call = "" if words is None else f"cli.main({words!r})"
    code = (
        "import atexit, os, sys\n"
        "os._exit = sys.exit  # the command ends without taking itself apart\n"
        "atexit.register(lambda: print('\\n'.join(sys.modules), file=sys.stderr))\n"
        f"import polyvisor.cli.main as cli\n{call}"
    )
    # -S and the path by hand: what the environment's own start-up files import is not ours.
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path[:0] = {sys.path!r}\n{code}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in done.stderr
    assert "polyvisor.cli.main" in done.stderr
    return set(done.stderr.split("\n"))


def test_errors_of_fields_keep_their_names() -> None:
    with pytest.raises(InvalidInput) as caught:
        parse(["run", "tiny", "--mode", "x"])
    assert caught.value.field == "mode"


def test_a_driver_without_its_hypervisor_is_told_of_once(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("POLYVISOR_QEMU", "/there/is/none")
    assert run(["host"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^driver qemu +not found$", said, re.MULTILINE)
    assert re.search(r"^tcg +no: POLYVISOR_QEMU=/there/is/none: there is no such program", said, re.MULTILINE)
    assert not re.search(r"^no (start|save)", said, re.MULTILINE)

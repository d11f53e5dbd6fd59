"""Starting programs: failures carry command and stderr, and nothing is left running."""

import asyncio
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from polyvisor.errors import ProcessFailed, TimedOut, Unavailable
from polyvisor.process import find_program, install_command, run, spawn_detached, which


def sh(script: str) -> list[str]:
    return ["sh", "-c", script]


async def test_what_a_program_writes() -> None:
    done = await run(sh("cat; echo err >&2; echo $LC_ALL $X"), stdin=b"in ", env={"X": "y"})
    assert (done.stdout, done.stderr, done.status) == ("in C.UTF-8 y\n", "err\n", 0)


async def test_a_program_gets_no_input_unless_it_is_given_some(tmp_path: Path) -> None:
    assert (await run(["cat"], timeout_s=10)).stdout == ""
    assert (await run(["pwd"], cwd=tmp_path)).stdout.strip() == str(tmp_path)


async def test_a_failure_carries_command_and_last_words() -> None:
    with pytest.raises(ProcessFailed) as caught:
        await run(sh("echo first >&2; echo 'last words' >&2; exit 3"))
    assert caught.value.message == "sh: last words"
    assert caught.value.status == 3
    assert caught.value.stderr == "first\nlast words\n"
    assert caught.value.command() == "sh -c 'echo first >&2; echo '\"'\"'last words'\"'\"' >&2; exit 3'"


async def test_a_silent_failure_and_one_on_stdout() -> None:
    with pytest.raises(ProcessFailed, match="sh: exit status 7"):
        await run(sh("exit 7"))
    with pytest.raises(ProcessFailed, match="sh: said here"):
        await run(sh("echo said here; exit 1"))
    assert (await run(sh("exit 7"), check=False)).status == 7


async def test_a_program_that_is_killed_is_a_failure() -> None:
    with pytest.raises(ProcessFailed) as caught:
        await run(sh("kill -9 $$"))
    assert caught.value.status == -9


@pytest.mark.parametrize("program", ["no-such-program", "/nowhere/x", "/etc/hostname", "/tmp"])
async def test_a_program_that_is_not_there_or_is_none(program: str) -> None:
    with pytest.raises(ProcessFailed) as caught:
        await run([program])
    assert caught.value.status == 127


async def test_bytes_that_are_no_text_do_no_harm() -> None:
    assert (await run(sh("printf 'a\\377b'"))).stdout == "a�b"


async def test_much_output_on_both_sides() -> None:
    code = "import sys; sys.stdout.write('o' * 300000); sys.stderr.write('e' * 300000)"
    done = await run([sys.executable, "-S", "-c", code], timeout_s=20)
    assert (len(done.stdout), len(done.stderr)) == (300_000, 300_000)


async def test_time_is_limited_and_children_end_too(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(TimedOut, match=r"sh did not end within 0\.2 s"):
        await run(sh(f"sleep 60 & echo $! >{tmp_path}/pid; wait"), timeout_s=0.2)
    assert time.monotonic() - began < 5
    assert await _gone(int((tmp_path / "pid").read_text()))


async def test_whoever_cancels_ends_the_program(tmp_path: Path) -> None:
    task = asyncio.create_task(run(sh(f"echo $$ >{tmp_path}/pid; exec sleep 60")))
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await _gone(int((tmp_path / "pid").read_text()))


async def _gone(pid: int) -> bool:
    for _ in range(200):
        try:
            if "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text():
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        await asyncio.sleep(0.01)
    return False


async def test_output_is_handed_on_as_it_comes() -> None:
    pieces: list[tuple[float, bytes]] = []
    done = await run(
        sh("echo one; sleep 0.2; echo two; echo three >&2"), on_output=lambda b: pieces.append((time.monotonic(), b))
    )
    assert b"".join(piece for _, piece in pieces) == b"one\ntwo\n"
    assert pieces[-1][0] - pieces[0][0] > 0.1
    assert (done.stdout, done.stderr) == ("", "three\n")


async def test_the_end_of_errors_is_kept_where_output_is_handed_on() -> None:
    with pytest.raises(ProcessFailed, match="sh: the end") as caught:
        await run(
            sh("head -c 200000 /dev/zero | tr '\\0' x >&2; echo >&2; echo the end >&2; exit 1"),
            on_output=lambda _: None,
        )
    assert len(caught.value.stderr) <= 64 << 10


async def test_an_error_in_the_listener_ends_the_program() -> None:
    def listen(_: bytes) -> None:
        raise RuntimeError("no")

    began = time.monotonic()
    with pytest.raises(RuntimeError, match="no"):
        await run(sh("echo x; sleep 60"), on_output=listen)
    assert time.monotonic() - began < 5


def test_programs_are_found_or_the_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "tool").write_text("")
    (tmp_path / "tool").chmod(0o755)
    assert find_program("tool", package="tools") == str(tmp_path / "tool")
    with pytest.raises(Unavailable, match="the program 'other' is not installed") as caught:
        find_program("other", package="others", also=())
    assert caught.value.hint == f"install it: {install_command('others')}"


@pytest.mark.parametrize(("user", "command"), [(0, "apt-get install x"), (1000, "sudo apt-get install x")])
def test_commands_are_fit_for_who_reads_them(monkeypatch: pytest.MonkeyPatch, user: int, command: str) -> None:
    monkeypatch.setattr("os.geteuid", lambda: user)
    assert install_command("x") == command


def test_a_detached_program_is_alone(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as log, (tmp_path / "kept").open("wb") as kept:
        script = f"ls /proc/self/fd; umask; pwd; cat; echo to-kept >/proc/self/fd/{kept.fileno()}"
        process = spawn_detached(sh(script), cwd=tmp_path, output=log, inherit=[kept.fileno()])
        assert process.wait(10) == 0
    said = (tmp_path / "log").read_text().split()
    assert "0077" in said
    assert str(tmp_path) in said
    assert (tmp_path / "kept").read_text() == "to-kept\n"
    assert os.getsid(0) != process.pid


CREDENTIALS = "grep -E '^(Uid|Gid|Groups|Cap[IPEA])' /proc/self/status; umask; pwd; ls /proc/self/fd | grep -x {}"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root starts programs as others")
@pytest.mark.parametrize("groups", [[], [44, 1_900_000_001]])
@pytest.mark.parametrize("tool", [True, False])
def test_a_detached_program_of_another_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups: list[int], tool: bool
) -> None:
    """It has that user and group, the groups named alone, and none of root's rights, in whichever way it is started."""
    if not tool:
        monkeypatch.setattr("polyvisor.process.which", lambda *_: None)
    user = 1_900_000_000
    with (tmp_path / "log").open("wb") as log, (tmp_path / "kept").open("wb") as file:
        kept = file.fileno()
        argv = sh(CREDENTIALS.format(kept))
        process = spawn_detached(argv, cwd=tmp_path, output=log, inherit=[kept], user=user, groups=groups)
        assert process.wait(10) == 0
    lines = (tmp_path / "log").read_text().splitlines()
    said = {line.partition(":")[0]: line.partition(":")[2].split() for line in lines if ":" in line}
    assert said["Uid"] == said["Gid"] == [str(user)] * 4
    assert said["Groups"] == [str(group) for group in groups]
    assert [int(said[name][0], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")] == [0] * 4
    assert lines[-3:] == ["0077", str(tmp_path), str(kept)]


def test_programs_are_found_as_a_shell_finds_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for place in first, second:
        place.mkdir()
        (place / "both").touch(mode=0o755)
    (first / "data").touch(mode=0o644)
    (second / "data").touch(mode=0o755)
    (first / "place").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path}/missing:{first}:{second}")
    assert which("both") == f"{first}/both"
    assert which("place") is None
    assert which("both", (str(second),)) == f"{second}/both"
    assert which(f"{second}/both") == f"{second}/both"
    assert which(f"{second}/none") is None
    assert which("data") == f"{second}/data"


TIED = """
import os, signal, sys
from pathlib import Path
from polyvisor.process import ending_with_us, spawn_detached
with open(os.devnull, "wb") as out:
    print(spawn_detached(ending_with_us(["sleep", "1000"]), cwd=Path("/"), output=out).pid, flush=True)
if sys.argv[1:]:
    sys.stdin.read(1)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("late", [False, True])
async def test_a_program_that_ends_with_us(late: bool) -> None:
    """Killed at once, before the program has begun, or when it has: it does not stay."""
    parent = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", TIED, *(["late"] if late else [])),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert parent.stdin is not None and parent.stdout is not None
    pid = int(await parent.stdout.readline())
    if late:
        await _until(lambda: _program(pid) == "sleep")
        parent.stdin.write(b"x")
    await parent.wait()
    await _until(lambda: _program(pid) is None)


def _program(pid: int) -> str | None:
    """What a process runs, None where it is no more, or nobody has asked so far how it ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")
    except FileNotFoundError:
        return None
    return None if fields[2].split()[0] == "Z" else fields[0].partition("(")[2]


async def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)

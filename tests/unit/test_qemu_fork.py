"""Copying a running guest, against QEMUs that are none: whatever fails, the source is let go on, and the second one ends."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from polyvisor.drivers.base import Template
from polyvisor.drivers.qemu import fork
from polyvisor.drivers.qemu.argv import build_argv
from polyvisor.drivers.qemu.fork import SEALS, AtPause, begin, take_template
from polyvisor.drivers.qemu.programs import Qemu
from polyvisor.drivers.qemu.qmp import QMPLost, QMPRefused, connected
from polyvisor.errors import InvalidInput, PolyvisorError
from polyvisor.host.fork import MOST, check_names
from polyvisor.host.record import Launch
from polyvisor.host.store import VMDirectory
from polyvisor.operation import Progress, Step, silent
from tests.golden.boots import QEMU, TINY
from tests.unit.test_qmp import FakeQemu, listening

DONE = {"status": "completed"}
LAUNCH = Launch(
    started_at=0.0,
    boot_id="",
    hypervisor="tcg",
    reason="",
    version="7.2",
    mode="pvh",
    argv=tuple(build_argv(QEMU, TINY)),
)
Answers = dict[str, dict[str, Any] | None]


class Guest:
    """A QEMU that answers as told: `migration` is what `query-migrate` gives after `migrate`, one after the other."""

    def __init__(
        self,
        *migration: dict[str, Any],
        state: str = "running",
        answers: Answers | None = None,
        version: tuple[int, int] = (9, 0),
    ) -> None:
        self.left, self.state, self.begun = list(migration), state, False
        self.answers = answers or {}
        self.qmp = FakeQemu(self.answer, version=version)

    @property
    def said(self) -> list[str]:
        looks = ("qmp_capabilities", "qom-get", "getfd")
        words = [each["execute"] for each in self.qmp.seen]
        return [word for word in words if word not in looks and not word.startswith("query-")]

    def capabilities(self) -> dict[str, bool]:
        """The capabilities as they are in the end."""
        commands = [each["arguments"] for each in self.qmp.seen if each["execute"] == "migrate-set-capabilities"]
        return {each["capability"]: each["state"] for command in commands for each in command["capabilities"]}

    async def answer(self, command: dict[str, Any]) -> dict[str, Any] | None:
        word = command["execute"]
        if word in self.answers:
            answer = self.answers[word]
            return dict(answer) if answer is not None else None
        if word in ("migrate", "migrate-incoming"):
            self.begun = True
        if word == "query-migrate":
            if not self.begun:
                return {"return": {}}
            return {"return": self.left.pop(0) if len(self.left) > 1 else self.left[0]}
        events: dict[str, Any] = {"migrate": ["STOP"], "stop": ["STOP"], "cont": ["RESUME"]}
        found = {
            "query-status": {"status": self.state},
            "qom-get": "pc-i440fx-7.2-machine",
            "query-balloon": {"actual": 128 << 20},
            "query-hotpluggable-cpus": [{"type": "cpu", "props": {"core-id": 0}, "qom-path": "/machine/0"}],
            "query-named-block-nodes": [],
        }
        return {"return": found.get(word, {}), "events": events.get(word, []) if self.state == "running" else []}


class Second(Guest):
    """The QEMU that receives the memory, as a process that can be ended."""

    pid = 0

    def __init__(self, *migration: dict[str, Any], dead: bool = False, answers: Answers | None = None) -> None:
        super().__init__(*migration, answers=answers)
        self.dead, self.waited = dead, False
        self.argv: tuple[str, ...] = ()
        self.server: asyncio.Task[None] | None = None

    def spawned(self, argv: tuple[str, ...], *, cwd: Path, output: Any, **_: Any) -> Second:
        self.argv = argv
        if self.dead:
            output.write(b"qemu-system-x86_64: there is no room\n")
            output.flush()
        else:
            self.server = asyncio.ensure_future(self.serve(cwd / "run/template.sock"))
        return self

    async def serve(self, socket: Path) -> None:
        async with listening(self.qmp, socket):
            await asyncio.Event().wait()

    def poll(self) -> int | None:
        return 1 if self.dead or "quit" in self.said else None

    def kill(self) -> None:
        self.dead = True
        if self.server:
            self.server.cancel()

    def wait(self) -> None:
        self.waited = self.dead


@pytest.fixture
def vm(tmp_path: Path) -> VMDirectory:
    (tmp_path / "vm/run").mkdir(parents=True)
    return VMDirectory(tmp_path / "vm")


@pytest.fixture
def open_files() -> Iterator[Callable[[], list[str]]]:
    """The files in memory that are open in this process, beside those from before."""

    def found() -> list[str]:
        links = [str(each.readlink()) for each in Path("/proc/self/fd").iterdir() if each.is_symlink()]
        return [link for link in links if "memfd:polyvisor" in link]

    assert found() == []
    yield found


async def copied(
    monkeypatch: pytest.MonkeyPatch,
    vm: VMDirectory,
    source: Guest,
    second: Second,
    progress: Progress = silent,
    *,
    runs: bool = True,
    at_pause: AtPause | None = None,
) -> Template:
    monkeypatch.setattr(fork, "spawn_detached", second.spawned)
    qemu = Qemu(QEMU, "7.2.22")
    async with listening(source.qmp, vm.run / "qmp.sock") as socket, connected(socket, timeout_s=5) as monitor:
        return await take_template(monitor, vm, LAUNCH, qemu, None, progress, runs=runs, at_pause=at_pause)


def close(template: Template) -> None:
    os.close(template.memory)
    os.close(template.state)


async def test_a_copy(monkeypatch: pytest.MonkeyPatch, vm: VMDirectory, open_files: Callable[[], list[str]]) -> None:
    steps: list[Step] = []
    source, second = Guest({"status": "active", "ram": {"total": 100, "remaining": 40}}, DONE), Second(DONE)
    template = await copied(monkeypatch, vm, source, second, progress=steps.append)
    assert steps == [Step("copying memory", 60, 100, "B")]
    assert (template.machine, template.vcpus) == ("pc-i440fx-7.2", 1)
    assert 0 <= template.pause_s < 5
    assert os.fstat(template.memory).st_size == 128 << 20
    assert fcntl.fcntl(template.memory, fcntl.F_GET_SEALS) == SEALS
    with pytest.raises(PermissionError):
        os.pwrite(template.memory, b"x", 0)
    assert source.said.count("cont") == 1 and "stop" not in source.said
    assert source.capabilities() == {"pause-before-switchover": False, "x-ignore-shared": False}
    assert second.said == ["migrate-incoming", "migrate-set-capabilities", "migrate", "quit"]
    assert second.capabilities() == {"x-ignore-shared": True}
    assert second.waited and not (vm.run / "template.sock").exists()
    close(template)
    assert open_files() == []


@pytest.mark.parametrize(
    ("hypervisor", "version", "live"),
    [
        ("tcg", (7, 2), False),
        ("tcg", (8, 2), False),
        ("tcg", (9, 0), True),
        ("tcg", (10, 1), True),
        ("kvm", (7, 2), True),
    ],
)
async def test_emulation_that_misses_writes_stands_still(
    monkeypatch: pytest.MonkeyPatch, vm: VMDirectory, hypervisor: str, version: tuple[int, int], live: bool
) -> None:
    """A copy that is taken while the guest writes would lack some of it: forks would panic."""
    source = Guest(DONE, version=version)
    monkeypatch.setitem(globals(), "LAUNCH", replace(LAUNCH, hypervisor=hypervisor))
    close(await copied(monkeypatch, vm, source, Second(DONE)))
    said = [word for word in source.said if word in ("stop", "migrate", "cont")]
    assert said == (["migrate", "cont"] if live else ["stop", "migrate", "cont"])


async def test_one_that_is_paused_is_not_stopped(monkeypatch: pytest.MonkeyPatch, vm: VMDirectory) -> None:
    source = Guest(DONE, state="paused", version=(7, 2))
    close(await copied(monkeypatch, vm, source, Second(DONE), runs=False))
    assert "stop" not in source.said and "cont" not in source.said


async def test_the_second_one_ends_with_us(monkeypatch: pytest.MonkeyPatch, vm: VMDirectory) -> None:
    second = Second(DONE)
    close(await copied(monkeypatch, vm, Guest(DONE), second))
    assert second.argv[0].endswith("setpriv") and second.argv[1:3] == ("--pdeathsig", "KILL")
    assert QEMU in second.argv


async def test_a_guest_that_is_paused_stays_so(monkeypatch: pytest.MonkeyPatch, vm: VMDirectory) -> None:
    source = Guest(DONE, state="paused")
    template = await copied(monkeypatch, vm, source, Second(DONE), runs=False)
    assert template.pause_s == 0
    assert "cont" not in source.said
    close(template)


async def test_one_that_an_earlier_copy_left_paused_goes_on_at_once(
    monkeypatch: pytest.MonkeyPatch, vm: VMDirectory
) -> None:
    source = Guest(DONE, state="paused", answers={"cont": {"return": {}, "events": ["RESUME"]}})
    source.answers["migrate"] = {"return": {}, "events": ["STOP"]}
    source.begun = False

    async def begun(command: dict[str, Any]) -> dict[str, Any] | None:
        if command["execute"] == "migrate":
            source.begun = True
        return await source.answer(command)

    source.qmp.answer = begun
    template = await copied(monkeypatch, vm, source, Second(DONE))
    assert source.said.index("cont") < source.said.index("migrate")
    assert source.said.count("cont") == 2
    assert 0 <= template.pause_s < 5
    close(template)


async def test_disks_are_frozen_while_it_stands_still(monkeypatch: pytest.MonkeyPatch, vm: VMDirectory) -> None:
    source = Guest({"status": "active"}, {"status": "pre-switchover"}, DONE)
    seen: list[list[str]] = []

    async def at_pause() -> None:
        seen.append(source.said)

    close(await copied(monkeypatch, vm, source, Second(DONE), at_pause=at_pause))
    [before] = seen
    assert "migrate" in before and "migrate-continue" not in before
    assert source.said.index("migrate-continue") < source.said.index("cont")
    assert source.capabilities() == {"pause-before-switchover": False, "x-ignore-shared": False}


@pytest.mark.parametrize(
    "migration",
    [
        [{"status": "failed", "error-desc": "Unable to write to socket: Broken pipe"}],
        [{"status": "active"}, {"status": "failed"}],
        [{"status": "cancelled"}],
    ],
)
async def test_a_source_whose_migration_fails_is_let_go(
    monkeypatch: pytest.MonkeyPatch,
    vm: VMDirectory,
    open_files: Callable[[], list[str]],
    migration: list[dict[str, Any]],
) -> None:
    source, second = Guest(*migration), Second(DONE)
    with pytest.raises(PolyvisorError, match="could not copy its memory"):
        await copied(monkeypatch, vm, source, second)
    assert "cont" in source.said[source.said.index("migrate") :]
    assert second.waited and not (vm.run / "template.sock").exists()
    assert open_files() == []


async def test_disks_that_can_not_be_frozen(
    monkeypatch: pytest.MonkeyPatch, vm: VMDirectory, open_files: Callable[[], list[str]]
) -> None:
    """The migration that waits for it is ended, or it would stop the guest at its end."""
    waiting = {"status": "pre-switchover"}
    source, second = Guest(waiting, waiting, {"status": "cancelled"}), Second(DONE)

    async def at_pause() -> None:
        raise PolyvisorError("the disk is full")

    with pytest.raises(PolyvisorError, match="the disk is full"):
        await copied(monkeypatch, vm, source, second, at_pause=at_pause)
    after = source.said[source.said.index("migrate") :]
    assert after == ["migrate", "migrate_cancel", "cont", "migrate-set-capabilities"]
    assert source.capabilities() == {"pause-before-switchover": False, "x-ignore-shared": False}
    assert second.waited and open_files() == []


async def test_a_second_one_that_does_not_start(
    monkeypatch: pytest.MonkeyPatch, vm: VMDirectory, open_files: Callable[[], list[str]]
) -> None:
    source = Guest(DONE)
    with pytest.raises(PolyvisorError, match="receives the memory failed: qemu-system-x86_64: there is no room"):
        await copied(monkeypatch, vm, source, Second(DONE, dead=True))
    assert "migrate" not in source.said
    assert open_files() == []


@pytest.mark.parametrize("at", ["migrate-incoming", "query-migrate", "migrate"])
async def test_a_second_one_that_dies(
    monkeypatch: pytest.MonkeyPatch, vm: VMDirectory, open_files: Callable[[], list[str]], at: str
) -> None:
    """The source's own migration says that it is over, or it is ended; either way the guest goes on."""
    source, second = Guest(DONE), Second(DONE, answers={at: None})
    with pytest.raises(PolyvisorError, match="receives the memory failed"):
        await copied(monkeypatch, vm, source, second)
    if "migrate" in source.said:
        assert "cont" in source.said[source.said.index("migrate") :]
    assert second.waited and open_files() == []


async def test_a_second_one_that_refuses_what_it_gets(
    monkeypatch: pytest.MonkeyPatch, vm: VMDirectory, open_files: Callable[[], list[str]]
) -> None:
    source, second = Guest(DONE), Second({"status": "failed", "error-desc": "Unknown savevm section"})
    with pytest.raises(PolyvisorError, match="Unknown savevm section"):
        await copied(monkeypatch, vm, source, second)
    assert "cont" in source.said and second.waited and open_files() == []


async def test_a_source_that_dies(
    monkeypatch: pytest.MonkeyPatch, vm: VMDirectory, open_files: Callable[[], list[str]]
) -> None:
    """Nothing can let it go on; what is said is that it has ended, and nothing stays."""
    source, second = Guest(DONE, answers={"migrate": None}), Second(DONE)
    with pytest.raises(PolyvisorError):
        await copied(monkeypatch, vm, source, second)
    assert second.waited and open_files() == []


async def test_giving_up_lets_the_guest_go_on(
    monkeypatch: pytest.MonkeyPatch, vm: VMDirectory, open_files: Callable[[], list[str]]
) -> None:
    """Ctrl-C."""
    source, second = Guest({"status": "active"}), Second(DONE)
    task = asyncio.ensure_future(copied(monkeypatch, vm, source, second))
    while "migrate" not in source.said:
        await asyncio.sleep(0.005)
    source.left = [{"status": "active"}, {"status": "cancelling"}, {"status": "cancelled"}]
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert task.cancelled()
    assert {"migrate_cancel", "cont"} <= set(source.said)
    assert second.waited and open_files() == []


def not_ready() -> None:
    raise AssertionError("it has no memory")


class TestBegin:
    @pytest.fixture
    def template(self) -> Iterator[Template]:
        memory, state = os.memfd_create("polyvisor-a"), os.memfd_create("polyvisor-b")
        os.write(state, b"x" * 100)
        yield Template(memory=memory, state=state, machine="m", vcpus=1, pause_s=0.0)
        os.close(memory)
        os.close(state)

    @pytest.mark.parametrize("go", [True, False])
    async def test_a_fork(self, tmp_path: Path, template: Template, go: bool) -> None:
        """It is ready before it goes; nothing of how it was made stays with it, whether it goes or not."""
        guest = Guest({"status": "active"}, DONE)
        before: list[str] = []
        async with listening(guest.qmp, tmp_path / "s") as socket, connected(socket, timeout_s=5) as monitor:
            await begin(monitor, template, lambda: before.extend(guest.said), go=go)
        assert before == ["migrate-set-capabilities", "migrate-incoming"]
        assert guest.said == [*before, *(["cont"] if go else []), "migrate-set-capabilities"]
        assert guest.capabilities() == {"x-ignore-shared": False}

    async def test_a_qemu_that_takes_files_in_sets_alone(self, tmp_path: Path, template: Template) -> None:
        guest = Guest(DONE, version=(11, 0))
        async with listening(guest.qmp, tmp_path / "s") as socket, connected(socket, timeout_s=5) as monitor:
            await begin(monitor, template, lambda: None, go=True)
        assert guest.said[:4] == ["migrate-set-capabilities", "add-fd", "migrate-incoming", "remove-fd"]

    @pytest.mark.parametrize(("answer", "error"), [(None, QMPLost), ({"error": {"desc": "no"}}, QMPRefused)])
    async def test_one_that_fails(
        self, tmp_path: Path, template: Template, answer: dict[str, Any] | None, error: type[PolyvisorError]
    ) -> None:
        failed = {"class": "GenericError", "desc": "no"}
        guest = Guest(DONE, answers={"migrate-incoming": {"error": failed} if answer else None})
        async with listening(guest.qmp, tmp_path / "s") as socket, connected(socket, timeout_s=5) as monitor:
            with pytest.raises(error):
                await begin(monitor, template, not_ready, go=True)


class TestNames:
    @pytest.mark.parametrize(
        ("names", "problem"),
        [
            ([], "no fork is named"),
            (["a", "b", "a"], "stands twice"),
            (["../a"], "is not a VM name"),
            (["a", ""], "is not a VM name"),
            (["-a"], "is not a VM name"),
            ([f"a{i}" for i in range(MOST + 1)], "too many"),
        ],
    )
    def test_refused(self, names: list[str], problem: str) -> None:
        with pytest.raises(InvalidInput, match=problem):
            check_names(names)

    def test_as_many_as_may_be(self) -> None:
        check_names([f"a{i}" for i in range(MOST)])

"""VM directories and their locks: whole or not there, one at a time, and never stale."""

import asyncio
import errno
import fcntl
import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from polyvisor.errors import AlreadyExists, Busy, InvalidInput, NotFound, PolyvisorError, StorageFull
from polyvisor.home import Home
from polyvisor.host.record import Launch, Record, launch_to_json, record_to_json
from polyvisor.host.store import VMStore
from polyvisor.spec.vm import VMSpec

RECORD = Record(
    id="6f4d0a54", created_at=1.5, spec=VMSpec(name="a", image="tiny"), image_id="k", memory_mib=128, user=None
)
LAUNCH = Launch(
    started_at=2.5, boot_id="b", hypervisor="tcg", reason="r", version="7.2.22", mode="pvh", argv=("qemu", "-x")
)


@pytest.fixture
def store(tmp_path: Path) -> VMStore:
    home = Home(tmp_path / "home")
    home.prepare()
    return VMStore(home)


def changed(**values: object) -> str:
    """The record, with other values."""
    return json.dumps({**json.loads(record_to_json(RECORD)), **values})


def make(store: VMStore, name: str = "a") -> None:
    with store.creating(name) as vm:
        vm.write_record(RECORD)


@contextmanager
def holding(path: Path, *, shared: bool = False) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock on `path`."""
    code = f"""
        import fcntl, os, sys
        fd = os.open({str(path)!r}, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(fd, fcntl.{"LOCK_SH" if shared else "LOCK_EX"})
        os.pwrite(fd, b'{{"pid": 42, "verb": "start"}}', 0)
        print("locked", flush=True)
        sys.stdin.read()
    """
    with subprocess.Popen(
        [sys.executable, "-S", "-E", "-c", textwrap.dedent(code)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        try:
            yield process
        finally:
            process.kill()


class TestMaking:
    def test_a_machine_appears_whole(self, store: VMStore) -> None:
        with store.creating("a") as vm:
            assert store.names() == []
            assert vm.disks.is_dir()
            assert vm.run.is_dir()
            vm.write_record(RECORD)
        assert store.names() == ["a"]
        assert store.get("a").record == RECORD
        assert sorted(p.name for p in store.home.vms.iterdir()) == ["a"]

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, asyncio.CancelledError])
    def test_or_not_at_all(self, store: VMStore, error: type[BaseException]) -> None:
        with pytest.raises(error), store.creating("a") as vm:
            vm.write_record(RECORD)
            raise error
        assert list(store.home.vms.iterdir()) == []

    def test_a_full_disk_is_said(self, store: VMStore) -> None:
        with pytest.raises(StorageFull, match="creating VM 'a': the disk is full"), store.creating("a"):
            raise OSError(errno.ENOSPC, "No space left on device")
        assert list(store.home.vms.iterdir()) == []

    def test_a_name_that_is_taken(self, store: VMStore) -> None:
        make(store)
        with pytest.raises(AlreadyExists, match="there is a VM 'a' already"), store.creating("a"):
            pytest.fail("must not get here")
        assert store.get("a").record == RECORD

    def test_what_a_killed_command_left_is_in_nobodys_way(self, store: VMStore) -> None:
        for left in (".new-a", ".gone-a"):
            (store.home.vms / left / "disks").mkdir(parents=True)
        assert store.names() == []
        make(store)
        assert sorted(p.name for p in store.home.vms.iterdir()) == ["a"]

    @pytest.mark.parametrize("name", ["../a", "a/b", "", ".new-a", "a\0"])
    def test_no_name_leads_elsewhere(self, store: VMStore, name: str) -> None:
        with pytest.raises(InvalidInput):
            store.get(name)
        with pytest.raises(InvalidInput), store.creating(name):
            pytest.fail("must not get here")


class TestRemoving:
    def test_once_and_again(self, store: VMStore) -> None:
        make(store)
        assert store.remove("a") is True
        assert store.remove("a") is False
        assert list(store.home.vms.iterdir()) == []

    @pytest.mark.parametrize("left", [".new-a", ".gone-a"])
    def test_a_removal_that_was_cut_off_is_finished(self, store: VMStore, left: str) -> None:
        (store.home.vms / left / "disks").mkdir(parents=True)
        assert store.remove("a") is True
        assert list(store.home.vms.iterdir()) == []

    def test_others_are_left_alone(self, store: VMStore) -> None:
        make(store, "a")
        make(store, "a-b")
        store.remove("a")
        assert store.names() == ["a-b"]


class TestReading:
    def test_what_is_not_there(self, store: VMStore) -> None:
        with pytest.raises(NotFound, match="there is no VM 'a'"):
            store.get("a")
        with pytest.raises(NotFound):
            _ = store.directory("a").record
        assert store.directory("a").launch() is None

    def test_names_where_there_is_no_home(self, tmp_path: Path) -> None:
        assert VMStore(Home(tmp_path / "absent")).names() == []

    def test_names_where_the_home_is_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "home").touch()
        with pytest.raises(PolyvisorError, match="Not a directory"):
            VMStore(Home(tmp_path / "home")).names()

    def test_a_launch_is_read_as_it_was_written(self, store: VMStore) -> None:
        make(store)
        store.get("a").write_launch(LAUNCH)
        assert store.get("a").launch() == LAUNCH

    @pytest.mark.parametrize(
        "content",
        ["", "{", "null", "5", "[]", '"x"', "{}", '{"format": 2}', '{"format": 1}', "\x00", "[" * 100_000]
        + [
            changed(spec=spec)
            for spec in (None, 5, {}, {"name": "a", "image": "b", "x": 1}, {"name": "A", "image": "b"})
        ]
        + [changed(id=5), changed(created_at="x"), changed(image_id=[]), changed(memory_mib="m"), changed(user="root")],
    )
    def test_a_record_that_cant_be_understood(self, store: VMStore, content: str) -> None:
        make(store)
        vm = store.get("a")
        (vm.path / "vm.json").write_text(content)
        with pytest.raises(PolyvisorError, match="can't be understood") as caught:
            _ = vm.record
        assert "polyvisor rm --force a" in (caught.value.hint or "")

    @pytest.mark.parametrize(
        "content",
        [
            "",
            "null",
            "[]",
            "{}",
            launch_to_json(LAUNCH).replace('"qemu"', "5"),
            launch_to_json(LAUNCH).replace("2.5", '"x"'),
            launch_to_json(LAUNCH).replace('"forwards": []', '"forwards": [{"host_port": 1}]'),
            launch_to_json(LAUNCH).replace('"forwards": []', '"forwards": 5'),
        ],
    )
    def test_a_launch_record_that_cant_be_understood(self, store: VMStore, content: str) -> None:
        make(store)
        vm = store.get("a")
        (vm.path / "launch.json").write_text(content)
        with pytest.raises(PolyvisorError, match=r"launch.json can't be understood"):
            vm.launch()

    def test_files_that_cant_be_read_are_errors_of_ours(self, store: VMStore) -> None:
        (store.home.vms / "stray").touch()
        assert store.names() == []
        with pytest.raises(PolyvisorError, match="stray"):
            _ = store.directory("stray").record
        with pytest.raises(PolyvisorError, match="stray"):
            store.directory("stray").launch()
        make(store)
        (store.get("a").path / "launch.json").mkdir()
        with pytest.raises(PolyvisorError, match=r"launch\.json"):
            store.get("a").launch()


class TestLock:
    async def test_nothing_remains_of_the_lock_of_a_machine_that_is_not(self, store: VMStore) -> None:
        async with store.locked("a", "run"):
            assert [p.name for p in store.home.locks.iterdir()] == ["a.lock"]
        assert list(store.home.locks.iterdir()) == []

    async def test_the_holder_is_named(self, store: VMStore) -> None:
        with holding(store.home.locks / "a.lock"), pytest.raises(Busy) as caught:
            async with store.locked("a", "stop", patience_s=0.05):
                pytest.fail("must not get here")
        assert caught.value.message == "VM 'a' is busy: 'start' is at work on it (process 42)"
        assert caught.value.hint

    async def test_a_holder_that_did_not_write_its_name(self, store: VMStore) -> None:
        for content in (b"", b"{", b"[]", b"{}", b"\xff"):
            with holding(store.home.locks / "a.lock") as _:
                (store.home.locks / "a.lock").write_bytes(content)
                with pytest.raises(Busy, match="VM 'a' is busy: another command is at work on it"):
                    async with store.locked("a", "stop", patience_s=0):
                        pytest.fail("must not get here")

    async def test_the_second_waits_for_the_first(self, store: VMStore) -> None:
        order: list[str] = []

        async def work(name: str) -> None:
            async with store.locked("a", name, patience_s=10):
                order.append(f"{name} begins")
                await asyncio.sleep(0.05)
                order.append(f"{name} ends")

        await asyncio.gather(work("one"), work("two"), work("three"))
        assert len(order) == 6
        for begin, end in zip(order[::2], order[1::2], strict=True):
            assert begin.split()[0] == end.split()[0]

    async def test_a_holder_that_dies_lets_go(self, store: VMStore) -> None:
        with holding(store.home.locks / "a.lock") as process:
            asyncio.get_running_loop().call_later(0.1, process.kill)
            began = time.monotonic()
            async with store.locked("a", "stop", patience_s=10):
                assert time.monotonic() - began < 5

    async def test_locks_of_machines_are_apart(self, store: VMStore) -> None:
        async with store.locked("a", "x"), store.locked("b", "x", patience_s=0):
            pass

    async def test_an_unlinked_lock_file_locks_nothing(self, store: VMStore) -> None:
        """The last holder may unlink the file that the next one has opened: two must not hold two files of one name."""
        path = store.home.locks / "a.lock"
        old = os.open(path, os.O_RDWR | os.O_CREAT)
        fcntl.flock(old, fcntl.LOCK_EX)
        task = asyncio.create_task(self._enter(store))
        await asyncio.sleep(0.05)
        assert not task.done()
        path.unlink()
        await asyncio.wait_for(task, 5)
        os.close(old)

    async def _enter(self, store: VMStore) -> None:
        async with store.locked("a", "x", patience_s=5) as vm:
            assert vm.name == "a"
            assert (store.home.locks / "a.lock").exists()

    async def test_many_at_once_are_one_after_the_other(self, store: VMStore) -> None:
        inside = 0

        async def work() -> None:
            nonlocal inside
            async with store.locked("a", "x", patience_s=20):
                inside += 1
                assert inside == 1
                await asyncio.sleep(0.001)
                inside -= 1

        await asyncio.gather(*(work() for _ in range(10)))
        assert list(store.home.locks.iterdir()) == []

    async def test_an_error_inside_lets_go(self, store: VMStore) -> None:
        with pytest.raises(RuntimeError):
            async with store.locked("a", "x"):
                raise RuntimeError
        async with store.locked("a", "x", patience_s=0):
            pass


class TestAlive:
    def test_a_machine_lives_while_a_process_holds_its_lock(self, store: VMStore) -> None:
        make(store)
        vm = store.get("a")
        assert not vm.alive()
        with holding(vm.alive_file) as process:
            assert vm.alive()
            process.kill()
            process.wait()
            assert not vm.alive()

    def test_who_only_looks_does_not_make_it_live(self, store: VMStore) -> None:
        make(store)
        vm = store.get("a")
        with holding(vm.alive_file, shared=True):
            assert not vm.alive()

    def test_the_lock_is_inherited_by_the_process(self, store: VMStore) -> None:
        """As QEMU has it: the command that started it is gone, and the lock lives on."""
        make(store)
        vm = store.get("a")
        fd = os.open(vm.alive_file, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX)
        with subprocess.Popen(["sleep", "60"], pass_fds=[fd]) as child:
            os.close(fd)
            assert vm.alive()
            child.kill()
            child.wait()
            assert not vm.alive()

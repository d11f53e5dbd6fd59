"""What host and guest tell each other by the VM's second serial port: the pipes, the words, the answer, and who it is for."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from polyvisor.drivers.qemu.agent import has_agent_port, heard, make_pipes, tell
from polyvisor.drivers.qemu.argv import build_argv
from polyvisor.errors import PolyvisorError, TimedOut, WrongState
from polyvisor.host import identity
from polyvisor.host.plan import mac_addresses
from polyvisor.host.record import Record
from polyvisor.host.store import VMDirectory
from polyvisor.images import reseed, tiny_root
from polyvisor.images.hostkey import HostKey
from polyvisor.images.image import Seed
from polyvisor.operation import silent
from polyvisor.spec.vm import Nic, VMSpec
from tests.golden.boots import QEMU, TINY

ID = "6f4d0a54-1f0a-4b5e-9d0e-2b7f6a1c9e11"
OTHER = "00000000-0000-4000-8000-000000000001"
TOLD = b"\n\npolyvisor-identity 1 id=x\n"
RENEWED = f"polyvisor-renewed {ID}\n".encode()


@pytest.fixture
def vm(tmp_path: Path) -> VMDirectory:
    (tmp_path / "run").mkdir()
    return VMDirectory(tmp_path)


class Guest:
    """QEMU's ends of the pipes, both open for reading and writing as QEMU has them."""

    def __init__(self, vm: VMDirectory) -> None:
        self.told, self.says = (os.open(vm.run / f"agent.{end}", os.O_RDWR | os.O_NONBLOCK) for end in ("in", "out"))

    def close(self) -> None:
        os.close(self.told)
        os.close(self.says)


@pytest.fixture
def guest(vm: VMDirectory) -> Guest:
    make_pipes(vm, None)
    return Guest(vm)


def record(vm_id: str = ID, name: str = "copy", *nics: Nic) -> Record:
    return Record(
        id=vm_id, created_at=0.0, spec=VMSpec(name=name, image="tiny", nics=nics), image_id="i", memory_mib=128
    )


class TestPipes:
    def test_what_is_told_waits_until_it_is_read(self, vm: VMDirectory, guest: Guest) -> None:
        tell(vm, b"one\n")
        tell(vm, b"two\n")
        assert os.read(guest.told, 100) == b"one\ntwo\n"
        guest.close()

    def test_nothing_is_told_where_there_is_nothing_to_tell(self, vm: VMDirectory) -> None:
        tell(vm, b"")

    def test_what_is_said_is_heard_once(self, vm: VMDirectory, guest: Guest) -> None:
        os.write(guest.says, b"hello\n")
        assert heard(vm) == b"hello\n"
        assert heard(vm) == b""
        guest.close()

    def test_without_qemu_nobody_can_be_told(self, vm: VMDirectory) -> None:
        make_pipes(vm, None)
        with pytest.raises(PolyvisorError, match="telling the guest"):
            tell(vm, b"x")
        assert heard(vm) == b""

    def test_they_are_made_anew(self, vm: VMDirectory, guest: Guest) -> None:
        """What the guest of an earlier process was told, or said, is not for this one."""
        tell(vm, b"old\n")
        make_pipes(vm, None)
        again = Guest(vm)
        with pytest.raises(BlockingIOError):
            os.read(again.told, 100)
        guest.close()
        again.close()

    def test_they_are_for_the_vm_alone(self, vm: VMDirectory) -> None:
        make_pipes(vm, os.geteuid() or 54321)
        for end in ("in", "out"):
            status = (vm.run / f"agent.{end}").stat()
            assert status.st_mode & 0o777 == 0o600
            assert status.st_uid == (os.geteuid() or 54321)

    @pytest.mark.parametrize("kind", ["link", "file", "link to a pipe", "nothing"])
    def test_nothing_else_in_their_place_is_used(self, vm: VMDirectory, tmp_path: Path, kind: str) -> None:
        """A guest that has broken out of its QEMU can put what it likes there."""
        secret = tmp_path / "secret"
        secret.write_text("secret")
        elsewhere = tmp_path / "elsewhere"
        os.mkfifo(elsewhere)
        held = os.open(elsewhere, os.O_RDWR)
        for end in ("in", "out"):
            place = vm.run / f"agent.{end}"
            if kind == "file":
                place.write_text("secret")
            elif kind.startswith("link"):
                place.symlink_to(elsewhere if "pipe" in kind else secret)
        with pytest.raises(PolyvisorError, match="telling the guest"):
            tell(vm, b"x")
        os.write(held, b"not for you")
        assert heard(vm) == b""
        assert secret.read_text() == "secret"
        os.close(held)

    def test_a_reader_that_does_not_read_is_not_waited_for(self, vm: VMDirectory, guest: Guest) -> None:
        with pytest.raises(PolyvisorError):
            for _ in range(100):
                tell(vm, bytes(4096))
        guest.close()

    def test_which_processes_have_a_port(self) -> None:
        assert has_agent_port(build_argv(QEMU, TINY))
        older = [word for word in build_argv(QEMU, TINY) if "agent" not in word]
        assert not has_agent_port(older)


class TestMessage:
    def words(self, message: bytes) -> dict[str, str]:
        line = message.decode().splitlines()[-1]
        what, version, *words = line.split(" ")
        assert (what, version) == ("polyvisor-identity", "1")
        return dict(word.split("=", 1) for word in words)

    def test_its_lines_come_after_what_gets_lost(self) -> None:
        message = identity.message(record(), record(OTHER), None, 0)
        assert message.startswith(b" " * 16), "what the serial port's FIFO holds"
        assert message.endswith(b"\n")
        blank, first, _ = message.decode().splitlines()
        assert blank.strip() == ""
        assert first == f"polyvisor-seed {self.words(message)['seed']}", "random numbers wait for nothing"

    def test_its_words(self) -> None:
        words = self.words(identity.message(record(), record(OTHER, "web-1"), None, 1234567890.9))
        assert (words["id"], words["name"], words["time"], words["macs"]) == (ID, "copy", "1234567890", "-")
        assert "dropbear" not in words and "openssh" not in words

    def test_the_seed_is_never_the_same(self) -> None:
        seeds = {self.words(identity.message(record(), record(OTHER), None, 0))["seed"] for _ in range(20)}
        assert len(seeds) == 20
        assert {len(bytes.fromhex(seed)) for seed in seeds} == {32}

    def test_the_key_as_each_server_wants_it(self, tmp_path: Path) -> None:
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / "k")], check=True)
        key = HostKey((tmp_path / "k").read_text(), (tmp_path / "k.pub").read_text().strip())
        for seed, word, wanted in (
            (Seed.NOCLOUD, "openssh", key.private.encode()),
            (Seed.INITRD, "dropbear", key.dropbear),
        ):
            message = identity.message(record(), record(OTHER), key, 0, seed)
            words = self.words(message)
            assert len({"openssh", "dropbear"} & words.keys()) == 1
            printed = subprocess.run(["sh", "-c", 'printf "$1"', "sh", words[word]], capture_output=True, check=True)
            assert printed.stdout == wanted
            assert len(message) < 4096, "a pipe takes it as a whole, and a guest's line fits a terminal's buffer"

    def test_macs_of_networks_that_are_shared(self) -> None:
        """A user network is the VM's own."""
        given = "52:54:00:aa:bb:cc"
        nics = (Nic(network="user"), Nic(network="private:a"), Nic(network="private:b", mac=given), Nic(network="none"))
        source = record(OTHER, "web-1", *nics)
        fork = record(ID, "copy", *(replace(nic, mac=None) for nic in nics))
        pairs = identity.changed_macs(fork, source)
        before, after = mac_addresses(source), mac_addresses(fork)
        assert [old for old, _ in pairs] == [*before[1:]]
        assert [new for _, new in pairs] == [*after[1:]]
        assert before[2] == given and given not in after
        assert not set(before) & set(after)
        assert self.words(identity.message(fork, source, None, 0))["macs"] == ",".join(f"{a}/{b}" for a, b in pairs)


class TestAnswer:
    def test_whoever_was_told_nothing_is_who_it_is(self, vm: VMDirectory) -> None:
        assert identity.look(vm)

    def test_an_answer(self, vm: VMDirectory, guest: Guest) -> None:
        identity.expect(vm.path, ID, TOLD)
        assert vm.is_renewing()
        assert not identity.look(vm)
        os.write(guest.says, RENEWED)
        assert identity.look(vm)
        assert not vm.is_renewing()
        assert list(vm.path.glob("renewing*")) == []
        guest.close()

    def test_what_was_told_is_told_again_until_there_is_an_answer(self, vm: VMDirectory, guest: Guest) -> None:
        """A VM that is saved meanwhile goes on in another process, which has pipes of its own."""
        assert identity.told_again(vm) == b""
        identity.expect(vm.path, ID, TOLD)
        assert (vm.path / "renewing").stat().st_mode & 0o777 == 0o600, "there is a private key in it"
        assert identity.told_again(vm) == TOLD
        os.write(guest.says, RENEWED)
        assert identity.told_again(vm) == b""
        assert not vm.is_renewing()
        guest.close()

    def test_one_that_comes_in_pieces(self, vm: VMDirectory, guest: Guest) -> None:
        """Each piece may be heard by another command."""
        identity.expect(vm.path, ID, TOLD)
        for i in range(len(RENEWED) - 2):
            os.write(guest.says, RENEWED[i : i + 1])
            assert not identity.look(VMDirectory(vm.path)), i
        os.write(guest.says, RENEWED[-2:])
        assert identity.look(VMDirectory(vm.path))
        guest.close()

    def test_another_one_s(self, vm: VMDirectory, guest: Guest) -> None:
        """What the source's guest said before it was copied."""
        identity.expect(vm.path, ID, TOLD)
        os.write(guest.says, b"login: polyvisor-renewed " + OTHER.encode() + b"\n")
        assert not identity.look(vm)
        os.write(guest.says, b"\xff\x00 noise " + RENEWED)
        assert identity.look(vm)
        guest.close()

    def test_a_guest_that_talks_without_end_does_not_fill_the_disk(self, vm: VMDirectory, guest: Guest) -> None:
        identity.expect(vm.path, ID, TOLD)
        for _ in range(50):
            os.write(guest.says, b"x" * 4096)
            assert not identity.look(vm)
        assert sum(path.stat().st_size for path in vm.path.glob("renewing*")) < 16384
        os.write(guest.says, RENEWED)
        assert identity.look(vm)
        guest.close()

    async def test_who_does_not_answer_is_told_again(
        self, vm: VMDirectory, guest: Guest, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It may have been copied before it listened."""
        identity.expect(vm.path, ID, TOLD)
        monkeypatch.setattr(VMDirectory, "alive", lambda _: True)
        monkeypatch.setattr(identity, "_AGAIN_S", 0.05)
        waiting = asyncio.ensure_future(identity.until_renewed(vm, 10, silent))
        told = b""
        while told.count(TOLD) < 2:
            await asyncio.sleep(0.01)
            with contextlib.suppress(BlockingIOError):
                told += os.read(guest.told, 1000)
        os.write(guest.says, RENEWED)
        await waiting
        assert not vm.is_renewing()
        guest.close()

    async def test_whoever_never_listens_is_not_told_without_end(
        self, vm: VMDirectory, guest: Guest, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        identity.expect(vm.path, ID, TOLD + bytes(4000))
        monkeypatch.setattr(VMDirectory, "alive", lambda _: True)
        monkeypatch.setattr(identity, "_AGAIN_S", 0.0)
        with pytest.raises(TimedOut):
            await identity.until_renewed(vm, 2, silent)
        guest.close()

    async def test_one_that_never_comes(self, vm: VMDirectory, guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
        identity.expect(vm.path, ID, TOLD)
        monkeypatch.setattr(VMDirectory, "alive", lambda _: True)
        with pytest.raises(TimedOut, match="own name and keys"):
            await identity.until_renewed(vm, 0.1, silent)
        monkeypatch.setattr(VMDirectory, "alive", lambda _: False)
        with pytest.raises(WrongState, match="has ended"):
            await identity.until_renewed(vm, 10, silent)
        assert vm.is_renewing(), "it may answer later"
        guest.close()


class TestServer:
    """The agent's shell script, as it starts SSH's server again."""

    AGENT = Path(tiny_root.__file__).with_name("data") / tiny_root.AGENT

    @pytest.mark.parametrize(("fails", "tries"), [(0, 1), (3, 4), (99, 50)])
    def test_it_is_started_until_its_port_is_free(self, tmp_path: Path, fails: int, tries: int) -> None:
        """The old one has the port until it has ended; one that can't be started at all is given up."""
        text = self.AGENT.read_text().replace("/etc/dropbear", str(tmp_path)).replace("/run", str(tmp_path))
        (tmp_path / "dropbear.pid").write_text("1\n")
        (tmp_path / "tried").write_text("")
        server = text[text.index("host_key() {") : text.index("addresses() {")]
        fakes = f"""
            kill() {{ echo "$1" >{tmp_path}/killed; }}
            sleep() {{ :; }}
            dropbear() {{ echo . >>{tmp_path}/tried; [ $(wc -l <{tmp_path}/tried) -gt {fails} ]; }}
        """
        subprocess.run(["sh", "-c", f"{fakes}\ndropbear='\\101'\n{server}\nhost_key"], check=True)
        assert (tmp_path / "host_key").read_text() == "A"
        assert (tmp_path / "killed").read_text() == "1\n"
        assert len((tmp_path / "tried").read_text().split()) == tries


class TestReseed:
    def test_it_is_an_executable_of_one_segment(self, tmp_path: Path) -> None:
        program = tmp_path / "reseed"
        program.write_bytes(reseed.program())
        assert len(program.read_bytes()) < 256
        header = subprocess.run(
            ["readelf", "--file-header", "--program-headers", "--wide", str(program)],
            capture_output=True,
            text=True,
            check=True,
        )
        assert header.stderr == "", "readelf warns of what it does not understand"
        assert "EXEC (Executable file)" in header.stdout
        assert "Advanced Micro Devices X86-64" in header.stdout
        assert [line.split()[0] for line in header.stdout.splitlines() if " R E " in line] == ["LOAD"]

    def test_it_asks_the_kernel(self, tmp_path: Path) -> None:
        """Root may; anybody else is refused with EPERM, which it returns."""
        program = tmp_path / "reseed"
        program.write_bytes(reseed.program())
        program.chmod(0o755)
        tmp_path.chmod(0o755)
        allowed = subprocess.run([str(program)], check=False).returncode
        assert allowed == (0 if os.geteuid() == 0 else 1)
        if os.geteuid() == 0:
            path = os.open(program, os.O_RDONLY)
            refused = subprocess.run([f"/proc/self/fd/{path}"], user=65534, pass_fds=[path], check=False)
            os.close(path)
            assert refused.returncode == 1

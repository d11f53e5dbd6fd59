"""What another host sends as a VM is believed in nothing: every lie is refused, and nothing of it stays."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyvisor.errors import ConnectionLost, ImageRefused, NotFound, PolyvisorError, WrongState
from polyvisor.host import moving
from polyvisor.host.parcel import Parcel, data_bytes, packed, parse
from polyvisor.remote.transfer import copy_image
from tests.unit.disks import MIB, qemu_img
from tests.unit.moved import Machine, made, offered
from tests.unit.specs import QUICK

HEAD = len(b"polyvisor parcel 1\n")
Change = Callable[[dict[str, Any]], object]


@pytest.fixture
async def source(tmp_path: Path) -> Machine:
    machine = Machine(tmp_path / "a")
    await made(machine, tmp_path / "scratch")
    return machine


@pytest.fixture
async def target(source: Machine, tmp_path: Path) -> Machine:
    """A host that has the image, and lacks nothing but the VM."""
    machine = Machine(tmp_path / "b")
    await copy_image(source, "full", machine)
    return machine


def disk(host: Machine, number: int) -> Path:
    return host.home.vms / f"web/disks/disk{number}.qcow2"


async def given_out(source: Machine, target: Machine) -> bytes:
    """The parcel of the VM as it is now."""
    cargo, move = await offered(source, target)
    _, paths = await moving.loaded(source, source.store.get("web"))
    return b"".join(packed(move, cargo, paths))


def opened(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The manifest of a parcel as plain data, and what comes after it."""
    [length] = struct.unpack_from(">I", data, HEAD)
    return json.loads(data[HEAD + 4 : HEAD + 4 + length]), data[HEAD + 4 + length :]


def closed(manifest: object, rest: bytes) -> bytes:
    text = manifest if isinstance(manifest, bytes) else json.dumps(manifest).encode()
    return b"polyvisor parcel 1\n" + struct.pack(">I", len(text)) + text + rest


async def arrive(target: Machine, data: bytes, *, size: int = 100_003) -> None:
    async def chunks() -> AsyncGenerator[bytes]:
        for i in range(0, len(data), size):
            yield data[i : i + size]

    await target.arrive(chunks)


async def refusal(target: Machine, data: bytes, kind: type[PolyvisorError] = ImageRefused) -> str:
    """Why a parcel is refused; nothing of it stays."""
    with pytest.raises(kind) as caught:
        await arrive(target, data)
    assert caught.value.message.isprintable()
    assert list(target.home.vms.iterdir()) == []
    assert not any(target.home.locks.iterdir())
    return caught.value.message


async def test_what_is_sound_arrives(source: Machine, target: Machine) -> None:
    data = await given_out(source, target)
    await arrive(target, data)
    with pytest.raises(WrongState, match="arriving"):
        await target.start("web")
    files = target.files("web")
    await arrive(target, data[: HEAD + 4] + data[HEAD + 4 :], size=7_777)
    assert target.files("web") == files, "it is there already"


@pytest.mark.parametrize("size", [1, 1 << 22])
async def test_however_it_is_cut(source: Machine, target: Machine, size: int) -> None:
    """In whatever pieces it comes."""
    for number in (0, 1):
        qemu_img("create", "-f", "qcow2", disk(source, number), f"{number + 1}G")
    qemu_img("rebase", "-u", "-f", "qcow2", "-b", "/nowhere", "-F", "qcow2", disk(source, 0))
    data = await given_out(source, target)
    await arrive(target, data, size=max(size, len(data) // 20_000))
    assert target.store.names() == ["web"]


async def test_what_is_sent_is_what_was_announced(source: Machine, target: Machine) -> None:
    """File systems change their mind about what is a hole: here one becomes data once the manifest is out."""
    cargo, move = await offered(source, target)
    _, paths = await moving.loaded(source, source.store.get("web"))
    path = dict(paths)["disks/disk1.qcow2"]
    with path.open("r+b") as file:
        file.truncate(8 * MIB)
    held = path.stat().st_blocks
    parcel = packed(move, cargo, paths)
    manifest = next(parcel)
    with path.open("r+b") as file:
        file.seek(4 * MIB)
        file.write(b"\1" * MIB)
    await arrive(target, manifest + b"".join(parcel))
    assert disk(target, 1).stat().st_blocks <= held < path.stat().st_blocks


async def test_room_for_what_a_file_has_reserved(tmp_path: Path) -> None:
    """What is a hole as long as nobody reads it is data afterwards, on some file systems."""
    with (tmp_path / "a").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, MIB)
    assert data_bytes([tmp_path / "a"]) >= MIB


async def test_it_comes_once(source: Machine, target: Machine, tmp_path: Path) -> None:
    """A command that was held up brings the same VM when it has come, was released, and has moved on."""
    data = await given_out(source, target)
    await arrive(target, data)
    _, move = await offered(source, target)
    await target.arrival_release(move)
    await target.arrival_release(move)
    with pytest.raises(WrongState, match="before"):
        await arrive(target, data)
    await target.remove("web")
    assert "before" in await refusal(target, data, WrongState)
    with pytest.raises(NotFound):
        await target.arrival_release(move)


# The manifest

MANIFESTS: dict[str, tuple[Change, str]] = {
    "no-format": (lambda m: m.pop("format"), "format"),
    "another-format": (lambda m: m.update(format=2), "format"),
    "unknown-key": (lambda m: m.update(extra=1), "unknown key"),
    "no-cargo": (lambda m: m.pop("cargo"), "missing"),
    "no-move": (lambda m: m.pop("move"), "missing"),
    "token": (lambda m: m["move"].update(token="../../x"), "not a UUID"),
    "name-is-a-path": (lambda m: m["move"].update(new_name="../x"), "not a VM name"),
    "another-vm": (lambda m: m["move"].update(vm_id="0" * 8 + "-0000-0000-0000-" + "0" * 12), "another VM"),
    "another-name": (lambda m: m["cargo"]["spec"].update(name="other"), "another VM"),
    "id": (lambda m: m["cargo"].update(id="x/../y"), "not a UUID"),
    "no-time": (lambda m: m["cargo"].update(created_at=-1.0), "no time"),
    "memory": (lambda m: m["cargo"].update(memory_mib=1), "out of range"),
    "negative": (lambda m: m["cargo"].update(data_bytes=-1), "no size"),
    "spec": (lambda m: m["cargo"]["spec"].update(vcpus=0), "out of range"),
    "image-file": (lambda m: m["cargo"]["image"]["disk"].update(name="../../x"), "not the name of an image's file"),
    "image-text": (lambda m: m["cargo"]["image"].update(cmdline="a\nb"), "printable"),
    "file-outside": (lambda m: m["files"].append({"path": "../x", "size": 1, "data": 1}), "not a file of such a VM"),
    "file-absolute": (lambda m: m["files"][0].update(path="/etc/passwd"), "not a file of such a VM"),
    "file-of-ours": (lambda m: m["files"][0].update(path="vm.json"), "not a file of such a VM"),
    "note": (lambda m: m["files"][0].update(path="move.json"), "not a file of such a VM"),
    "seed": (lambda m: m["files"][0].update(path="disks/seed.iso"), "not a file of such a VM"),
    "twice": (lambda m: m["files"].append(m["files"][0]), "not a file of such a VM"),
    "missing": (lambda m: m["files"].pop(0), "missing"),
    "a-disk-too-many": (
        lambda m: m["files"].append({"path": "disks/disk2.qcow2", "size": 1, "data": 1}),
        "not a file of such a VM",
    ),
    "negative-size": (lambda m: m["files"][0].update(size=-1), "absurd"),
    "more-data-than-size": (lambda m: m["files"][0].update(size=1, data=2), "absurd"),
    "absurd-disk": (lambda m: m["files"][0].update(size=1 << 62), "absurd"),
    "large-key": (lambda m: m["files"][2].update(size=1 << 20, data=1 << 20), "absurd"),
    "more-than-announced": (lambda m: m["cargo"].update(data_bytes=1), "less than"),
}


@pytest.mark.parametrize("name", MANIFESTS)
async def test_a_manifest_that_lies(source: Machine, target: Machine, name: str) -> None:
    change, said = MANIFESTS[name]
    manifest, rest = opened(await given_out(source, target))
    change(manifest)
    assert said in await refusal(target, closed(manifest, rest))


async def test_an_image_that_is_not_here(source: Machine, target: Machine) -> None:
    manifest, rest = opened(await given_out(source, target))
    manifest["cargo"]["image"]["cmdline"] = "other"
    await refusal(target, closed(manifest, rest), PolyvisorError)


async def test_another_host_than_this(source: Machine, target: Machine) -> None:
    manifest, rest = opened(await given_out(source, target))
    manifest["move"]["target_id"] = manifest["move"]["source_id"]
    assert "another host" in await refusal(target, closed(manifest, rest), WrongState)


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"{", b'{"format":1,"format":1}', b"\xff", b'{"format":NaN}', b"[" * 9999]
)
async def test_a_manifest_that_is_none(target: Machine, text: bytes) -> None:
    await refusal(target, closed(text, b""))


async def test_what_is_no_parcel(target: Machine) -> None:
    assert "not one" in await refusal(target, b"#!/bin/sh\n" * 99)
    huge = b"polyvisor parcel 1\n" + struct.pack(">I", 0xFFFFFFFF)
    assert "absurd" in await refusal(target, huge + bytes(99))


@given(st.recursive(st.none() | st.integers() | st.text(max_size=9), lambda i: st.dictionaries(st.text(max_size=9), i)))
@QUICK
def test_no_manifest_raises_anything_else(value: Any) -> None:
    with contextlib.suppress(PolyvisorError):
        parse(json.dumps(value).encode())


# The stream


async def test_what_breaks_off(source: Machine, target: Machine) -> None:
    data = await given_out(source, target)
    for length in (0, 5, HEAD + 2, HEAD + 99, len(data) // 2, len(data) - 30, len(data) - 1):
        await refusal(target, data[:length], ConnectionLost)


async def test_what_is_damaged(source: Machine, target: Machine) -> None:
    data = await given_out(source, target)
    _, rest = opened(data)
    begin = len(data) - len(rest)
    for place in (begin + 16 + 70_000, len(data) - len(b"polyvisor parcel ends\n") - 1):
        changed = bytearray(data)
        changed[place] ^= 1
        assert "damaged" in await refusal(target, bytes(changed))
    assert "no end" in await refusal(target, data[:-5] + b"-----")


@pytest.mark.parametrize(
    ("offset", "length"), [(1 << 63, 16), (0, 1 << 63), ((1 << 64) - 1, (1 << 64) - 1), (1 << 40, 5), (0, 1 << 31)]
)
async def test_extents_that_lead_elsewhere(source: Machine, target: Machine, offset: int, length: int) -> None:
    manifest, rest = opened(await given_out(source, target))
    lie = struct.pack(">QQ", offset, length)
    assert "announced" in await refusal(target, closed(manifest, lie + rest[16:]))


async def test_extents_that_go_back(tmp_path: Path, source: Machine, target: Machine) -> None:
    manifest, rest = opened(await given_out(source, target))
    twice = struct.pack(">QQ", 0, 16) + bytes(16)
    assert "announced" in await refusal(target, closed(manifest, twice + twice + rest))


async def test_an_end_elsewhere(source: Machine, target: Machine) -> None:
    manifest, rest = opened(await given_out(source, target))
    assert "end was announced" in await refusal(target, closed(manifest, struct.pack(">QQ", 1, 0) + rest))


async def test_a_file_that_is_a_link_is_not_sent(source: Machine, target: Machine) -> None:
    disk(source, 1).unlink()
    disk(source, 1).symlink_to("/etc/passwd")
    with pytest.raises(PolyvisorError, match=r"disk1\.qcow2"):
        await given_out(source, target)


# The disks


async def test_a_backing_file_is_ours_whatever_the_disk_says(source: Machine, target: Machine, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(bytes(MIB))
    qemu_img("rebase", "-u", "-f", "qcow2", "-b", tmp_path / "secret", "-F", "raw", disk(source, 0))
    await arrive(target, await given_out(source, target))
    image = target.images.store.get("full")
    assert image.disk is not None
    ours = str(target.images.store.file(image, image.disk)).encode()
    head = disk(target, 0).read_bytes()[:65536]
    assert str(tmp_path / "secret").encode() not in head[: head.index(ours)]
    offset, length = struct.unpack_from(">QI", head, 8)
    assert head[offset : offset + length] == ours


@pytest.mark.parametrize("number", [0, 1])
async def test_a_data_file(source: Machine, target: Machine, tmp_path: Path, number: int) -> None:
    size = f"{number + 1}G"
    option = f"data_file={tmp_path}/secret,data_file_raw=on"
    qemu_img("create", "-f", "qcow2", "-o", option, disk(source, number), size)
    assert "data file" in await refusal(target, await given_out(source, target))


async def test_a_backing_file_of_a_blank_disk(source: Machine, target: Machine, tmp_path: Path) -> None:
    qemu_img("create", "-f", "raw", tmp_path / "secret", "2G")
    qemu_img("create", "-f", "qcow2", "-b", tmp_path / "secret", "-F", "raw", disk(source, 1), "2G")
    assert "backing file" in await refusal(target, await given_out(source, target))


async def test_disks_that_are_none(source: Machine, target: Machine) -> None:
    good = disk(source, 1).read_bytes()
    for content, said in (
        (b"", "not a qcow2 disk"),
        (b"/etc/passwd\n" * 99, "not a qcow2 disk"),
        (good[:100], "truncated|past its end|cut off"),
        (good[:4] + b"\0\0\0\x09" + good[8:], "version 9"),
        (good[:32] + struct.pack(">I", 1) + good[36:], "encrypted"),
    ):
        disk(source, 1).write_bytes(content)
        message = await refusal(target, await given_out(source, target))
        assert any(each in message for each in said.split("|")), message


async def test_a_disk_of_another_size(source: Machine, target: Machine) -> None:
    qemu_img("resize", "-f", "qcow2", disk(source, 1), "3G")
    assert "where the VM has one of" in await refusal(target, await given_out(source, target))


async def test_a_disk_with_snapshots(source: Machine, target: Machine) -> None:
    qemu_img("snapshot", "-c", "one", disk(source, 1))
    assert "snapshots" in await refusal(target, await given_out(source, target))


async def test_a_disk_whose_tables_lead_astray(source: Machine, target: Machine) -> None:
    data = bytearray(disk(source, 1).read_bytes())
    [table] = struct.unpack_from(">Q", data, 40)
    struct.pack_into(">Q", data, table, (1 << 63) | (1 << 50))
    disk(source, 1).write_bytes(data)
    await refusal(target, await given_out(source, target))


# The keys


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("ssh/host_key", b""),
        ("ssh/host_key", b"\xff\xfe"),
        ("ssh/host_key", b"-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n-----END OPENSSH PRIVATE KEY-----\n"),
        ("ssh/host_key.pub", b"ssh-ed25519 AAAA\nweb ssh-rsa BBBB\n"),
        ("ssh/host_key.pub", b"* ssh-ed25519 AAAA"),
        ("ssh/host_key.pub", b"@cert-authority * ssh-ed25519 AAAA"),
        ("ssh/login", b"#!/bin/sh"),
    ],
)
async def test_keys_that_are_none(source: Machine, target: Machine, file: str, content: bytes) -> None:
    directory = source.home.vms / "web/ssh"
    shutil.copy(directory / "host_key", directory / "login")
    cargo, move = await offered(source, target)
    _, paths = await moving.loaded(source, source.store.get("web"))
    (source.home.vms / "web" / file).write_bytes(content)
    message = await refusal(target, b"".join(packed(move, cargo, paths)))
    assert "key" in message


async def test_a_parcel_is_read_to_its_end_only(source: Machine, target: Machine) -> None:
    data = await given_out(source, target)

    async def chunks() -> AsyncGenerator[bytes]:
        yield b""
        yield data + b"and more"

    parcel = Parcel(chunks())
    assert (await parcel.manifest()).move.name == "web"

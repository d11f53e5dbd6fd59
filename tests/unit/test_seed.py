"""What a guest is told about itself, in the two forms that guests read."""

from __future__ import annotations

import io
import os
import stat
import subprocess
import sys
from pathlib import Path

import pycdlib
import pytest
import yaml

from polyvisor.errors import NotPermitted, PolyvisorError
from polyvisor.images.seed import SeedData, initrd_seed, nocloud_files, nocloud_iso, write_seeded
from tests.unit.newc import unpack

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIMK0 jürgen😀@example.org"
DATA = SeedData(instance_id="i-1", hostname="web-1", ssh_keys=(KEY, KEY + "2\n"))


def test_initrd_seed_holds_what_the_guest_reads() -> None:
    members = unpack(initrd_seed(DATA))
    assert {path: content for path, (_, content, _) in members.items() if path.startswith("etc/polyvisor/")} == {
        "etc/polyvisor/instance-id": b"i-1\n",
        "etc/polyvisor/hostname": b"web-1\n",
        "etc/polyvisor/authorized_keys": f"{KEY}\n{KEY}2\n".encode(),
    }


def test_a_clone_is_given_another_machine_id_once() -> None:
    """By vendor data, which leave the user's own user data as they are; no other VM gets that."""
    assert nocloud_files(DATA)["vendor-data"] == b""
    seed = SeedData(instance_id="i-2", hostname="h", user_data="#!/bin/sh\n", renew=True)
    files = nocloud_files(seed)
    assert files["user-data"] == b"#!/bin/sh\n"
    assert files["vendor-data"].startswith(b"#cloud-config\n")
    [command] = yaml.safe_load(files["vendor-data"])["bootcmd"]
    assert command[:3] == ["cloud-init-per", "instance", "polyvisor-machine-id"]
    assert "systemd-machine-id-setup" in command[-1]


def test_user_data_is_readable_by_root_alone() -> None:
    seed = SeedData(instance_id="i", hostname="h", user_data="#!/bin/sh\necho ä\n")
    mode, content, _ = unpack(initrd_seed(seed))["etc/polyvisor/user-data"]
    assert mode == stat.S_IFREG | 0o600
    assert content.decode() == seed.user_data


@pytest.mark.parametrize("length", range(5))
def test_a_seed_follows_an_initrd_at_a_multiple_of_four(tmp_path: Path, length: int) -> None:
    (tmp_path / "initrd").write_bytes(b"x" * length)
    write_seeded(tmp_path / "initrd", DATA, tmp_path / "seeded")
    whole = (tmp_path / "seeded").read_bytes()
    assert whole.startswith(b"x" * length)
    assert whole.endswith(initrd_seed(DATA))
    assert (len(whole) - len(initrd_seed(DATA))) % 4 == 0


def test_initrd_seed_needs_the_standard_library_alone() -> None:
    """`polyvisor run tiny` imports it: nothing slow may come along."""
    code = (
        "import sys; from polyvisor.images.seed import SeedData, initrd_seed;"
        "initrd_seed(SeedData(instance_id='i', hostname='h'));"
        "print(sorted({'pycdlib', 'yaml', 'rich', 'qemu', 'asyncio'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def read_iso(path: Path) -> dict[str, bytes]:
    iso = pycdlib.PyCdlib()
    iso.open(str(path))
    files: dict[str, bytes] = {}
    for child in iso.list_children(joliet_path="/"):
        if child.is_file():
            name = child.file_identifier().decode("utf-16_be")
            for kind in ("joliet_path", "rr_path"):
                out = io.BytesIO()
                iso.get_file_from_iso_fp(out, **{kind: f"/{name}"})
                assert files.setdefault(name, out.getvalue()) == out.getvalue()
    iso.close()
    return files


def test_nocloud_iso(tmp_path: Path) -> None:
    path = tmp_path / "seed.iso"
    nocloud_iso(DATA, path)
    raw = path.read_bytes()
    assert raw[0x8001:0x8006] == b"CD001"
    assert raw[0x8028:0x8048].rstrip() == b"cidata"  # what blkid calls the label
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    files = read_iso(path)
    assert files == nocloud_files(DATA)
    assert yaml.safe_load(files["meta-data"]) == {
        "instance-id": "i-1",
        "local-hostname": "web-1",
        "public-keys": [KEY, KEY + "2"],
    }
    assert files["user-data"].startswith(b"#cloud-config\n")
    assert yaml.safe_load(files["user-data"])["ssh_authorized_keys"] == [KEY, KEY + "2"]


def test_the_users_own_user_data_is_kept_and_keys_go_by_meta_data(tmp_path: Path) -> None:
    own = "#cloud-config\npackages: [vim]\n"
    nocloud_iso(SeedData(instance_id="i", hostname="h", ssh_keys=(KEY,), user_data=own), tmp_path / "s.iso")
    files = read_iso(tmp_path / "s.iso")
    assert files["user-data"].decode() == own
    assert yaml.safe_load(files["meta-data"])["public-keys"] == [KEY]


def test_no_keys_no_key_fields() -> None:
    files = nocloud_files(SeedData(instance_id="i", hostname="h"))
    assert "public-keys" not in yaml.safe_load(files["meta-data"])
    assert "ssh_authorized_keys" not in yaml.safe_load(files["user-data"])


def test_a_seed_that_cannot_be_written_says_where(tmp_path: Path) -> None:
    with pytest.raises(PolyvisorError, match=r"seed disk s\.iso"):
        nocloud_iso(DATA, tmp_path / "missing" / "s.iso")
    if os.geteuid() != 0:
        tmp_path.chmod(0o500)
        with pytest.raises(NotPermitted):
            nocloud_iso(DATA, tmp_path / "s.iso")

"""How a VM's identity reaches its guest at first boot: host name, SSH keys and user data.

`initrd_seed` is for images that boot from an initrd of ours (`Seed.INITRD`): a small cpio archive that is appended to
the initrd when a VM starts, which works wherever an initrd does (QEMU, Xen PV, PVH and HVM) and needs no disk.
`nocloud_iso` is for images with cloud-init (`Seed.NOCLOUD`): a disk labelled `cidata`, of the NoCloud data source
(https://cloudinit.readthedocs.io/en/latest/reference/datasources/nocloud.html).
"""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

from polyvisor.files import storage_errors, write_atomic
from polyvisor.images import cpio
from polyvisor.images.hostkey import HostKey
from polyvisor.values import dataclass

DIRECTORY = "etc/polyvisor"
_VOLUME = "cidata"
# Before the services that use it; what runs by then (systemd, journald) has the new one from the next boot on.
_NEW_MACHINE_ID = "rm -f /etc/machine-id /var/lib/dbus/machine-id && systemd-machine-id-setup"


@dataclass(frozen=True, kw_only=True)
class SeedData:
    """What a guest is told about itself.

    `instance_id` differs between VMs and stays for the life of one; cloud-init does its first-boot work once per id.
    `ssh_keys` are whole lines of an authorized_keys file. `user_data` is a script (`#!…`) or, where the guest has
    cloud-init, anything that it takes (`#cloud-config` …). `host_key` is what the guest's SSH server proves itself with.
    `renew` says that its disk holds another VM's identity, of which cloud-init leaves the machine-id as it is.
    """

    instance_id: str
    hostname: str
    ssh_keys: tuple[str, ...] = ()
    user_data: str | None = None
    host_key: HostKey | None = None
    renew: bool = False


def initrd_seed(data: SeedData) -> bytes:
    """An uncompressed cpio archive of /etc/polyvisor/{instance-id,hostname,authorized_keys,host_key,user-data}.

    To be appended to the initrd at a multiple of 4 bytes: see `write_seeded`.
    """
    entries = [
        cpio.directory("etc"),
        cpio.directory(DIRECTORY),
        cpio.file(f"{DIRECTORY}/instance-id", _line(data.instance_id)),
        cpio.file(f"{DIRECTORY}/hostname", _line(data.hostname)),
        cpio.file(f"{DIRECTORY}/authorized_keys", b"".join(map(_line, data.ssh_keys)), 0o600),
    ]
    if data.host_key is not None:
        entries.append(cpio.file(f"{DIRECTORY}/host_key", data.host_key.dropbear, 0o600))
    if data.user_data is not None:
        entries.append(cpio.file(f"{DIRECTORY}/user-data", data.user_data.encode(), 0o600))
    return cpio.archive(entries)


def write_seeded(initrd: Path, data: SeedData, target: Path) -> None:
    """Write to `target`, mode 0600, `initrd` followed by the seed of one VM: what the hypervisor is given as the initrd.

    Raises OSError. An existing `target` is replaced, not written into.
    """
    target.unlink(missing_ok=True)
    fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file, initrd.open("rb") as source:
        size = os.fstat(source.fileno()).st_size
        # Within the kernel: the initrd is large beside everything else that a start has to write.
        while (done := os.lseek(fd, 0, os.SEEK_CUR)) < size:
            os.sendfile(fd, source.fileno(), done, size - done)
        file.write(bytes(-size % 4) + initrd_seed(data))


def _line(text: str) -> bytes:
    return text.strip().encode() + b"\n"


def nocloud_iso(data: SeedData, path: Path) -> None:
    """Write an ISO 9660 image (with Joliet and Rock Ridge names) for cloud-init's NoCloud to `path`, mode 0600.

    Raises StorageFull or NotPermitted. `path` never holds half an image.
    """
    with storage_errors(f"writing the seed disk {path.name}"):
        write_atomic(path, _iso(nocloud_files(data)))


def nocloud_files(data: SeedData) -> dict[str, bytes]:
    """The files of a NoCloud seed. JSON is YAML too, and its strings need no further quoting."""
    meta: dict[str, object] = {"instance-id": data.instance_id, "local-hostname": data.hostname}
    if data.ssh_keys:
        meta["public-keys"] = [key.strip() for key in data.ssh_keys]
    return {
        "meta-data": _json(meta),
        "user-data": _user_data(data),
        "vendor-data": _vendor_data(data),
    }


def _vendor_data(data: SeedData) -> bytes:
    """The host key, and a new machine-id: as vendor data they are used beside whatever user data there is.

    Absent, some versions warn. A `bootcmd` of the user's own takes the place of ours.
    """
    config: dict[str, object] = {}
    if data.host_key is not None:
        keys = {"ed25519_private": data.host_key.private, "ed25519_public": data.host_key.public}
        config["ssh_keys"] = keys
    if data.renew:
        config["bootcmd"] = [["cloud-init-per", "instance", "polyvisor-machine-id", "sh", "-c", _NEW_MACHINE_ID]]
    return b"#cloud-config\n" + _json(config) if config else b""


def _user_data(data: SeedData) -> bytes:
    """The user's own user data as it is (keys go by meta-data); without any, a cloud-config with the keys."""
    if data.user_data is not None:
        return data.user_data.encode()
    config: dict[str, object] = {"hostname": data.hostname}
    if data.ssh_keys:
        config["ssh_authorized_keys"] = [key.strip() for key in data.ssh_keys]
    return b"#cloud-config\n" + _json(config)


def _json(value: object) -> bytes:
    return json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n"


def _iso(files: dict[str, bytes]) -> bytes:
    import pycdlib

    iso = pycdlib.PyCdlib()
    iso.new(interchange_level=3, vol_ident=_VOLUME, joliet=3, rock_ridge="1.09")
    for name, content in files.items():
        iso9660 = f"/{name.upper().replace('-', '_')}.;1"
        iso.add_fp(io.BytesIO(content), len(content), iso9660, rr_name=name, joliet_path=f"/{name}")
    out = io.BytesIO()
    iso.write_fp(out)
    iso.close()
    return out.getvalue()

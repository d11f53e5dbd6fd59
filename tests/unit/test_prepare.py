"""What a VM's directory holds before it starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from polyvisor.errors import InvalidInput
from polyvisor.home import Home
from polyvisor.host.prepare import FIRST_USER, LOG_KEPT, LOG_LIMIT, check_disk_sizes, new_user, shorten_log
from polyvisor.images.image import Image, ImageFile
from polyvisor.spec.vm import Disk, VMSpec


def test_a_long_log_keeps_its_end_from_a_whole_line_on(tmp_path: Path) -> None:
    log = tmp_path / "console.log"
    lines = [b"%09d\n" % i for i in range(LOG_LIMIT // 10 + 1)]
    log.write_bytes(b"".join(lines))
    shorten_log(log)
    kept = log.read_bytes()
    assert LOG_KEPT - 10 <= len(kept) <= LOG_KEPT
    assert b"".join(lines).endswith(kept)
    assert len(kept) % 10 == 0


def test_a_short_log_stays(tmp_path: Path) -> None:
    log = tmp_path / "console.log"
    log.write_bytes(b"x" * LOG_LIMIT)
    shorten_log(log)
    assert log.stat().st_size == LOG_LIMIT


def test_a_link_in_place_of_the_log_is_not_followed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_bytes(b"x" * (LOG_LIMIT + 1))
    (tmp_path / "console.log").symlink_to(precious)
    shorten_log(tmp_path / "console.log")
    assert precious.stat().st_size == LOG_LIMIT + 1


def test_users_are_never_given_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    numbers = [new_user(Home(tmp_path)) for _ in range(3)]
    assert numbers == [FIRST_USER, FIRST_USER + 1, FIRST_USER + 2]


def test_without_root_vms_run_as_their_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert new_user(Home(tmp_path)) is None


@pytest.mark.parametrize(("asked", "fits"), [(None, True), (3, True), (2, True), (1, False)])
def test_the_first_disk_holds_the_image(asked: int | None, fits: bool) -> None:
    disk = ImageFile(name="disk.qcow2", sha256="", size=0)
    image = Image(id="i", name="n", created_at=0, source="", disk=disk, disk_size_mib=2048)
    spec = VMSpec(name="a", image="n", disks=(Disk(size_gib=asked),))
    if fits:
        check_disk_sizes(spec, image)
    else:
        with pytest.raises(InvalidInput, match=r"disks\[0\].size_gib"):
            check_disk_sizes(spec, image)

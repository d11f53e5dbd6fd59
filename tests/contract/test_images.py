"""What every host does with images."""

import contextlib
from pathlib import Path

import pytest

from polyvisor.errors import NotFound
from polyvisor.host.api import HostApi
from polyvisor.host.host import Host
from polyvisor.images.inspection.findings import Boots
from polyvisor.images.portable import exported_size


async def test_an_image_is_exported_whole_and_can_be_taken_in(api: HostApi, tmp_path: Path) -> None:
    image = (await api.image_show("tiny")).image
    with (tmp_path / "file").open("wb") as file:
        async for chunk in api.image_export("tiny"):
            file.write(chunk)
    assert (tmp_path / "file").stat().st_size == exported_size(image)
    assert (await Host(tmp_path / "home").image_import(str(tmp_path / "file"))).same_as(image)


async def test_an_image_is_inspected(api: HostApi) -> None:
    """`tiny` has no disk, so no firmware boots it; everything else does."""
    verdicts = {verdict.target.value: verdict for verdict in (await api.image_inspect("tiny")).verdicts}
    assert {target for target, verdict in verdicts.items() if verdict.boots is Boots.YES} == {
        "qemu-pvh", "xen-pv", "xen-pvh", "xen-hvm",
    }  # fmt: skip
    for target in ("qemu-hvm-bios", "qemu-hvm-uefi"):
        assert (verdicts[target].boots, verdicts[target].reason) == (Boots.NO, "it has no disk to boot from")
    with pytest.raises(NotFound, match="'nothing'"):
        await api.image_inspect("nothing")


async def test_whoever_wants_no_more_of_it_may_stop(api: HostApi) -> None:
    async with contextlib.aclosing(api.image_export("tiny")) as chunks:
        assert await anext(chunks)
    assert (await api.image_show("tiny")).current


async def test_an_image_that_is_not_there_is_not_exported(api: HostApi) -> None:
    with pytest.raises(NotFound, match="'nothing'"):
        await anext(api.image_export("nothing"))

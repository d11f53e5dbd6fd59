"""VMs that begin with the memory of a template: each a VM of its own, at any time, ready ones first."""

from __future__ import annotations

import pytest

from polyvisor.errors import AlreadyExists, InvalidInput, NotFound, WrongState
from polyvisor.host.api import HostApi
from polyvisor.status import VMState
from tests.contract.guest import BOOT_S, guest, needs

pytestmark = [pytest.mark.qemu]
forks = pytest.mark.usefixtures("forking")  # a mark of this module would be lost where its tests are imported

SELF = "hostname; cat /etc/machine-id /proc/sys/kernel/random/uuid; sha256sum /etc/dropbear/host_key"
BOOT_ID = "cat /proc/sys/kernel/random/boot_id"


@pytest.fixture
async def forking(api: HostApi) -> None:
    await needs(api, "fork")


@pytest.mark.inside
@forks
async def test_vms_begin_from_a_template(api: HostApi, booted: str) -> None:
    """Ready or not, they have the memory of then and an identity of their own; the template outlives its source."""
    before = await guest(api, booted, BOOT_ID)
    await guest(api, booted, "echo kept >/tmp/file")
    template = await api.template_create("base", booted)
    assert (template.name, template.source, template.warm) == ("base", booted, ())
    assert template.size_bytes > 1 << 20
    with pytest.raises(AlreadyExists):
        await api.template_create("base", booted)
    assert (await api.show(booted)).status.state is VMState.RUNNING
    await api.kill(booted)

    assert (await api.template_warm("base", 1)).warm == ("base-1",)
    assert [status.name for status in await api.vms()] == [booted], "what is ready is no VM so far"
    forked = await api.run_from("base", number=2)
    assert [status.name for status in forked.forks] == ["base-1", "base-2"]
    assert forked.same_identity is None
    assert (await api.template_list())[0].warm == ()
    names = [*(status.name for status in forked.forks), "other"]
    assert (await api.run_from("base", ["other"])).forks[0].state is VMState.RUNNING
    seen = []
    for name in names:
        await api.wait_for_ssh(name, timeout_s=BOOT_S)
        assert await guest(api, name, f"{BOOT_ID}; cat /tmp/file") == f"{before}\nkept"
        seen.append((await guest(api, name, SELF)).split("\n"))
        assert seen[-1][0] == name
    assert all(len(set(column)) == len(names) for column in zip(*seen, strict=True)), seen

    with pytest.raises(AlreadyExists):
        await api.run_from("base", ["other"])
    await api.template_remove("base")
    assert await api.template_list() == []
    assert await guest(api, "base-1", "cat /tmp/file") == "kept"
    for name in names:
        await api.remove(name, force=True)


@pytest.mark.inside
@forks
async def test_what_is_ready_goes_with_its_template(api: HostApi, booted: str) -> None:
    await api.template_create("base", booted)
    assert (await api.template_warm("base", 2)).warm == ("base-1", "base-2")
    assert (await api.template_warm("base", 1)).warm == ("base-1",)
    assert set((await api.template_warm("base", names=["mine"])).warm) == {"base-1", "mine"}
    image = (await api.show(booted)).spec.image
    with pytest.raises(WrongState, match="template base"):
        await api.image_remove(image)
    await api.template_remove("base")
    with pytest.raises(NotFound):
        await api.run_from("base", ["mine"])
    assert [status.name for status in await api.vms()] == [booted]


@forks
async def test_wherever_the_guest_is(api: HostApi, running: str) -> None:
    """Whether it has booted or not: all that a host says of it comes back."""
    forked = await api.fork(running, ["one", "two"])
    assert [(status.name, status.state) for status in forked.forks] == [
        (name, VMState.RUNNING) for name in ("one", "two")
    ]
    assert forked.pause_s < forked.copy_s
    used = await api.memory_use(["one", "two"])
    assert sorted(used) == ["one", "two"]
    assert used["one"].own_mib > 1
    await api.template_create("base", running)
    assert (await api.template_warm("base", names=["three"])).warm == ("three",)
    assert (await api.run_from("base", ["three"])).forks[0].state is VMState.RUNNING
    await api.template_remove("base")
    for name in ("one", "two", "three"):
        await api.remove(name, force=True)


@forks
async def test_what_can_not_be_is_refused(api: HostApi, spec: object, running: str) -> None:
    with pytest.raises(NotFound, match="template"):
        await api.run_from("nowhere")
    with pytest.raises(NotFound, match="template"):
        await api.template_remove("nowhere")
    with pytest.raises(NotFound, match="VM"):
        await api.template_create("base", "nowhere")
    with pytest.raises(InvalidInput):
        await api.template_create("a/b", running)
    await api.kill(running)
    with pytest.raises(WrongState, match="stopped"):
        await api.template_create("base", running)
    assert await api.template_list() == []

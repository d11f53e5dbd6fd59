"""Events: what happened between two looks at the VMs."""

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import pytest

from polyvisor.host.api import HostApi
from polyvisor.host.watch import changes, compared
from polyvisor.spec.forward import Forward
from polyvisor.status import VMState, VMStatus

RUNNING = VMStatus(
    name="a", id="1", state=VMState.RUNNING, vcpus=1, memory_mib=128, created_at=0.0, started_at=1.0, pid=7
)
STOPPED = replace(RUNNING, state=VMState.STOPPED, started_at=None, pid=None)


@pytest.mark.parametrize(
    ("old", "new", "events"),
    [
        (None, STOPPED, ["created", "stopped"]),
        (None, RUNNING, ["created", "running"]),
        (RUNNING, None, ["removed"]),
        (RUNNING, RUNNING, []),
        (STOPPED, RUNNING, ["running"]),
        (RUNNING, replace(RUNNING, state=VMState.PAUSED), ["paused"]),
        (RUNNING, replace(STOPPED, state=VMState.CRASHED, reason="out of memory"), ["crashed: out of memory"]),
        (RUNNING, replace(RUNNING, started_at=2.0), ["restarted"]),
        (RUNNING, replace(RUNNING, id="2"), ["removed", "created", "running"]),
        (
            RUNNING,
            replace(RUNNING, forwards=(Forward(host_port=1, guest_port=2),)),
            ["forwards-changed: 127.0.0.1:1:2"],
        ),
    ],
)
def test_what_happened(old: VMStatus | None, new: VMStatus | None, events: list[str]) -> None:
    found = list(compared({"a": old} if old else {}, {"a": new} if new else {}, 5.0))
    assert [f"{e.event}: {e.detail}" if e.detail else e.event for e in found] == events
    assert all((e.vm, e.at) == ("a", 5.0) for e in found)


def test_machines_are_told_apart_in_order_of_their_names() -> None:
    b = replace(STOPPED, name="b", id="2")
    assert [e.vm for e in compared({"b": b}, {"a": RUNNING}, 0.0)] == ["a", "a", "b"]


async def test_looks_are_compared_until_nobody_listens() -> None:
    class Fake:
        looks = iter([[STOPPED], [STOPPED], [RUNNING, replace(RUNNING, name="b")], [RUNNING]])

        async def vms(self) -> Sequence[VMStatus]:
            return next(self.looks)

    events = changes(cast("HostApi", Fake()), ["a"], period_s=0.001)
    event = await anext(events)
    assert (event.vm, event.event) == ("a", "running")
    await events.aclose()  # type: ignore[attr-defined]

"""The verbs of `Host` by which VMs move between hosts; what they do is in `moving.py` (out) and `arrival.py` (in)."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Callable
from typing import TYPE_CHECKING, cast

from polyvisor.host import moves
from polyvisor.host.moves import Cargo, Landing, Move, Parting
from polyvisor.status import VMStatus

if TYPE_CHECKING:
    from polyvisor.host.host import Host


class Mover:
    """A part of `Host`."""

    @property
    def _host(self) -> Host:
        return cast("Host", self)

    async def host_id(self) -> str:
        return moves.host_id(self._host.home)

    async def move_show(self, name: str) -> Parting:
        from polyvisor.host import moving

        return await moving.show(self._host, name)

    async def move_begin(self, name: str, move: Move) -> None:
        from polyvisor.host import moving

        await moving.begin(self._host, name, move)

    async def parcel(self, name: str, token: str) -> AsyncGenerator[bytes]:
        from polyvisor.host import moving

        async with contextlib.aclosing(moving.give_out(self._host, name, token)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def move_finish(self, name: str, token: str) -> None:
        from polyvisor.host import moving

        await moving.finish(self._host, name, token)

    async def move_cancel(self, name: str, token: str, *, done: bool = False) -> None:
        from polyvisor.host import moving

        await moving.cancel(self._host, name, token, done=done)

    async def arrival_check(self, cargo: Cargo, move: Move) -> Landing:
        from polyvisor.host import arrival

        return await arrival.check(self._host, cargo, move)

    async def arrive(self, chunks: Callable[[], AsyncGenerator[bytes]]) -> None:
        from polyvisor.host import arrival

        async with contextlib.aclosing(chunks()) as coming:
            await arrival.take_in(self._host, coming)

    async def arrival_release(self, move: Move) -> VMStatus:
        from polyvisor.host import arrival

        await arrival.release(self._host, move)
        return (await self._host.show(move.new_name)).status

    async def arrival_cancel(self, name: str, token: str) -> None:
        from polyvisor.host import arrival

        await arrival.discard(self._host, name, token)

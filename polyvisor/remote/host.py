"""`RemoteHost`: another machine, through its agent.

Every verb is one call. A connection that is lost in the middle of a call is opened again, and the call sent again under its
key: the host has done it, is still at it, or has never heard of it, and in each case gives the one right answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar

from polyvisor.errors import (
    ConnectionLost,
    HostKeyUnknown,
    InvalidInput,
    LoginRefused,
    PolyvisorError,
    ProtocolError,
    StorageFull,
    TimedOut,
    Unavailable,
)
from polyvisor.files import make_directory, storage_errors, write_atomic
from polyvisor.home import Home
from polyvisor.host.api import STOP_TIMEOUT_S, Details, Obtainable, SSHTarget, StoredImage
from polyvisor.host.moves import Cargo, Landing, Move, Parting
from polyvisor.host.setup.wish import Wish
from polyvisor.images.image import Image
from polyvisor.images.inspection.findings import Inspection
from polyvisor.operation import Progress, Step, silent
from polyvisor.process import run
from polyvisor.remote.address import Entry
from polyvisor.remote.archive import archive
from polyvisor.remote.connection import Connection, Stream
from polyvisor.remote.link import Link, shared_directory
from polyvisor.remote.snapshots import RemoteSnapshots
from polyvisor.remote.wire import LOOKS, Access, decode
from polyvisor.spec.forward import Forward
from polyvisor.spec.parse import convert
from polyvisor.spec.resources import Changes
from polyvisor.spec.vm import VMSpec
from polyvisor.status import (
    Check,
    DiskStatus,
    Event,
    Forked,
    HostStatus,
    MemoryUse,
    NicStatus,
    Resized,
    Setup,
    StoredTemplate,
    VMStatus,
)

T = TypeVar("T")

RECONNECT_S = 60.0
_PAUSE_S = 0.3
_CHUNK = 1 << 20
# Runs ssh on the user's terminal, so that it can ask; returns its exit status.
Ask = Callable[[list[str]], int]


class RemoteHost(RemoteSnapshots):
    """The host of `entry`; implements `HostApi`. Keys and the application for hosts are kept in `home`.

    With `accept_new` the key of a host that was never seen is taken as it is. `ask`, where there is somebody to ask, is
    called when SSH has a question (the host's key, a password).
    """

    def __init__(self, entry: Entry, home: Home, *, accept_new: bool = False, ask: Ask | None = None) -> None:
        self.entry = entry
        self.home = home
        home.prepare()
        self.link = Link(entry, shared_directory(home.path), accept_new=accept_new)
        self._ask = ask
        self._connection: Connection | None = None
        self._connecting: tuple[asyncio.AbstractEventLoop, asyncio.Lock] | None = None
        self._streams: set[Stream] = set()

    async def close(self) -> None:
        for stream in list(self._streams):
            await self._end(stream)
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()

    async def stop_sharing(self) -> None:
        """Let the next connection be a new one, which shows whether key and login are right as they are now."""
        if argv := self.link.stop_sharing():
            await run(argv, check=False)

    # Calls

    async def connect(self) -> Connection:
        """The connection, opened where there is none; raises what is wrong with the host."""
        if self._connection is not None and self._connection.usable:
            return self._connection
        async with self._lock():
            if self._connection is None or not self._connection.usable:
                stale, self._connection = self._connection, None
                if stale is not None and stale.loop is asyncio.get_running_loop():
                    await stale.close()
                self._connection = await self._asked(
                    lambda: Connection.open(self.link, self._archive(), self.entry.home)
                )
            return self._connection

    def _lock(self) -> asyncio.Lock:
        """One lock for each event loop, so that two calls at once open one connection."""
        loop = asyncio.get_running_loop()
        if self._connecting is None or self._connecting[0] is not loop:
            self._connecting = loop, asyncio.Lock()
        return self._connecting[1]

    async def _asked(self, connect: Callable[[], Any]) -> Any:
        """What `connect` returns; where SSH has a question and somebody can answer, it is asked first."""
        try:
            return await connect()
        except (HostKeyUnknown, LoginRefused):
            if self._ask is None or self._ask(self.link.argv("true", interactive=True)) != 0:
                raise
            return await connect()

    def _archive(self) -> Path:
        return archive(self.home.cache / "application")

    async def _call(self, kind: type[T], method: str, progress: Progress = silent, /, **arguments: Any) -> T:
        """The result, of type `kind`, of a verb that is done once, whatever becomes of the connection meanwhile."""
        key = None if method in LOOKS else str(uuid.uuid4())

        async def call(connection: Connection) -> Any:
            return await connection.call(method, arguments, key=key, progress=progress)

        return self._typed(kind, method, await self._again(method, call, progress))

    async def _again(self, method: str, work: Callable[[Connection], Awaitable[T]], progress: Progress) -> T:
        """What `work` returns, begun again where the connection is lost meanwhile; raises ConnectionLost after a minute."""
        lost_at: float | None = None
        while True:
            failure: PolyvisorError
            try:
                connection = await self.connect()
            except (Unavailable, TimedOut) as error:
                if lost_at is None:
                    raise
                failure = error
            else:
                try:
                    return await work(connection)
                except ConnectionLost as error:
                    lost_at = lost_at or time.monotonic()
                    failure = error
            lasting = time.monotonic() - lost_at
            if lasting > RECONNECT_S:
                raise self._given_up(method, failure) from failure
            progress(Step("reconnecting", int(lasting), int(RECONNECT_S), "s"))
            await asyncio.sleep(_PAUSE_S)

    def _given_up(self, method: str, error: PolyvisorError) -> PolyvisorError:
        return ConnectionLost(
            f"host '{self.entry.name}': the connection was lost during '{method}', and it can't be reached: {error.message}",
            hint=f"what was begun there goes on; look again: polyvisor --host {self.entry.name} ls",
        )

    def _typed(self, kind: type[T], method: str, raw: object) -> T:
        try:
            result: T = convert(raw, kind, method)
        except InvalidInput as error:
            raise ProtocolError(f"host '{self.entry.name}' answered what is no answer: {error.message}") from error
        return result

    @contextlib.asynccontextmanager
    async def _stream(self, kind: str, **arguments: object) -> AsyncIterator[Stream]:
        stream = await self._opened(kind, **arguments)
        try:
            yield stream
        finally:
            await self._end(stream)

    async def _opened(self, kind: str, **arguments: object) -> Stream:
        stream: Stream = await self._asked(
            lambda: Stream.open(self.link, self._archive(), self.entry.home, kind, **arguments)
        )
        self._streams.add(stream)
        return stream

    async def _end(self, stream: Stream) -> None:
        self._streams.discard(stream)
        await stream.close()

    # The host itself

    async def status(self) -> HostStatus:
        return await self._call(HostStatus, "status")

    async def check(self) -> list[Check]:
        return await self._call(list[Check], "check")

    async def prepare_host(self, wish: Wish, progress: Progress = silent, *, act: bool = False) -> Setup:
        return await self._call(Setup, "prepare_host", progress, wish=wish, act=act)

    # VMs

    async def create(self, spec: VMSpec, progress: Progress = silent, *, new: bool = False) -> VMStatus:
        return await self._call(VMStatus, "create", progress, spec=spec, new=new)

    async def run(self, spec: VMSpec, progress: Progress = silent, *, new: bool = False) -> VMStatus:
        return await self._call(VMStatus, "run", progress, spec=spec, new=new)

    async def names(self) -> list[str]:
        return await self._call(list[str], "names")

    async def vms(self) -> list[VMStatus]:
        return await self._call(list[VMStatus], "vms")

    async def show(self, name: str) -> Details:
        return await self._call(Details, "show", name=name)

    async def memory_use(self, names: Sequence[str] = ()) -> dict[str, MemoryUse]:
        return await self._call(dict[str, MemoryUse], "memory_use", names=list(names))

    async def start(self, name: str, progress: Progress = silent, *, fresh: bool = False) -> VMStatus:
        return await self._call(VMStatus, "start", progress, name=name, fresh=fresh)

    async def fork(self, name: str, names: Sequence[str], progress: Progress = silent) -> Forked:
        return await self._call(Forked, "fork", progress, name=name, names=list(names))

    async def template_create(self, name: str, vm: str, progress: Progress = silent) -> StoredTemplate:
        return await self._call(StoredTemplate, "template_create", progress, name=name, vm=vm)

    async def template_list(self) -> list[StoredTemplate]:
        return await self._call(list[StoredTemplate], "template_list")

    async def template_remove(self, name: str) -> None:
        await self._call(NoneType, "template_remove", name=name)

    async def template_warm(
        self, name: str, number: int = 0, names: Sequence[str] = (), progress: Progress = silent
    ) -> StoredTemplate:
        return await self._call(StoredTemplate, "template_warm", progress, name=name, number=number, names=list(names))

    async def run_from(
        self, template: str, names: Sequence[str] = (), number: int = 1, progress: Progress = silent
    ) -> Forked:
        return await self._call(Forked, "run_from", progress, template=template, names=list(names), number=number)

    async def save(self, name: str, progress: Progress = silent) -> VMStatus:
        return await self._call(VMStatus, "save", progress, name=name)

    async def stop(self, name: str, *, timeout_s: float = STOP_TIMEOUT_S, progress: Progress = silent) -> VMStatus:
        return await self._call(VMStatus, "stop", progress, name=name, timeout_s=float(timeout_s))

    async def kill(self, name: str) -> VMStatus:
        return await self._call(VMStatus, "kill", name=name)

    async def reboot(
        self, name: str, *, force: bool = False, timeout_s: float = STOP_TIMEOUT_S, progress: Progress = silent
    ) -> VMStatus:
        return await self._call(VMStatus, "reboot", progress, name=name, force=force, timeout_s=float(timeout_s))

    async def pause(self, name: str) -> VMStatus:
        return await self._call(VMStatus, "pause", name=name)

    async def resume(self, name: str) -> VMStatus:
        return await self._call(VMStatus, "resume", name=name)

    async def remove(self, name: str, *, force: bool = False) -> None:
        await self._call(NoneType, "remove", name=name, force=force)

    async def add_forward(self, name: str, forward: Forward) -> VMStatus:
        return await self._call(VMStatus, "add_forward", name=name, forward=forward)

    async def remove_forward(self, name: str, forward: Forward) -> VMStatus:
        return await self._call(VMStatus, "remove_forward", name=name, forward=forward)

    # Moving

    async def host_id(self) -> str:
        return await self._call(str, "host_id")

    async def move_show(self, name: str) -> Parting:
        return await self._call(Parting, "move_show", name=name)

    async def move_begin(self, name: str, move: Move) -> None:
        await self._call(NoneType, "move_begin", name=name, move=move)

    async def parcel(self, name: str, token: str) -> AsyncGenerator[bytes]:
        async with self._stream("parcel", name=name, token=token) as stream:
            while chunk := await stream.reader.read(_CHUNK):
                yield chunk
            await stream.check_end()

    async def move_finish(self, name: str, token: str) -> None:
        await self._call(NoneType, "move_finish", name=name, token=token)

    async def move_cancel(self, name: str, token: str, *, done: bool = False) -> None:
        await self._call(NoneType, "move_cancel", name=name, token=token, done=done)

    async def arrival_check(self, cargo: Cargo, move: Move) -> Landing:
        return await self._call(Landing, "arrival_check", cargo=cargo, move=move)

    async def arrive(self, chunks: Callable[[], AsyncGenerator[bytes]]) -> None:
        async def send(_: Connection) -> None:
            await self._pour("arrive", chunks(), lambda done: None)

        await self._again("arrive", send, silent)

    async def arrival_release(self, move: Move) -> VMStatus:
        return await self._call(VMStatus, "arrival_release", move=move)

    async def arrival_cancel(self, name: str, token: str) -> None:
        await self._call(NoneType, "arrival_cancel", name=name, token=token)

    async def set(self, name: str, changes: Changes) -> Resized:
        return await self._call(Resized, "set", name=name, changes=changes)

    # Disks and network cards

    async def disk_list(self, name: str) -> list[DiskStatus]:
        return await self._call(list[DiskStatus], "disk_list", name=name)

    async def disk_add(self, name: str, size_gib: int = 1, *, disk: str | None = None) -> list[DiskStatus]:
        return await self._call(list[DiskStatus], "disk_add", name=name, size_gib=size_gib, disk=disk)

    async def disk_grow(self, name: str, disk: str, size_gib: int) -> list[DiskStatus]:
        return await self._call(list[DiskStatus], "disk_grow", name=name, disk=disk, size_gib=size_gib)

    async def disk_remove(self, name: str, disk: str, *, force: bool = False) -> list[DiskStatus]:
        return await self._call(list[DiskStatus], "disk_remove", name=name, disk=disk, force=force)

    async def nic_list(self, name: str) -> list[NicStatus]:
        return await self._call(list[NicStatus], "nic_list", name=name)

    async def nic_add(
        self, name: str, network: str = "user", *, mac: str | None = None, nic: str | None = None
    ) -> list[NicStatus]:
        return await self._call(list[NicStatus], "nic_add", name=name, network=network, mac=mac, nic=nic)

    async def nic_remove(self, name: str, nic: str) -> list[NicStatus]:
        return await self._call(list[NicStatus], "nic_remove", name=name, nic=nic)

    # Inside the VM

    async def console(self, name: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        stream = await self._opened("console", name=name)
        return stream.reader, stream.writer

    async def log(self, name: str, *, hypervisor: bool = False, follow: bool = False) -> AsyncIterator[bytes]:
        async with self._stream("log", name=name, hypervisor=hypervisor, follow=follow) as stream:
            while chunk := await stream.reader.read(_CHUNK):
                yield chunk
            await stream.check_end()

    async def events(self, names: Sequence[str] = ()) -> AsyncIterator[Event]:
        async with self._stream("events", names=list(names)) as stream:
            while line := await stream.reader.readline():
                yield convert(decode(line).get("params"), Event, "event")
            await stream.check_end()

    async def ssh_target(self, name: str) -> SSHTarget:
        return self._target(name, await self._call(Access, "ssh_target", name=name))

    async def wait_for_ssh(self, name: str, *, timeout_s: float, progress: Progress = silent) -> SSHTarget:
        return self._target(
            name, await self._call(Access, "wait_for_ssh", progress, name=name, timeout_s=float(timeout_s))
        )

    def _target(self, name: str, access: Access) -> SSHTarget:
        """`access` with its keys in files of this machine, and a way through the connection to the host."""
        host = hashlib.sha256(self.entry.url.encode()).hexdigest()[:16]
        directory = self.home.path / "access" / host
        identity = directory / (f"{name}.identity" if access.own else "identity")
        known_hosts = directory / f"{name}.known_hosts"
        with storage_errors("keeping the guest's keys"):
            make_directory(directory, 0o700)
            write_atomic(identity, access.identity)
            if access.known_hosts or not known_hosts.exists():
                write_atomic(known_hosts, access.known_hosts)
        return SSHTarget(
            address=access.address,
            port=access.port,
            user=access.user,
            alias=access.alias,
            identity=identity,
            known_hosts=known_hosts,
            proxy=self.link.tunnel(access.address, access.port),
        )

    # Images

    async def image_list(self) -> list[StoredImage]:
        return await self._call(list[StoredImage], "image_list")

    async def image_show(self, name: str) -> StoredImage:
        return await self._call(StoredImage, "image_show", name=name)

    async def image_inspect(self, name: str, progress: Progress = silent) -> Inspection:
        return await self._call(Inspection, "image_inspect", progress, name=name)

    async def image_catalogue(self) -> list[Obtainable]:
        return await self._call(list[Obtainable], "image_catalogue")

    async def image_pull(self, name: str, progress: Progress = silent) -> Image:
        return await self._call(Image, "image_pull", progress, name=name)

    async def image_build(self, kind: str, progress: Progress = silent, **options: Any) -> Image:
        return await self._call(Image, "image_build", progress, kind=kind, **options)

    async def image_import(
        self, source: str, *, name: str | None = None, progress: Progress = silent, **options: Any
    ) -> Image:
        from polyvisor.images.download import is_url
        from polyvisor.images.importer import check_before_upload, local_path

        if not is_url(source):
            path = local_path(source)
            described = {key.removesuffix("_mib"): value for key, value in options.items() if key != "checksum"}
            check_before_upload(path, name, **described)
            source = await self._again("image_import", lambda _: self._upload(path, progress), progress)
        return await self._call(Image, "image_import", progress, source=source, name=name, **options)

    async def image_export(self, name: str) -> AsyncGenerator[bytes]:
        async with self._stream("image_export", name=name) as stream:
            while chunk := await stream.reader.read(_CHUNK):
                yield chunk
            await stream.check_end()

    async def image_receive(
        self, chunks: Callable[[], AsyncGenerator[bytes]], size: int, *, name: str, progress: Progress = silent
    ) -> Image:
        """Take in, as image `name`, an exported image of `size` bytes as it comes.

        `chunks` gives it from its beginning, and is asked again where the connection is lost on the way.
        """

        async def send(_: Connection) -> str:
            return await self._send(f"{name}.tar", size, chunks(), progress)

        source = await self._again("image_import", send, progress)
        return await self._call(Image, "image_import", progress, source=source, name=name)

    async def image_remove(self, name: str) -> None:
        await self._call(NoneType, "image_remove", name=name)

    async def _upload(self, path: Path, progress: Progress) -> str:
        """Carry a file to the host; returns the word that stands for it there, until it is imported."""
        from polyvisor.images.unpack import open_source

        with open_source(path) as file:

            async def chunks() -> AsyncGenerator[bytes]:
                while chunk := file.read(_CHUNK):
                    yield chunk

            return await self._send(path.name, os.fstat(file.fileno()).st_size, chunks(), progress)

    async def _send(self, name: str, size: int, chunks: AsyncGenerator[bytes], progress: Progress) -> str:
        """Carry `size` bytes to the host, as a file called `name`; returns the word that stands for it there."""

        def report(done: int) -> None:
            progress(Step("uploading", done, size, "B"))

        return str(await self._pour("upload", chunks, report, name=name, size=size))

    async def _pour(
        self, kind: str, chunks: AsyncGenerator[bytes], report: Callable[[int], None], **arguments: object
    ) -> Any:
        """Carry `chunks` to the host, in a stream of this `kind`; returns what it says to them."""
        async with AsyncExitStack() as stack:
            stack.push_async_callback(chunks.aclose)
            try:
                stream = await stack.enter_async_context(self._stream(kind, **arguments))
                done = 0
                with contextlib.suppress(ConnectionError):  # a host that takes no more says why
                    async for chunk in chunks:
                        stream.writer.write(chunk)
                        await stream.writer.drain()
                        done += len(chunk)
                        report(done)
                return await stream.result()
            except StorageFull:
                raise
            except (ConnectionError, Unavailable, TimedOut) as error:  # it was there when this was begun
                raise ConnectionLost(f"host '{self.entry.name}': the connection was lost while uploading") from error

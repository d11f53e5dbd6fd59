"""Images out of a host: into a file, or into the store of another host; and VMs into files.

All work with any `HostApi`. What goes to a host by SSH is sent as it is read, wherever it is read from, and takes no place on
this machine; for other hosts it goes through a temporary file.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import uuid
from collections.abc import AsyncGenerator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from polyvisor.errors import AlreadyExists, ConnectionLost, InvalidInput, NotFound
from polyvisor.files import storage_errors, sync_directory
from polyvisor.home import default_home
from polyvisor.host.api import HostApi
from polyvisor.host.host import Host
from polyvisor.images.image import Image
from polyvisor.images.portable import SUFFIX, exported_size
from polyvisor.images.store import check_image_name
from polyvisor.operation import Progress, Step, silent
from polyvisor.remote.host import RemoteHost


async def export_image(
    source: HostApi, name: str, path: Path, progress: Progress = silent, *, replacing: bool = False
) -> Image:
    """Write image `name` of host `source` into the file `path` of this machine, whole or not at all.

    Raises NotFound, AlreadyExists for a file that is there, unless it is `replacing` it, StorageFull, ConnectionLost.
    """
    _check_target(path, replacing=replacing)
    image = (await source.image_show(name)).image
    with storage_errors(f"exporting image '{name}'"), _new_file(path, replacing=replacing) as file:
        async with contextlib.aclosing(_chunks(source, image)) as chunks:
            async for chunk in chunks:
                file.write(chunk)
                progress(Step("exporting", file.tell(), exported_size(image), "B"))
    return image


async def export_vm(
    source: HostApi, name: str, path: Path, progress: Progress = silent, *, replacing: bool = False
) -> None:
    """Write VM `name` of host `source` into the file `path` of this machine, whole or not at all.

    Raises NotFound, WrongState for a VM that is not stopped, AlreadyExists as `export_image`, StorageFull, ConnectionLost.
    """
    _check_target(path, replacing=replacing)
    with storage_errors(f"exporting VM '{name}'"), _new_file(path, replacing=replacing) as file:
        async with contextlib.aclosing(source.vm_export(name)) as chunks:
            async for chunk in chunks:
                file.write(chunk)
                progress(Step("exporting", file.tell(), None, "B"))


async def copy_image(
    source: HostApi, name: str, target: HostApi, progress: Progress = silent, *, new_name: str | None = None
) -> Image:
    """Copy image `name` of host `source` to host `target`, there called `new_name` if that is given; returns it as it is there.

    Nothing is sent where the name leads to the very same image already; where it leads to another, that one stays under its
    id. Raises NotFound, InvalidInput, StorageFull, ConnectionLost.
    """
    image = (await source.image_show(name)).image
    wanted = replace(image, name=check_image_name(image.name if new_name is None else new_name))
    with contextlib.suppress(NotFound):
        if (there := (await target.image_show(wanted.name)).image).same_as(wanted):
            return there
    if isinstance(target, RemoteHost):
        size = exported_size(image)
        return await target.image_receive(lambda: _chunks(source, image), size, name=wanted.name, progress=progress)
    home = target.home if isinstance(target, Host) else default_home()
    home.prepare()
    with tempfile.TemporaryDirectory(prefix="image-", dir=home.cache) as directory:
        path = Path(directory, f"{wanted.name}{SUFFIX}")
        await export_image(source, image.id, path, progress)
        return await target.image_import(str(path), name=wanted.name, progress=progress)


async def _chunks(source: HostApi, image: Image) -> AsyncGenerator[bytes]:
    """`image` as one file, to its last byte; raises ConnectionLost where fewer came, or more."""
    left = exported_size(image)
    async with contextlib.aclosing(source.image_export(image.id)) as chunks:
        async for chunk in chunks:
            left -= len(chunk)
            if left < 0:
                break
            yield chunk
    if left:
        raise ConnectionLost(f"image '{image.name}' did not arrive as it was announced", hint="try again")


def _check_target(path: Path, *, replacing: bool) -> None:
    with storage_errors(f"writing {path}"):
        if path.is_dir():
            raise InvalidInput("output", str(path), "is a directory", hint="name a file in it")
        if path.exists() and not path.is_file():
            raise InvalidInput("output", str(path), "is not a regular file")
        if not replacing and os.path.lexists(path):
            raise AlreadyExists(f"there is a file {path} already", hint="choose another, or replace it: --force")


@contextlib.contextmanager
def _new_file(path: Path, *, replacing: bool) -> Iterator[BinaryIO]:
    """A file that is at `path` when all went well, and nowhere otherwise."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        _check_target(path, replacing=replacing)  # it may have come meanwhile
        temporary.replace(path)
        sync_directory(path.parent)
    finally:
        temporary.unlink(missing_ok=True)

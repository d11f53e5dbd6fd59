"""Frozen layers of disks: what a disk was at some moment, shared by all that stand on it.

    <home>/layers/<id>/layer.json   what it is, and what is below it
    <home>/layers/<id>/disk.qcow2   the disk that was written to until then; nobody writes to it any more

A VM writes to overlays in its own directory. Freezing one puts the very same file here, by a second name for it (nothing is
copied), and the VM gets a new, empty overlay above it. Snapshots, linked clones and forks stand on layers; a layer may stand on
another one, and at the bottom there is the VM's image, or nothing.

Nobody counts who stands on a layer: it follows from the records of VMs and snapshots, which `sweep` asks for, and what
nobody stands on is removed. Who is about to write such a record holds the layers meanwhile (`held`, `frozen`), by a lock that
the kernel drops with its holder. See docs/design/snapshots.md.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from polyvisor.errors import InvalidInput, NotFound, PolyvisorError
from polyvisor.files import make_directory, read_small, storage_errors, sync_directory, translated, write_atomic
from polyvisor.spec.parse import structure, unstructure
from polyvisor.values import dataclass

LAYER = "layer.json"
DISK = "disk.qcow2"
_FORMAT = 1
_SIZE = 24  # where a qcow2 file says how large it is to the guest: QEMU, docs/interop/qcow2.txt


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A frozen layer: `parent` is the layer below it (None: the VM's image, or nothing), `size` in bytes, as the guest sees it.

    `of` is the VM whose disk it was, by the name of then, for people alone.
    """

    id: str
    created_at: float
    of: str
    size: int
    parent: str | None = None


class LayerStore:
    """The layers in directory `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def file(self, layer_id: str) -> Path:
        return self.path / layer_id / DISK

    def get(self, layer_id: str) -> Layer:
        """The layer with this id; raises NotFound, PolyvisorError where it can't be understood."""
        try:
            raw = json.loads(read_small(f"{self.path}/{layer_id}/{LAYER}"))
            if not isinstance(raw, dict) or raw.pop("format", None) != _FORMAT:
                raise ValueError(f"it is not of format {_FORMAT}")
            return structure(raw, Layer)
        except FileNotFoundError as error:
            raise NotFound(f"layer {layer_id} is gone from {self.path}") from error
        except OSError as error:
            raise translated(error, f"reading layer {layer_id}") from error
        except (ValueError, InvalidInput) as error:
            raise PolyvisorError(f"{self.path / layer_id / LAYER} can't be understood: {error}") from error

    def ids(self) -> list[str]:
        try:
            return sorted(entry.name for entry in os.scandir(self.path) if not entry.name.startswith("."))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise translated(error, "listing the layers") from error

    def chain(self, top: str | None) -> tuple[Layer, ...]:
        """The layer `top`, the one below it, and so on down to the image; none for None."""
        found: list[Layer] = []
        while top is not None:
            found.append(layer := self.get(top))
            top = layer.parent
            if len(found) > len({each.id for each in found}):
                raise PolyvisorError(f"layer {layer.id} stands on itself", hint=f"look into {self.path}")
        return tuple(found)

    def files(self, top: str | None) -> tuple[Path, ...]:
        """The files of `chain`. A layer without one was merged into the one above it."""
        return tuple(path for layer in self.chain(top) if (path := self.file(layer.id)).exists())

    @contextlib.contextmanager
    def frozen(self, disks: Sequence[tuple[Path, str | None]], of: str) -> Iterator[tuple[Layer, ...]]:
        """Make layers of `disks`, each with the layer that it stands on, and hold them until the block ends.

        Within the block their files are still the very ones that the VM may write to; it is for the block to end that, to write
        the record that stands on them, and then to `seal` them. Those that nobody stands on afterwards are for `sweep`: what
        has failed in the block, or was cut off, may have written that record. Raises StorageFull, NotPermitted, PolyvisorError
        where the disks are on another file system.
        """
        with storage_errors(f"freezing the disks of VM '{of}'"):
            make_directory(self.path, 0o711 if os.geteuid() == 0 else 0o700)
        with contextlib.ExitStack() as locks:
            yield tuple([self._make(disk, parent, of, locks) for disk, parent in disks])

    def _make(self, disk: Path, parent: str | None, of: str, locks: contextlib.ExitStack) -> Layer:
        from tempfile import mkdtemp  # not needed by most commands

        with storage_errors(f"freezing {disk}"):
            staging = Path(mkdtemp(prefix=".new-", dir=self.path))
            try:
                locks.enter_context(_flock(staging, fcntl.LOCK_SH))
                layer = Layer(
                    id=os.urandom(12).hex(), created_at=time.time(), of=of, size=virtual_size(disk), parent=parent
                )
                self._write(staging, layer)
                _link(disk, staging / DISK, self.path)
                sync_directory(staging)
                staging.chmod(0o711 if os.geteuid() == 0 else 0o700)
                staging.rename(self.path / layer.id)
            except BaseException:
                shutil.rmtree(staging, ignore_errors=True)
                raise
            sync_directory(self.path)
        return layer

    def seal(self, *ids: str) -> None:
        """Let nobody write to these layers any more: they become root's, to be read by the group of whose they were.

        Where no root is at work, they stay their owner's. It may be repeated.
        """
        owner, mode = (0, 0o440) if os.geteuid() == 0 else (-1, 0o400)
        with storage_errors("sealing layers"):
            for path in map(self.file, ids):
                status = path.lstat()
                if (status.st_mode & 0o777, status.st_uid) == (mode, os.geteuid()):
                    continue
                fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
                try:
                    os.fchown(fd, owner, -1)
                    os.fchmod(fd, mode)
                    os.fsync(fd)
                finally:
                    os.close(fd)

    @contextlib.contextmanager
    def held(self, *ids: str | None) -> Iterator[None]:
        """Keep layers, and so all that is below them, from being removed while a record is made that stands on them.

        Raises NotFound where one is gone by now.
        """
        with contextlib.ExitStack() as locks:
            for layer_id in ids:
                if layer_id is None:
                    continue
                try:
                    locks.enter_context(_flock(self.path / layer_id, fcntl.LOCK_SH))
                except FileNotFoundError as error:
                    raise NotFound(f"layer {layer_id} has just been removed") from error
                if not (self.path / layer_id).exists():
                    raise NotFound(f"layer {layer_id} has just been removed")
            yield

    @contextlib.contextmanager
    def alone(self, *ids: str) -> Iterator[bool]:
        """Let nobody begin to stand on these layers in the block; false where somebody is about to, or one is gone."""
        with contextlib.ExitStack() as locks:
            try:
                for layer_id in ids:
                    locks.enter_context(_flock(self.path / layer_id, fcntl.LOCK_EX | fcntl.LOCK_NB))
            except (BlockingIOError, FileNotFoundError):
                yield False
            else:
                yield True

    @contextlib.contextmanager
    def opened(self, layer_id: str) -> Iterator[None]:
        """Let a layer's file be written to in the block, by us alone."""
        with storage_errors("merging layers"):
            self.file(layer_id).chmod(0o600)
        try:
            yield
        finally:
            self.seal(layer_id)

    def fold(self, parent: str, layer_id: str) -> None:
        """Let the file of `parent`, which holds all that `layer_id` does, be that of `layer_id`, and the layer be gone."""
        layer = self.get(layer_id)
        with storage_errors("merging layers"):
            with contextlib.suppress(FileNotFoundError):
                self.file(parent).replace(self.file(layer_id))
            sync_directory(self.path / layer_id)
            self._write(self.path / layer_id, replace(layer, parent=self.get(parent).parent))
            self._remove(parent)

    def _write(self, directory: Path, layer: Layer) -> None:
        text = json.dumps({"format": _FORMAT, **unstructure(layer)}, indent=2) + "\n"
        write_atomic(directory / LAYER, text)

    def sweep(self, standing: Callable[[], Iterable[str]]) -> list[str]:
        """Remove the layers that nobody stands on, and what commands left that were killed; returns their ids.

        `standing` reads, from all records there are, on which layers somebody stands directly; where it raises, nothing is
        removed.
        """
        with contextlib.ExitStack() as locks, storage_errors("removing layers"):
            self._sweep_staging()
            kept, candidates = set(standing()), []
            for layer_id in self.ids():
                if layer_id in kept:
                    continue
                try:
                    locks.enter_context(_flock(self.path / layer_id, fcntl.LOCK_EX | fcntl.LOCK_NB))
                    candidates.append(layer_id)
                except BlockingIOError:
                    kept.add(layer_id)  # somebody is about to stand on it
                except FileNotFoundError:
                    continue
            # A record may have come between the first look and the locks.
            kept = self._with_parents({*kept, *standing()})
            gone = [layer_id for layer_id in candidates if layer_id not in kept]
            for layer_id in gone:
                self._remove(layer_id)
        return gone

    def _with_parents(self, ids: Iterable[str]) -> set[str]:
        found: set[str] = set()
        for layer_id in ids:
            top: str | None = layer_id
            while top is not None and top not in found:
                found.add(top)
                try:
                    top = self.get(top).parent
                except NotFound:
                    break
        return found

    def _remove(self, layer_id: str) -> None:
        away = self.path / f".rm-{layer_id}"
        (self.path / layer_id).rename(away)
        shutil.rmtree(away, ignore_errors=True)

    def _sweep_staging(self) -> None:
        if not self.path.is_dir():
            return
        for entry in [*self.path.glob(".new-*"), *self.path.glob(".rm-*")]:
            with contextlib.suppress(OSError), _flock(entry, fcntl.LOCK_EX | fcntl.LOCK_NB):
                shutil.rmtree(entry, ignore_errors=True)


def virtual_size(disk: Path) -> int:
    """How large the qcow2 file `disk`, one of ours, is to the guest, in bytes. Raises OSError."""
    # The VM's process may write in its directory: never follow a link that it may have put there, nor wait for a pipe.
    fd = os.open(disk, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        raw = os.pread(fd, 8, _SIZE)
    finally:
        os.close(fd)
    if len(raw) < 8:
        raise PolyvisorError(f"{disk} is no qcow2 disk", hint="it is damaged")
    size: int = struct.unpack(">Q", raw)[0]
    return size


def _link(disk: Path, name: Path, store: Path) -> None:
    """Give the file `disk` a second name, itself and not what a link leads to."""
    try:
        os.link(disk, name, follow_symlinks=False)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        problem = f"{disk} is on another file system than {store}: it can't be shared"
        raise PolyvisorError(problem, hint="keep the VM's directory where the home is") from error


@contextlib.contextmanager
def _flock(directory: Path, how: int) -> Iterator[None]:
    """Hold an flock(2) on a directory. Raises FileNotFoundError, BlockingIOError with LOCK_NB."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, how)
        yield
    finally:
        os.close(fd)

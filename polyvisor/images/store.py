"""The image store of a home.

    <images>/store/<id>/image.json      the manifest
    <images>/store/<id>/disk.qcow2 …    the files, read-only
    <images>/names/<name>               a symbolic link to ../store/<id>

An image is made in a staging directory, then renamed into place: the store never holds half an image. A name is
moved to a newer image atomically; the older one stays until it is removed by its id, which a VM on it prevents.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from polyvisor.errors import ImageRefused, InvalidInput, NotFound, PolyvisorError, WrongState
from polyvisor.files import make_directory, storage_errors, sync_directory, sync_files, translated, write_atomic
from polyvisor.images.image import Image, ImageFile, image_from_json, image_to_json
from polyvisor.operation import Progress, Step, silent

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}\Z")
MANIFEST = "image.json"
_CHUNK = 1 << 20


def check_image_name(name: str) -> str:
    """`name`, where it may name an image; raises InvalidInput otherwise."""
    if not NAME.match(name) or ".." in name:
        raise InvalidInput(
            "image",
            name,
            "is not an image name",
            hint="use 1 to 63 of a-z 0-9 . _ -, beginning with a letter or a digit",
        )
    return name


class ImageStore:
    """Images in directory `path` (`Home.images`)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._store = path / "store"
        self._names = path / "names"

    def directory(self, image: Image) -> Path:
        """Where the files of `image` are."""
        return self._store / image.id

    def file(self, image: Image, file: ImageFile) -> Path:
        return self._store / image.id / file.name

    def names(self) -> list[str]:
        try:
            return sorted(entry.name for entry in os.scandir(self._names) if not entry.name.startswith("."))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise translated(error, "listing the images") from error

    def all(self) -> list[Image]:
        """All images in the store, named or still in use under an older name's id, by name and age."""
        try:
            ids = [entry.name for entry in os.scandir(self._store) if not entry.name.startswith(".")]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise translated(error, "listing the images") from error
        return sorted((self.by_id(i) for i in ids), key=lambda image: (image.name, image.created_at))

    def find(self, name: str) -> Image | None:
        """The image that `name` (or an id) stands for now, or None."""
        for directory in (self._names / name, self._store / name):
            with contextlib.suppress(FileNotFoundError):
                return self._load(directory)
        return None

    def get(self, name: str) -> Image:
        """The image that `name` (or an id) stands for now; raises NotFound, InvalidInput."""
        if image := self.find(check_image_name(name)):
            return image
        raise NotFound(f"there is no image '{name}'", hint="polyvisor image ls shows those here and those it can fetch")

    def by_id(self, image_id: str) -> Image:
        """The image with this id; raises NotFound."""
        try:
            return self._load(self._store / image_id)
        except FileNotFoundError as error:
            raise NotFound(f"image {image_id} is gone from {self._store}") from error

    def is_current(self, image: Image) -> bool:
        """Whether its name still leads to `image`, rather than to a newer one."""
        try:
            return (self._names / image.name).readlink().name == image.id
        except FileNotFoundError:
            return False

    @contextlib.contextmanager
    def staging(self) -> Iterator[Path]:
        """A new directory on the store's file system to make an image in; removed at the end, whatever happens."""
        with storage_errors("preparing the image store"):
            make_directory(self._store, 0o711)
            make_directory(self._names, 0o711)
            self._sweep()
            import tempfile

            directory = Path(tempfile.mkdtemp(prefix=".new-", dir=self._store))
        lock = os.open(directory, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)
            os.close(lock)

    def add(self, staging: Path, image: Image, progress: Progress = silent) -> Image:
        """Put what is in `staging` into the store under `image.name` and return it with its id, sizes and checksums.

        `image` names the files; their `sha256` and `size`, and the `id`, are computed here. Where it says a `sha256`
        already, the file must have it: raises ImageRefused.
        """
        with storage_errors(f"storing image '{image.name}'"):
            image = _completed(staging, image, progress)
            for file in image.files:
                (staging / file.name).chmod(0o444)
                sync_files(staging / file.name)
            write_atomic(staging / MANIFEST, image_to_json(image), mode=0o444)
            staging.chmod(0o755)
            with contextlib.suppress(FileExistsError):
                self._rename_new(staging, self._store / image.id)
            self._point(image.name, image.id)
        return self.by_id(image.id)

    def remove(self, name: str, users: Callable[[Image], list[str]]) -> Image:
        """Remove an image; `users` names the VMs that stand on it. Raises NotFound, WrongState where there are any."""
        image = self.get(name)
        with self._locked(image, fcntl.LOCK_EX):
            self._require_unused(image, name, users)
            with storage_errors(f"removing image '{name}'"):
                self._remove(image)
        return image

    @contextlib.contextmanager
    def held(self, image: Image) -> Iterator[None]:
        """Keep `image` from being removed while a VM is made on it; raises NotFound where it is gone by now."""
        with self._locked(image, fcntl.LOCK_SH):
            yield

    @contextlib.contextmanager
    def _locked(self, image: Image, how: int) -> Iterator[None]:
        try:
            fd = os.open(self.directory(image) / MANIFEST, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise NotFound(f"image '{image.name}' has just been removed") from error
        try:
            fcntl.flock(fd, how)
            if not self.directory(image).exists():
                raise NotFound(f"image '{image.name}' has just been removed")
            yield
        finally:
            os.close(fd)

    def _require_unused(self, image: Image, name: str, users: Callable[[Image], list[str]]) -> None:
        if vms := users(image):
            raise WrongState(
                f"image '{name}' is used by {', '.join(vms[:5])}{' …' if len(vms) > 5 else ''}",
                hint=f"remove {'it' if len(vms) == 1 else 'them'} first: polyvisor rm {' '.join(vms[:5])}",
            )

    def _remove(self, image: Image) -> None:
        if self.is_current(image):
            (self._names / image.name).unlink()
        gone = self._store / f".rm-{image.id}"
        shutil.rmtree(gone, ignore_errors=True)
        self.directory(image).rename(gone)
        shutil.rmtree(gone)

    def _load(self, directory: Path) -> Image:
        try:
            return image_from_json((directory / MANIFEST).read_bytes())
        except (ValueError, TypeError, KeyError) as error:
            raise PolyvisorError(
                f"the manifest {directory / MANIFEST} can't be read: {error}",
                hint="remove the directory and make the image anew",
            ) from error

    def _rename_new(self, source: Path, target: Path) -> None:
        """Rename a directory, unless the target is there (its content has the same id: nothing is lost)."""
        if target.is_dir():
            raise FileExistsError(target)
        source.rename(target)
        sync_directory(target.parent)

    def _point(self, name: str, image_id: str) -> None:
        link = self._names / f".{name}.{os.getpid()}"
        link.unlink(missing_ok=True)
        link.symlink_to(Path("..", "store", image_id))
        link.replace(self._names / name)
        sync_directory(self._names)

    def _sweep(self) -> None:
        """Remove what a killed command left: staging directories that nobody holds, and removals not finished."""
        for entry in [*self._store.glob(".new-*"), *self._store.glob(".rm-*")]:
            with contextlib.suppress(OSError):
                fd = os.open(entry, os.O_RDONLY)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(entry, ignore_errors=True)
                finally:
                    os.close(fd)


def _completed(staging: Path, image: Image, progress: Progress) -> Image:
    """`image` with sizes and checksums of its files in `staging`, its id and the present time."""
    described = replace(
        image,
        id="",
        created_at=0.0,
        disk=_measured(staging, image.disk, progress),
        kernel=_measured(staging, image.kernel, progress),
        initrd=_measured(staging, image.initrd, progress),
    )
    import hashlib

    image_id = hashlib.sha256(image_to_json(described).encode()).hexdigest()[:12]
    return replace(described, id=image_id, created_at=time.time())


def _measured(staging: Path, file: ImageFile | None, progress: Progress) -> ImageFile | None:
    if file is None:
        return None
    path = staging / file.name
    found = sha256_of(path, progress)
    if file.sha256 not in ("", found):
        raise ImageRefused(
            f"{file.name}: its sha256 is {found}, not {file.sha256}", hint="it was damaged on its way: get it again"
        )
    return replace(file, size=path.stat().st_size, sha256=found)


def sha256_of(path: Path, progress: Progress = silent) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    import hashlib

    digest = hashlib.sha256()
    total = path.stat().st_size
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            progress(Step("checksum", file.tell(), total, "B"))
    return digest.hexdigest()

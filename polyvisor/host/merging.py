"""Layers that nobody needs for themselves any more, merged into those above them.

Where a snapshot is removed, its layer stays for as long as something stands on it. A layer P that only one other, C, stands on,
and no VM and no snapshot, is of no use by itself: what C holds is written into P's file, which then becomes C's. Whoever stands
on C finds the same at each moment, wherever this is cut off: C's own file hides what is written into P's; then P's file, which
is complete by now, takes the place of C's in one step; and a layer without a file is passed over (`LayerStore.files`).

Nothing may have these files open meanwhile, so this is done where all VMs above are at rest, and left for later otherwise.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from polyvisor.errors import Busy, NotFound, PolyvisorError
from polyvisor.host import disks
from polyvisor.host.snapshots import layers_of, read_all
from polyvisor.host.store import VMDirectory
from polyvisor.images import qemu_img
from polyvisor.operation import Progress, Step

if TYPE_CHECKING:
    from polyvisor.host.host import Host


async def merge(host: Host, held: str, progress: Progress) -> None:
    """Merge what can be merged now; the caller holds the lock of VM `held`, others are tried.

    What can't be done, for want of space say, is left as it is: nobody misses it.
    """
    with contextlib.suppress(PolyvisorError):
        while pair := _next(host):
            if not await _merged(host, held, *pair, progress):
                return


def _next(host: Host) -> tuple[str, str] | None:
    """A layer and the only one that stands on it, where nobody stands on the first directly."""
    standing = disks.standing(host)
    parents = {layer_id: host.layers.get(layer_id).parent for layer_id in host.layers.ids()}
    above = Counter(parent for parent in parents.values() if parent)
    for layer_id, parent in sorted(parents.items()):
        if parent in parents and above[parent] == 1 and parent not in standing:
            return parent, layer_id
    return None


async def _merged(host: Host, held: str, parent: str, layer_id: str, progress: Progress) -> bool:
    """Whether the layer `parent` was merged into the one above it."""
    standers = _standers(host, layer_id)
    if _others_stand(host, layer_id):
        return False
    async with AsyncExitStack() as stack:
        for name, _ in standers:
            if name != held:
                try:
                    await stack.enter_async_context(host.store.locked(name, "snapshot", patience_s=0.0))
                except Busy:
                    return False
            vm = host.store.directory(name)
            if vm.is_saved() or await host.drivers.lives(vm):
                return False
        # Somebody may have come to stand on them before all was locked.
        alone = stack.enter_context(host.layers.alone(parent, layer_id))
        if not alone or _next(host) != (parent, layer_id) or _standers(host, layer_id) != standers:
            return False
        if host.layers.file(parent).exists():
            progress(Step("merging"))
            with host.layers.opened(parent):
                await qemu_img.commit([*host.layers.files(layer_id), *_image_below(host, *standers[0])])
        host.layers.fold(parent, layer_id)
    return True


def _standers(host: Host, layer_id: str) -> list[tuple[str, int]]:
    """The VMs that stand on a layer or on one above it, or whose snapshots do, each with the number of the disk that does."""
    found: dict[str, int] = {}
    for name in host.store.names():
        vm = VMDirectory(host.store.directory(name).path)
        with contextlib.suppress(NotFound):
            for layers in (vm.record.layers, *(kept.layers for kept in read_all(vm))):
                for i, top in enumerate(layers):
                    if layer_id in [each.id for each in host.layers.chain(top)]:
                        found.setdefault(name, i)
    return sorted(found.items())


def _others_stand(host: Host, layer_id: str) -> bool:
    """Whether something else than VMs and snapshots stands on a layer or on one above it: nobody knows what it has open."""
    known: set[str | None] = set()
    for name in host.store.names():
        vm = VMDirectory(host.store.directory(name).path)
        with contextlib.suppress(NotFound):
            known |= {*vm.record.layers, *layers_of(vm)}
    return any(layer_id in [each.id for each in host.layers.chain(top)] for top in disks.standing(host) - known)


def _image_below(host: Host, name: str, index: int) -> list[Path]:
    """The image's disk, where that is at the bottom of disk `index` of a VM: it is the first one, which is never removed."""
    image = host.images.store.by_id(host.store.directory(name).record.image_id)
    return [host.images.store.file(image, image.disk)] if index == 0 and image.disk else []

"""`Host`: this machine, without a daemon.

A `Host` is made by whoever needs one (the command line, a program that imports Polyvisor), does its work in that process
and is thrown away; VMs live on as processes of their own. What it knows it reads from the VM directories and asks of the
driver. Looking at VMs is what is done most: what other verbs need is imported by them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyvisor.drivers.base import Observed
from polyvisor.drivers.registry import Drivers
from polyvisor.errors import AlreadyExists, NotFound, PolyvisorError, TimedOut, Unsupported, WrongState
from polyvisor.home import Home, default_home
from polyvisor.host.api import STOP_TIMEOUT_S, Details
from polyvisor.host.device_keeper import DeviceKeeper
from polyvisor.host.forker import Forker
from polyvisor.host.image_keeper import ImageKeeper
from polyvisor.host.images import Images
from polyvisor.host.insider import Insider
from polyvisor.host.mover import Mover
from polyvisor.host.moves import require_settled
from polyvisor.host.observed import status_of, waiting
from polyvisor.host.record import Launch, Record, boot_id, devices_of, new_id
from polyvisor.host.setup.wish import Wish
from polyvisor.host.shutdown import shut_down
from polyvisor.host.snapshotter import Snapshotter
from polyvisor.host.store import FORKING, RENEWING, VMDirectory, VMStore, no_such_vm
from polyvisor.images.image import Image
from polyvisor.operation import Progress, Step, silent
from polyvisor.spec.forward import Forward
from polyvisor.spec.resources import Changes
from polyvisor.spec.vm import Mode, VMSpec
from polyvisor.status import (
    Accelerator,
    Capabilities,
    Check,
    Event,
    HostStatus,
    Resized,
    Setup,
    VMState,
    VMStatus,
)
from polyvisor.waiting import event_loop

if TYPE_CHECKING:
    from polyvisor.storage.layers import LayerStore


class Host(Mover, Forker, Snapshotter, DeviceKeeper, Insider, ImageKeeper):
    """This machine; implements `HostApi`. VMs and images are kept in `home` (see `default_home`)."""

    def __init__(self, home: Home | Path | str | None = None) -> None:
        self.home = home if isinstance(home, Home) else Home(Path(home).absolute()) if home else default_home()
        self.store = VMStore(self.home)
        self.images = Images(self.home)
        self.drivers = Drivers(self.home.cache)

    @cached_property
    def layers(self) -> LayerStore:
        from polyvisor.storage.layers import LayerStore

        return LayerStore(self.home.layers)

    async def capabilities(self) -> tuple[Capabilities, ...]:
        """What the drivers can do here, the preferred first; probed once."""
        self.home.prepare()
        return await self.drivers.capabilities()

    async def status(self) -> HostStatus:
        from polyvisor.host.machine import host_status

        states = [status.state for status in await self.vms()]
        counts = {s.value: states.count(s) for s in VMState if s in states}
        return host_status(self.home, await self.capabilities(), counts, await self.drivers.free_memory_mib())

    async def check(self) -> list[Check]:
        from polyvisor.host.doctor import check_host

        return await check_host(self.home)

    async def prepare_host(self, wish: Wish, progress: Progress = silent, *, act: bool = False) -> Setup:
        from polyvisor.host.setup.apply import prepare

        return await prepare(wish, progress, act=act)

    async def close(self) -> None:
        """Nothing is held open."""

    # Making and removing

    async def create(self, spec: VMSpec, progress: Progress = silent, *, new: bool = False) -> VMStatus:
        image = await self._check(spec, progress)
        async with self.store.locked(spec.name, "create") as vm:
            await self._create(vm, spec, image, new)
            return await self._status(vm)

    async def run(self, spec: VMSpec, progress: Progress = silent, *, new: bool = False) -> VMStatus:
        image = await self._check(spec, progress)
        async with self.store.locked(spec.name, "run") as vm, AsyncExitStack() as undo:
            if await self._create(vm, spec, image, new):
                undo.push_async_callback(self._discard, vm)
            status = await self._start(vm, progress)
            undo.pop_all()
        return status

    async def remove(self, name: str, *, force: bool = False) -> None:
        async with self.store.locked(name, "rm") as vm:
            if await self.drivers.lives(vm) and not force:
                state = (await self.drivers.of(vm).inspect(vm)).state
                raise WrongState(f"VM '{name}' is {state}", hint=f"stop it first, or: polyvisor rm --force {name}")
            if not force:
                require_settled(vm, "be removed")
            await self.drivers.end(vm)
            layered = vm.has_layers()
            if not self.store.remove(name):
                raise no_such_vm(name)
            if layered:
                self._sweep_layers()

    def _sweep_layers(self) -> None:
        from polyvisor.host.disks import sweep

        sweep(self)

    async def _discard(self, vm: VMDirectory) -> None:
        """Undo the making of a VM, which may run by now (Ctrl-C can come at any time)."""
        await self.drivers.of(vm).kill(vm)
        self.store.remove(vm.name)

    async def _check(self, spec: VMSpec, progress: Progress) -> Image:
        """Everything that can be wrong with `spec` on this host, changing nothing but the image store."""
        from polyvisor.host.machine import check_room
        from polyvisor.host.plan import check_devices, check_networks, choose_accelerator, choose_firmware, choose_mode
        from polyvisor.host.prepare import check_disk_sizes

        chosen = choose_accelerator(spec, *await self.capabilities())
        check_room(spec, spec.memory_mib or 0, chosen.name, await self.capabilities())
        if xen := await self._xen(chosen):
            check_networks(spec, xen)
        image = await self.images.ensure(spec.image, progress)
        check_room(spec, spec.memory_mib or image.memory_mib, chosen.name, await self.capabilities())
        choose_firmware(spec, image, choose_mode(spec, image, xen), xen)
        check_devices(spec, image)
        check_disk_sizes(spec, image)
        return image

    async def _create(self, vm: VMDirectory, spec: VMSpec, image: Image, new: bool) -> bool:
        """Make the VM whose lock is held; returns False where it is there already, with the same spec, and may be."""
        from polyvisor.host import prepare

        if vm.path.is_dir():
            if not new and vm.record.spec == spec:
                return False
            hint = f"choose another name, or: polyvisor rm {spec.name}"
            raise AlreadyExists(f"there is a VM '{spec.name}' already, with another spec", hint=hint)
        record = Record(
            id=new_id(),
            created_at=time.time(),
            spec=spec,
            image_id=image.id,
            memory_mib=spec.memory_mib or image.memory_mib,
            user=prepare.new_user(self.home),
        )
        with self.images.store.held(image), self.store.creating(spec.name) as staging:
            await prepare.fill(staging, record, image, self.images.store, self.home.keys)
        return True

    # Starting and stopping

    async def start(self, name: str, progress: Progress = silent, *, fresh: bool = False) -> VMStatus:
        async with self._locked(name, "start") as vm:
            return await self._start(vm, progress, fresh=fresh)

    async def _start(self, vm: VMDirectory, progress: Progress, *, fresh: bool = False) -> VMStatus:
        from polyvisor.host import prepare
        from polyvisor.host.machine import check_room
        from polyvisor.host.plan import as_booted, choose_accelerator, choose_mode, explain_choice, explain_mode
        from polyvisor.network.ports import with_free_ports

        self._require_born(vm, "start")
        if await self._is_started(vm):
            return await self._status(vm)
        require_settled(vm, "start")
        if vm.has_layers():
            from polyvisor.host import disks, snapshotting

            await snapshotting.ready(self, vm, progress)
            vm = VMDirectory(vm.path)  # its record may be another one now
            if not vm.is_saved():
                disks.settled(self, vm, vm.record)
        if vm.is_saved() and not fresh:
            from polyvisor.host import saved

            await saved.restore(vm, self.drivers.of(vm), str(self.home.path), progress)
            return await self._status(vm)
        self._let_run(vm)
        await self._tidy_devices(vm)
        (vm.path / RENEWING).unlink(missing_ok=True)  # it boots, and its seed says who it is
        record = vm.record
        image = self.images.store.by_id(record.image_id)
        capabilities = await self.capabilities()
        chosen = choose_accelerator(record.spec, *capabilities)
        check_room(record.spec, record.memory_mib, chosen.name, capabilities)
        xen = await self._xen(chosen)
        mode = choose_mode(record.spec, image, xen)
        packing = self.images.packing(image) if mode is Mode.PV else None
        booted = as_booted(record.spec, image, mode, xen, packing)
        await prepare.refresh(vm, record, booted, self.images.store, self.home.keys, mode)
        reason = explain_mode(mode, record.spec, image, booted, xen) if xen else explain_choice(chosen, *capabilities)
        observed = await with_free_ports(lambda: self._launch(vm, record, image, packing, chosen, reason))
        return status_of(vm, observed)

    async def _is_started(self, vm: VMDirectory) -> bool:
        """Whether the VM is alive; a restore of it that was cut off is finished, or undone where memory is missing still."""
        if not await self.drivers.lives(vm):
            return False
        if vm.is_restoring():
            from polyvisor.host import saved

            if vm.is_saved():
                await self.drivers.of(vm).kill(vm)
                return False
            await saved.finish(vm, self.drivers.of(vm))
        else:
            from polyvisor.host.resize import settle

            await settle(vm, self.drivers.of(vm))
        await self._settle_devices(vm)
        return True

    async def save(self, name: str, progress: Progress = silent) -> VMStatus:
        from polyvisor.host import saved

        async with self._locked(name, "save") as vm:
            if reason := (await self._capabilities_of(vm)).missing.get("save"):
                raise Unsupported(f"VM '{name}' can't be saved: {reason}")
            await self._require_devices_in_force(vm, "be saved")
            await saved.save(vm, self.drivers.of(vm), progress)
            return await self._status(vm)

    def _let_run(self, vm: VMDirectory) -> None:
        """Whatever lets vCPUs run calls this before: memory that was saved would not fit the disks any more."""
        if vm.saved.exists():
            from polyvisor.host.saved import drop

            drop(vm)
        if vm.is_forking():
            (vm.path / FORKING).unlink(missing_ok=True)
        if vm.is_being_kept():
            from polyvisor.host.snapshotting import drop_interrupted

            drop_interrupted(vm)

    async def _end(self, vm: VMDirectory) -> None:
        """End a VM now; one that is saved stays so."""
        await self.drivers.of(vm).kill(vm)
        if vm.saved.exists():
            from polyvisor.host.saved import tidy

            tidy(vm)

    async def _launch(
        self, vm: VMDirectory, record: Record, image: Image, packing: str | None, chosen: Accelerator, reason: str
    ) -> Observed:
        from polyvisor.host.keys import Reserve
        from polyvisor.host.plan import build_boot, numbered

        boot = build_boot(
            *(record, image, self.images.store.directory(image), chosen.name, vm.launch(), str(self.home.path)),
            await self._xen(chosen),
            packing,
            [self.layers.files(layer) for layer in record.layers] if record.layers else (),
        )
        driver = self.drivers.running(chosen.name)
        command = await driver.command(boot)
        vm.write_launch(
            Launch(
                started_at=time.time(),
                boot_id=boot_id(),
                hypervisor=chosen.name,
                reason=reason,
                version=command.version,
                mode=boot.mode.value,
                argv=command.argv,
                forwards=tuple(forward for nic in boot.nics for forward in nic.forwards),
                resources=boot.resources,
                devices=devices_of(numbered(record, image)),
            )
        )
        async with Reserve(self.home.keys) as reserve:
            return await driver.start(vm, boot, command, record.user, meanwhile=reserve.begin)

    async def stop(self, name: str, *, timeout_s: float = STOP_TIMEOUT_S, progress: Progress = silent) -> VMStatus:
        async with self._locked(name, "stop") as vm:
            await self._stop(vm, timeout_s, progress)
            return await self._status(vm)

    async def _stop(self, vm: VMDirectory, timeout_s: float, progress: Progress) -> None:
        if vm.alive() and timeout_s > 0:
            await shut_down(self, vm, timeout_s, progress)
        await self._end(vm)

    async def kill(self, name: str) -> VMStatus:
        async with self._locked(name, "kill") as vm:
            await self._end(vm)
            return await self._status(vm)

    async def reboot(
        self, name: str, *, force: bool = False, timeout_s: float = STOP_TIMEOUT_S, progress: Progress = silent
    ) -> VMStatus:
        async with self._locked(name, "reboot") as vm:
            await self._require_whole(vm, "reboot")
            self._let_run(vm)
            progress(Step("rebooting"))
            driver = self.drivers.of(vm)
            if driver.ends_where_it_reboots(vm):
                return await self._boot_anew(vm, 0.0 if force else timeout_s, progress)
            await (driver.reset(vm) if force else driver.reboot(vm, timeout_s))
            return await self._status(vm)

    async def _boot_anew(self, vm: VMDirectory, timeout_s: float, progress: Progress) -> VMStatus:
        """Stop a VM and start it; raises TimedOut where its guest does not shut down, which then is left as it is."""
        if timeout_s and not await shut_down(self, vm, timeout_s, progress):
            problem = f"the guest of VM '{vm.name}' did not shut down"
            raise TimedOut(problem, hint="it may ignore the power button; use --force to press reset")
        await self._end(vm)
        return await self._start(vm, progress)

    async def pause(self, name: str) -> VMStatus:
        async with self._locked(name, "pause") as vm:
            await self._require_whole(vm, "pause")
            self._let_run(vm)
            await self.drivers.of(vm).pause(vm)
            return await self._status(vm)

    async def resume(self, name: str) -> VMStatus:
        async with self._locked(name, "resume") as vm:
            await self._require_whole(vm, "resume")
            self._let_run(vm)
            await self.drivers.of(vm).resume(vm)
            return await self._status(vm)

    # Observing

    async def names(self) -> list[str]:
        return self.store.names()

    async def vms(self) -> list[VMStatus]:
        every = [VMDirectory(self.home.vms / name) for name in self.store.names()]
        # Those that are alive are asked all at once; there is nothing to wait for with the others, often the most.
        alive = [vm for vm in every if self.drivers.may_live(vm)]
        asked = await self._ask_all(alive) if alive else {}
        statuses = [asked[v.name] if v.name in asked else await self._status_or_reason(v, alive=False) for v in every]
        return [status for status in statuses if status is not None]

    async def show(self, name: str) -> Details:
        from polyvisor.host import resize
        from polyvisor.host.plan import mac_addresses
        from polyvisor.host.saved import describe

        vm = self.store.get(name)
        record, launch, status = vm.record, vm.launch(), await self._status(vm)
        named = devices_of(record)
        return Details(
            status=status,
            spec=record.spec,
            mac_addresses=mac_addresses(record),
            hypervisor_reason=launch.reason if launch else None,
            argv=launch.argv if launch else None,
            directory=str(vm.path),
            saved=describe(vm) if status.state is VMState.SAVED else None,
            usage=await resize.observed_usage(vm, self.drivers.of(vm), status),
            pending=waiting(record, launch, status.state),
            disk_names=tuple(named.disks),
            nic_names=tuple(named.nics),
        )

    async def events(self, names: Sequence[str] = ()) -> AsyncIterator[Event]:
        from polyvisor.host.watch import changes

        for name in names:
            self.store.get(name)
        async for event in changes(self, names):
            yield event

    async def _ask_all(self, vms: Sequence[VMDirectory]) -> dict[str, VMStatus | None]:
        await event_loop()
        statuses = await asyncio.gather(*(self._status_or_reason(vm, alive=True) for vm in vms))
        return dict(zip((vm.name for vm in vms), statuses, strict=True))

    async def _status_or_reason(self, vm: VMDirectory, *, alive: bool) -> VMStatus | None:
        """The status of a VM in a list: one that can't be read is shown with the reason, one just removed is left out."""
        try:
            return status_of(vm, await self.drivers.of(vm).inspect(vm) if alive else self.drivers.of(vm).ended(vm))
        except NotFound:
            return None
        except PolyvisorError as error:
            return VMStatus(
                name=vm.name,
                id="",
                state=VMState.UNRESPONSIVE,
                reason=error.message,
                vcpus=0,
                memory_mib=0,
                created_at=0.0,
            )

    async def _status(self, vm: VMDirectory) -> VMStatus:
        return status_of(vm, await self.drivers.of(vm).inspect(vm))

    # Ports

    async def add_forward(self, name: str, forward: Forward) -> VMStatus:
        from polyvisor.host import forwards

        async with self._locked(name, "forward") as vm:
            await forwards.add(vm, self.drivers.of(vm), forward)
            return await self._status(VMDirectory(vm.path))

    async def remove_forward(self, name: str, forward: Forward) -> VMStatus:
        from polyvisor.host import forwards

        async with self._locked(name, "forward") as vm:
            await forwards.remove(vm, self.drivers.of(vm), forward)
            return await self._status(VMDirectory(vm.path))

    async def set(self, name: str, changes: Changes) -> Resized:
        from polyvisor.host.resize import change

        async with self._locked(name, "set") as vm:
            return await change(self, vm, changes)

    # Helpers

    async def _xen(self, chosen: Accelerator) -> Capabilities | None:
        """What Xen's driver can do, where it was `chosen`."""
        return next((c for c in await self.capabilities() if c.driver == chosen.name), None)

    async def _capabilities_of(self, vm: VMDirectory) -> Capabilities:
        name = self.drivers.of(vm).name
        return next(c for c in await self.capabilities() if c.driver == name)

    def _locked(self, name: str, verb: str) -> Any:
        self.store.get(name)
        return self.store.locked(name, verb)

    async def _require_alive(self, vm: VMDirectory, verb: str) -> None:
        state = (await self.drivers.of(vm).inspect(vm)).state
        if not state.alive:
            state = VMState.SAVED if vm.is_saved() else state
            raise WrongState(f"VM '{vm.name}' is {state}: it can't {verb}", hint=f"polyvisor start {vm.name}")

    async def _require_whole(self, vm: VMDirectory, verb: str) -> None:
        """Raise WrongState for a VM that is not alive, or whose process may not have all of its memory yet."""
        await self._require_alive(vm, verb)
        self._require_born(vm, verb)
        if vm.is_saved() and vm.is_restoring():
            from polyvisor.host.saved import still_restoring

            raise still_restoring(vm)

    def _require_born(self, vm: VMDirectory, verb: str) -> None:
        """Raise WrongState for a fork that has no memory: nothing can give it that any more."""
        if vm.is_unborn():
            hint = f"polyvisor rm --force {vm.name}, and fork again"
            raise WrongState(f"VM '{vm.name}' was being forked when that was cut off: it can't {verb}", hint=hint)

"""GRUB as the first program of a guest in modes pv and pvh: it reads the guest's disk, and boots the kernel that is there.

These guests have no firmware. Xen is given a GRUB that was built for them (its platforms are xen and xen_pvh) in place of a
kernel; it takes the configuration and the kernel that the guest has on its disk by now. So a new kernel takes effect at the
next boot, and no program of the control domain ever reads that disk.
"""

from __future__ import annotations

from pathlib import Path

from polyvisor.spec.vm import Mode

PACKAGE = "grub-xen-host"
# Where Debian, Ubuntu and Alpine have them; SUSE and Fedora ship one for mode pv alone, under other names.
PROGRAMS = {
    Mode.PVH: (Path("/usr/lib/grub-xen/grub-i386-xen_pvh.bin"),),
    Mode.PV: (
        Path("/usr/lib/grub-xen/grub-x86_64-xen.bin"),
        Path("/usr/share/grub2/x86_64-xen/grub.xen"),
        Path("/usr/lib/grub2/x86_64-xen/grub.xen"),
    ),
}


def find_loader(mode: Mode) -> Path | None:
    """The GRUB for guests in `mode` of this host."""
    return next((path for path in PROGRAMS.get(mode, ()) if path.is_file()), None)


def missing_loaders() -> dict[str, str]:
    """Why guests can't boot from their disks, by `disk-MODE`."""
    reason = "this host has no GRUB for guests (grub-xen), which boots what is on their disks: apt-get install "
    return {f"disk-{mode}": reason + PACKAGE for mode in PROGRAMS if find_loader(mode) is None}

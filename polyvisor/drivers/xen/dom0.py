"""Whether this system is the control domain of a Xen: asked at every command, so it loads nothing."""

from __future__ import annotations

# The kernel of a dom0 says so here, and mounts xenfs at /proc/xen (Documentation/ABI/stable/sysfs-hypervisor-xen).
_TYPE = "/sys/hypervisor/type"
_CAPABILITIES = "/proc/xen/capabilities"


def is_dom0(kind: str = _TYPE, capabilities: str = _CAPABILITIES) -> bool:
    """Whether Linux says that it runs on Xen, and controls it."""
    try:
        with open(kind) as type_, open(capabilities) as words:  # noqa: PTH123 - quicker
            return type_.read().strip() == "xen" and "control_d" in words.read()
    except OSError:
        return False

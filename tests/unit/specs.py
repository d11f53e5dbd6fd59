"""Hypothesis strategies of specs that can be meant, shared by several test modules."""

from hypothesis import settings
from hypothesis import strategies as st

from polyvisor.spec.forward import Forward
from polyvisor.spec.vm import DeviceModel, Disk, Firmware, Hypervisor, Mode, Nic, OnReboot, VMSpec

# Enough to find what these found, and quick; no deadline, since other work may go on on the machine.
QUICK = settings(max_examples=25, deadline=None)

PRINTABLE = st.text(st.characters(exclude_categories=("C", "Z"), include_characters=" "), max_size=30)

forwards = st.builds(
    Forward,
    host_port=st.integers(0, 65535),
    guest_port=st.integers(1, 65535),
    host_address=st.ip_addresses(v=4).map(str),
    protocol=st.sampled_from(("tcp", "udp")),
)
macs = st.tuples(st.integers(0, 63).map(lambda n: n * 4), *[st.integers(0, 255)] * 5).map(
    lambda parts: ":".join(f"{part:02x}" for part in parts)
)
disks = st.builds(Disk, size_gib=st.none() | st.integers(1, 64 << 10))
nics = st.builds(
    Nic, mac=st.none() | macs, forwards=st.lists(forwards.map(str), max_size=3, unique=True).map(tuple)
) | st.builds(Nic, network=st.sampled_from(["none", "private:lab"]), mac=st.none() | macs)
ssh_keys = st.from_regex(r"ssh-ed25519 [A-Za-z0-9+/]{40,68}( [a-z@.: ]{0,20}[a-z])?", fullmatch=True)
specs = st.builds(
    VMSpec,
    name=st.from_regex(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", fullmatch=True),
    image=PRINTABLE.filter(bool),
    vcpus=st.integers(1, 255),
    memory_mib=st.none() | st.integers(16, 16 << 20),
    vcpus_max=st.none() | st.just(255),
    memory_max_mib=st.none() | st.just(16 << 20),
    cpu_weight=st.integers(1, 10_000),
    cpu_limit=st.none() | st.integers(1, 25_500),
    disk_iops_limit=st.none() | st.integers(1, 10_000_000),
    disk_rate_limit_mib=st.none() | st.integers(1, 1 << 20),
    cpu_affinity=st.sampled_from(["all", "0", "0-3,6"]),
    hypervisor=st.sampled_from(Hypervisor),
    mode=st.sampled_from(Mode),
    firmware=st.sampled_from(Firmware),
    devices=st.sampled_from(DeviceModel),
    cpu=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,20}", fullmatch=True).filter(lambda cpu: cpu != "help"),
    cmdline=PRINTABLE,
    disks=st.lists(disks, max_size=4).map(tuple),
    nics=st.lists(nics, max_size=4).map(tuple),
    ssh_keys=st.lists(ssh_keys, max_size=2).map(tuple),
    user_data=st.none() | st.text(st.characters(codec="utf-8")),
    on_reboot=st.sampled_from(OnReboot),
    labels=st.dictionaries(st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9._/-]{0,10}[A-Za-z0-9])?", fullmatch=True), PRINTABLE),
)

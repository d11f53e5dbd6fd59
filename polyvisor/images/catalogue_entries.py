"""The well-known cloud images, for x86_64, as their vendors publish them.

Each has cloud-init and takes a NoCloud seed. Vendors with a stable address for their newest image are listed with
that one; Fedora and Alpine name the release in the file. The addresses and their checksum files were gathered from
the vendors' documentation and public configurations, not tried: the machine this was written on could not reach
them. An address that no longer works can be corrected in `<home>/catalogue.yaml` (see `catalogue`).
"""

from __future__ import annotations

from polyvisor.images.catalogue_entry import Entry

_DEBIAN = "https://cloud.debian.org/images/cloud"
_UBUNTU = "https://cloud-images.ubuntu.com/releases"
_FEDORA = "https://download.fedoraproject.org/pub/fedora/linux/releases"
_ALPINE = "https://dl-cdn.alpinelinux.org/alpine"
_ROCKY = "https://dl.rockylinux.org/pub/rocky"
_ALMA = "https://repo.almalinux.org/almalinux"
_CENTOS = "https://cloud.centos.org/centos"
_OPENSUSE = "https://download.opensuse.org/repositories/Cloud:/Images:"
_ARCH = "https://geo.mirror.pkgbuild.com/images/latest"


def _debian(version: str, path: str, suffix: str = "") -> Entry:
    return Entry(
        name=f"debian-{version}",
        os=f"Debian {version}",
        url=f"{_DEBIAN}/{path}/debian-{version}-genericcloud-amd64{suffix}.qcow2",
        checksums=f"{_DEBIAN}/{path}/SHA512SUMS",
        user="debian",
    )


def _ubuntu(version: str) -> Entry:
    return Entry(
        name=f"ubuntu-{version}",
        os=f"Ubuntu {version} LTS",
        url=f"{_UBUNTU}/{version}/release/ubuntu-{version}-server-cloudimg-amd64.img",
        checksums=f"{_UBUNTU}/{version}/release/SHA256SUMS",
        user="ubuntu",
        memory_mib=1024,
    )


def _fedora(version: str, compose: str) -> Entry:
    images = f"{_FEDORA}/{version}/Cloud/x86_64/images"
    return Entry(
        name=f"fedora-{version}",
        os=f"Fedora {version}",
        url=f"{images}/Fedora-Cloud-Base-Generic-{version}-{compose}.x86_64.qcow2",
        checksums=f"{images}/Fedora-Cloud-{version}-{compose}-x86_64-CHECKSUM",
        user="fedora",
        memory_mib=1024,
    )


def _alpine(series: str, version: str) -> Entry:
    url = f"{_ALPINE}/v{series}/releases/cloud/nocloud_alpine-{version}-x86_64-bios-cloudinit-r0.qcow2"
    return Entry(
        name=f"alpine-{series}",
        os=f"Alpine {version}",
        url=url,
        checksums=url + ".sha512",
        user="alpine",
        memory_mib=256,
    )


def _rocky(version: str) -> Entry:
    url = f"{_ROCKY}/{version}/images/x86_64/Rocky-{version}-GenericCloud-Base.latest.x86_64.qcow2"
    return Entry(
        name=f"rocky-{version}",
        os=f"Rocky Linux {version}",
        url=url,
        checksums=url + ".CHECKSUM",
        user="rocky",
        memory_mib=1024,
    )


def _alma(version: str) -> Entry:
    images = f"{_ALMA}/{version}/cloud/x86_64/images"
    return Entry(
        name=f"almalinux-{version}",
        os=f"AlmaLinux {version}",
        url=f"{images}/AlmaLinux-{version}-GenericCloud-latest.x86_64.qcow2",
        checksums=f"{images}/CHECKSUM",
        user="almalinux",
        memory_mib=1024,
    )


def _centos(version: str) -> Entry:
    url = f"{_CENTOS}/{version}-stream/x86_64/images/CentOS-Stream-GenericCloud-{version}-latest.x86_64.qcow2"
    return Entry(
        name=f"centos-stream-{version}",
        os=f"CentOS Stream {version}",
        url=url,
        checksums=url + ".SHA256SUM",
        user="cloud-user",
        memory_mib=1024,
    )


_LEAP = f"{_OPENSUSE}/Leap_15.6/images/openSUSE-Leap-15.6.x86_64-NoCloud.qcow2"
_ARCH_IMAGE = f"{_ARCH}/Arch-Linux-x86_64-cloudimg.qcow2"

ENTRIES: tuple[Entry, ...] = (
    _debian("12", "bookworm/latest"),
    _debian("13", "trixie/latest"),
    _debian("sid", "sid/daily/latest", "-daily"),
    _ubuntu("22.04"),
    _ubuntu("24.04"),
    _ubuntu("26.04"),
    _fedora("43", "1.6"),
    _fedora("44", "1.7"),
    _alpine("3.22", "3.22.4"),
    _alpine("3.23", "3.23.4"),
    _rocky("9"),
    _rocky("10"),
    _alma("9"),
    _alma("10"),
    _centos("9"),
    _centos("10"),
    Entry(
        name="opensuse-leap-15.6",
        os="openSUSE Leap 15.6",
        url=_LEAP,
        checksums=_LEAP + ".sha256",
        user="opensuse",
        memory_mib=1024,
    ),
    Entry(name="arch", os="Arch Linux", url=_ARCH_IMAGE, checksums=_ARCH_IMAGE + ".SHA256", user="arch"),
)

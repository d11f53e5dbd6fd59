"""What `xl` prints, as Xen of several versions printed it (tests/captured/xl)."""

from pathlib import Path

import pytest

from polyvisor.drivers.xen import probe, xl
from polyvisor.drivers.xen.dom0 import is_dom0
from polyvisor.errors import ProcessFailed, TimedOut

CAPTURED = Path(__file__).parents[1] / "captured" / "xl"


@pytest.mark.parametrize("path", sorted(CAPTURED.glob("info-*.txt")), ids=lambda path: str(path.stem))
def test_xl_info(path: Path) -> None:
    info = xl.parse_info(path.read_text())
    assert info.version.startswith(path.stem.split("-")[1])
    assert info.virt_caps[:3] == ("pv", "hvm", "hap")
    assert info.modes == ("pvh", "hvm", "pv")
    assert 1024 < info.free_memory_mib < info.total_memory_mib < 8192
    assert "dom0_mem=2048M" in info.command_line


def said(**changes: str | None) -> str:
    """`xl info`, with some values others than those of the first capture, or not there."""
    lines = min(CAPTURED.glob("info-*.txt")).read_text().splitlines()
    values = {line.partition(":")[0].strip(): line.partition(":")[2].strip() for line in lines} | changes
    return "\n".join(f"{name:22} : {value}" for name, value in values.items() if value is not None)


def test_without_hardware_virtualization_only_paravirtual_guests_run() -> None:
    modes = xl.parse_info(said(virt_caps="pv")).modes
    assert modes == ("pv",)
    assert "no hvm in virt_caps" in xl.missing_modes(modes)["pvh"]


def test_before_4_14_virt_caps_did_not_speak_of_pv() -> None:
    assert xl.parse_info(said(virt_caps="hvm hvm_directio")).modes == ("pvh", "hvm", "pv")
    assert xl.parse_info(said(virt_caps="")).modes == ("pv",)


def test_a_xen_without_paravirtual_guests() -> None:
    assert xl.parse_info(said(virt_caps="hvm hap")).modes == ("pvh", "hvm")


@pytest.mark.parametrize(
    "text", ["", "xen_major: 4", said(total_memory=None), said(free_memory="much"), said(xen_caps=None)]
)
def test_what_is_no_answer_is_an_error(text: str) -> None:
    with pytest.raises(ProcessFailed, match="xl"):
        xl.parse_info(text)


def test_a_dom0_is_known_by_its_kernel(tmp_path: Path) -> None:
    kind, capabilities = tmp_path / "type", tmp_path / "capabilities"
    assert not is_dom0(str(kind), str(capabilities))
    kind.write_text("xen\n")
    assert not is_dom0(str(kind), str(capabilities)), "a guest of Xen"
    capabilities.write_text("control_d\n")
    assert is_dom0(str(kind), str(capabilities))
    kind.write_text("kvm\n")
    assert not is_dom0(str(kind), str(capabilities))


async def test_where_there_is_no_xen_nothing_is_said_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "is_dom0", lambda: False)
    assert await probe.probe() is None


async def test_what_a_xen_offers(monkeypatch: pytest.MonkeyPatch) -> None:
    async def info() -> xl.XenInfo:
        return xl.parse_info(said(virt_caps="pv hvm hap gnttab-v1"))

    monkeypatch.setattr(probe, "is_dom0", lambda: True)
    monkeypatch.setattr(xl, "info", info)
    found = await probe.probe()
    assert found is not None
    assert found.version == "4.17.7"
    assert found.modes == ("pvh", "hvm", "pv")
    assert (found.accelerators[0].name, found.accelerators[0].available) == ("xen", True)
    assert found.accelerators[0].reason == "virt_caps: pv hvm hap gnttab-v1"
    assert "start" not in found.missing


async def test_a_xen_that_does_not_answer_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    async def info() -> xl.XenInfo:
        raise TimedOut("xl did not end within 30 s")

    monkeypatch.setattr(probe, "is_dom0", lambda: True)
    monkeypatch.setattr(xl, "info", info)
    found = await probe.probe()
    assert found is not None
    assert not found.accelerators[0].available
    assert "did not end" in found.missing["start"]

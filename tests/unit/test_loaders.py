"""Which GRUB for guests a Xen host has, and what it says where it has none."""

from __future__ import annotations

from pathlib import Path

import pytest

from polyvisor.drivers.xen import loaders
from polyvisor.drivers.xen.driver import _loader
from polyvisor.errors import Unavailable
from polyvisor.spec.vm import Mode
from tests.golden.xl_boots import XL_BOOTS


def test_the_first_that_is_there_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pv, pvh = tmp_path / "pv", tmp_path / "pvh"
    pv.touch()
    monkeypatch.setattr(loaders, "PROGRAMS", {Mode.PVH: (pvh,), Mode.PV: (tmp_path / "none", pv)})
    assert loaders.find_loader(Mode.PV) == pv
    assert loaders.find_loader(Mode.PVH) is None
    assert loaders.find_loader(Mode.HVM) is None
    assert list(loaders.missing_loaders()) == ["disk-pvh"]
    pvh.touch()
    assert loaders.missing_loaders() == {}


def test_only_a_guest_without_firmware_and_kernel_gets_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaders, "PROGRAMS", {Mode.PVH: (), Mode.PV: ()})
    assert _loader(XL_BOOTS["pv"]) is None
    assert _loader(XL_BOOTS["hvm"]) is None
    with pytest.raises(Unavailable, match="grub-xen-host"):
        _loader(XL_BOOTS["pv-loader"])

"""The configuration that xl reads, by golden files, and what may never get into it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyvisor.drivers.base import Boot, BootDisk
from polyvisor.drivers.xen.config import build_config, quoted
from polyvisor.errors import InvalidInput
from tests.golden.xl_boots import VM_DIRECTORY, XL_BOOTS, XL_DIRECTORY, configuration, xl_golden
from tests.unit.specs import QUICK

_STRING = re.compile(r'"((?:[^"\\\n]|\\.)*)"')  # libxlu_cfg_l.l


@pytest.mark.parametrize("name", XL_BOOTS)
def test_a_configuration_is_as_its_golden_file(name: str) -> None:
    assert configuration(name) == xl_golden(name).read_text(), "if wanted: uv run python -m tests.golden.regenerate"


def test_every_golden_file_belongs_to_a_boot() -> None:
    assert set(XL_DIRECTORY.glob("*.cfg")) == {xl_golden(name) for name in XL_BOOTS}


@QUICK
@given(st.text(st.characters(codec="utf-8")).filter(str.isprintable))
def test_a_string_is_read_as_it_was_and_ends_where_it_should(text: str) -> None:
    match = _STRING.fullmatch(quoted(text))
    assert match is not None
    assert re.sub(r"\\(.)", r"\1", match[1]) == text


@pytest.mark.parametrize("text", ["a\nb", "a\rb", "\0", "\x1b[0m", "a\u2028b"])
def test_what_would_end_a_line_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="configuration"):
        quoted(text)


@pytest.mark.parametrize("boot", XL_BOOTS.values(), ids=XL_BOOTS)
def test_nothing_of_a_spec_adds_a_setting(boot: Boot) -> None:
    awkward = 'a"] \\" ; disk = [ "x" ] \' # '
    names = [line.partition(" = ")[0] for line in build_config(boot, VM_DIRECTORY).splitlines()]
    wild = replace(boot, cmdline=awkward, kernel=boot.kernel and Path("/k") / awkward.replace("/", ""))
    text = build_config(wild, VM_DIRECTORY)
    assert [line.partition(" = ")[0] for line in text.splitlines()] == names
    assert all(_STRING.sub("", line).count('"') == 0 for line in text.splitlines())


def test_a_disk_path_is_all_that_follows_target() -> None:
    disk = BootDisk(path=Path("/a,vdev=xvdb,access=ro/disk0.qcow2"))
    text = build_config(replace(XL_BOOTS["pv"], disks=(disk,)), VM_DIRECTORY)
    assert 'vdev=xvda,access=rw,backendtype=qdisk,target=/a,vdev=xvdb,access=ro/disk0.qcow2" ]' in text

"""Calls that are sent again are not done again; uploads stay where they belong."""

from __future__ import annotations

import asyncio
import io
import json
import os
import uuid
from pathlib import Path
from typing import Any

import pytest

from polyvisor.errors import InvalidInput, NotFound, PolyvisorError, WrongState
from polyvisor.remote.calls import KEPT_S, Calls
from polyvisor.remote.uploads import Uploads, safe_name

KEY = str(uuid.UUID(int=7))


class Work:
    """Counts how often it is done."""

    def __init__(self) -> None:
        self.count = 0

    async def __call__(self) -> dict[str, Any]:
        self.count += 1
        await asyncio.sleep(0.05)
        return {"result": self.count}


async def test_a_call_sent_again_gets_the_first_answer(tmp_path: Path) -> None:
    work = Work()
    for calls in (Calls(tmp_path / "calls"), Calls(tmp_path / "calls")):
        assert await calls.once(KEY, "run", work, repeatable=False) == {"result": 1}
    assert (tmp_path / "calls").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "calls" / KEY).stat().st_mode & 0o777 == 0o600


async def test_a_call_sent_again_while_it_is_under_way_waits(tmp_path: Path) -> None:
    work = Work()
    answers = await asyncio.gather(*(Calls(tmp_path).once(KEY, "run", work, repeatable=False) for _ in range(5)))
    assert answers == [{"result": 1}] * 5


@pytest.mark.parametrize("left", ['{"verb": "run"}\n', '{"verb": "run"}\n{"resu', '{"verb": "run"}\n{"result": 1}'])
async def test_a_call_that_was_cut_short(tmp_path: Path, left: str) -> None:
    """Its process was killed: a second line that does not end was not written to its end."""
    (tmp_path / KEY).write_text(left)
    work = Work()
    with pytest.raises(WrongState, match="cut short"):
        await Calls(tmp_path).once(KEY, "run", work, repeatable=False)
    assert work.count == 0
    assert await Calls(tmp_path).once(KEY, "start", work, repeatable=True) == {"result": 1}
    assert await Calls(tmp_path).once(KEY, "start", work, repeatable=True) == {"result": 1}


@pytest.mark.parametrize("left", ["", '{"verb": "r'])
async def test_a_call_that_was_not_begun(tmp_path: Path, left: str) -> None:
    (tmp_path / KEY).write_text(left)
    assert await Calls(tmp_path).once(KEY, "run", Work(), repeatable=False) == {"result": 1}


async def test_errors_are_outcomes_too(tmp_path: Path) -> None:
    async def fails() -> dict[str, Any]:
        return {"error": {"code": 1}}

    for work in (fails, Work()):
        assert await Calls(tmp_path).once(KEY, "run", work, repeatable=False) == {"error": {"code": 1}}


@pytest.mark.parametrize("key", ["", "../../etc/passwd", "None", KEY.upper().replace("0", "A"), KEY + "\n", f"{KEY}/x"])
async def test_what_is_no_key_names_no_file(tmp_path: Path, key: str) -> None:
    with pytest.raises(InvalidInput, match="key"):
        await Calls(tmp_path / "calls").once(key, "run", Work(), repeatable=False)
    assert list(tmp_path.iterdir()) == []


async def test_old_calls_are_forgotten(tmp_path: Path) -> None:
    Calls(tmp_path / "nowhere").sweep()
    old, new = tmp_path / KEY, tmp_path / str(uuid.UUID(int=8))
    for path in (old, new):
        path.write_text(json.dumps({}))
    os.utime(old, (0, old.stat().st_mtime - KEPT_S - 10))
    Calls(tmp_path).sweep()
    assert list(tmp_path.iterdir()) == [new]


def test_an_upload_is_there_until_it_is_forgotten(tmp_path: Path) -> None:
    uploads = Uploads(tmp_path / "cache" / "uploads")
    upload = uploads.take(io.BytesIO(b"content and more"), "disk.qcow2", 7)
    assert uploads.find(upload).read_bytes() == b"content"
    assert uploads.find(upload).name == "disk.qcow2"
    uploads.forget(uploads.find(upload))
    with pytest.raises(NotFound):
        uploads.find(upload)
    assert list(uploads.directory.iterdir()) == []


def test_an_upload_that_breaks_off_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(PolyvisorError, match="broke off, 3 bytes"):
        Uploads(tmp_path / "uploads").take(io.BytesIO(b"1234"), "a", 7)
    assert list((tmp_path / "uploads").iterdir()) == []


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "..", ".", "", ".hidden", "a\nb", "é" * 300])
def test_a_name_leads_nowhere_else(tmp_path: Path, name: str) -> None:
    assert "/" not in safe_name(name)
    assert safe_name(name)[:1] not in ("", ".")
    uploads = Uploads(tmp_path / "uploads")
    assert uploads.find(uploads.take(io.BytesIO(b"x"), name, 1)).parent.parent == uploads.directory


@pytest.mark.parametrize("word", ["", "..", "/etc/passwd", "0" * 32, "0" * 31 + "\n"])
def test_other_files_are_no_uploads(tmp_path: Path, word: str) -> None:
    with pytest.raises(NotFound, match="no such upload"):
        Uploads(tmp_path).find(word)

"""Images out of a host: into a file, whole or not at all, and into another host, once."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from polyvisor.cli.main import run
from polyvisor.errors import AlreadyExists, ConnectionLost, InvalidInput, NotFound, PolyvisorError
from polyvisor.home import Home
from polyvisor.host.api import StoredImage
from polyvisor.host.host import Host
from polyvisor.images.image import Image
from polyvisor.operation import Step
from polyvisor.remote.transfer import copy_image, export_image
from tests.unit.exported import KERNEL, add_direct, add_full, archive


class Counting(Host):
    """A host that counts what it is asked to export and to import, and may export more or less than it should."""

    def __init__(self, home: Home, more: bytes = b"", fewer: int = 0) -> None:
        super().__init__(home)
        self.asked: list[str] = []
        self._more = more
        self._fewer = fewer

    async def image_export(self, name: str) -> AsyncGenerator[bytes]:
        self.asked.append("export")
        data = b"".join(self.images.export(name)) + self._more
        yield data[: len(data) - self._fewer]

    async def image_import(self, source: str, **options: Any) -> Image:
        self.asked.append("import")
        return await super().image_import(source, **options)


@pytest.fixture
def source(tmp_path: Path) -> Counting:
    return Counting(Home(tmp_path / "source"))


@pytest.fixture
def target(tmp_path: Path) -> Counting:
    return Counting(Home(tmp_path / "target"))


def files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# Into a file


async def test_the_file_is_there_with_all_that_belongs_to_it(source: Counting, tmp_path: Path) -> None:
    store = source.images.store
    image = add_full(store, tmp_path)
    steps: list[Step] = []
    out = tmp_path / "out"
    out.mkdir()
    assert await export_image(source, "full", out / "x.tar", steps.append) == image
    assert (out / "x.tar").read_bytes() == archive(store, image)
    assert files(out) == ["x.tar"]
    size = (out / "x.tar").stat().st_size
    assert steps[-1] == Step("exporting", size, size, "B")
    umask = os.umask(0o022)
    os.umask(umask)
    assert (out / "x.tar").stat().st_mode & 0o777 == 0o666 & ~umask


async def test_a_file_that_is_there_stays_unless_it_shall_be_replaced(source: Counting, tmp_path: Path) -> None:
    image = add_direct(source.images.store)
    path = tmp_path / "x.tar"
    path.write_text("precious")
    with pytest.raises(AlreadyExists, match=r"x\.tar already"):
        await export_image(source, "direct", path)
    assert path.read_text() == "precious"
    assert source.asked == []
    await export_image(source, "direct", path, replacing=True)
    assert path.read_bytes() == archive(source.images.store, image)


async def test_nor_is_one_replaced_that_came_meanwhile(source: Counting, tmp_path: Path) -> None:
    add_direct(source.images.store)
    path = tmp_path / "x.tar"

    def meanwhile(_: Step) -> None:
        path.write_text("precious")

    with pytest.raises(AlreadyExists):
        await export_image(source, "direct", path, meanwhile)
    assert path.read_text() == "precious"
    assert files(tmp_path) == ["source", "x.tar"]


@pytest.mark.parametrize("replacing", [False, True])
async def test_only_files_are_written(source: Counting, tmp_path: Path, replacing: bool) -> None:
    add_direct(source.images.store)
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(InvalidInput, match=r"is a directory|is not a regular file"):
            await export_image(source, "direct", path, replacing=replacing)
    with pytest.raises(PolyvisorError, match="No such file"):
        await export_image(source, "direct", tmp_path / "nowhere" / "x")
    with pytest.raises(NotFound, match="'nothing'"):
        await export_image(source, "nothing", tmp_path / "x")
    assert files(tmp_path) == ["pipe", "source"]


@pytest.mark.parametrize("odd", [{"more": b"x"}, {"fewer": 1}, {"fewer": 1024}])
async def test_what_does_not_arrive_whole_does_not_stay(tmp_path: Path, odd: dict[str, Any]) -> None:
    source = Counting(Home(tmp_path / "source"), **odd)
    add_direct(source.images.store)
    with pytest.raises(ConnectionLost, match="did not arrive"):
        await export_image(source, "direct", tmp_path / "x")
    target = Host(tmp_path / "target")
    with pytest.raises(ConnectionLost):
        await copy_image(source, "direct", target)
    assert files(tmp_path) == ["source", "target"]
    assert await target.image_list() == []
    assert files(target.home.cache) == []


# To another host


async def test_a_copy_is_the_same_image_and_is_made_once(source: Counting, target: Counting, tmp_path: Path) -> None:
    image = add_full(source.images.store, tmp_path)
    copied = await copy_image(source, "full", target)
    assert copied.same_as(image)
    assert copied.id == image.id
    assert [one.image for one in await target.image_list()] == [copied]
    assert await copy_image(source, image.id, target) == copied
    assert source.asked == ["export"]
    assert target.asked == ["import"]
    assert files(target.home.cache) == []


async def test_it_may_have_another_name_there(source: Counting, target: Counting) -> None:
    image = add_direct(source.images.store)
    for _ in range(2):
        copied = await copy_image(source, "direct", target, new_name="other")
        assert copied.name == "other"
        assert copied.kernel == image.kernel
    assert target.asked == ["import"]
    with pytest.raises(InvalidInput, match="not an image name"):
        await copy_image(source, "direct", target, new_name="../x")
    with pytest.raises(NotFound, match="'nothing'"):
        await copy_image(source, "nothing", target)
    assert target.asked == ["import"]


async def test_its_name_leads_to_it_afterwards(source: Counting, target: Counting) -> None:
    """Another image there had the name: it stays under its id, as after a build. So it is when both are there already."""
    old = add_direct(source.images.store)
    await copy_image(source, "direct", target)
    new = add_direct(source.images.store, kernel=KERNEL + b"newer")
    await copy_image(source, "direct", target)
    assert (await target.image_show("direct")).image.id == new.id
    await copy_image(source, old.id, target)
    assert (await target.image_show("direct")).image.id == old.id
    assert {one.image.id for one in await target.image_list()} == {old.id, new.id}


async def test_a_name_that_a_host_makes_up_leads_nowhere(source: Counting, target: Counting, tmp_path: Path) -> None:
    image = add_direct(source.images.store)

    async def lie(name: str) -> StoredImage:
        return StoredImage(image=replace(image, name="../../x"), directory="", current=True)

    source.image_show = lie  # type: ignore[method-assign]
    with pytest.raises(InvalidInput, match="not an image name"):
        await copy_image(source, "direct", target)
    assert source.asked == []


# The command line


def test_the_command_line(
    source: Counting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    image = add_direct(source.images.store)
    monkeypatch.delenv("POLYVISOR_HOST", raising=False)
    monkeypatch.setenv("POLYVISOR_HOME", str(source.home.path))
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    assert run(["image", "export", "direct"]) == 0
    assert capsys.readouterr().out == f"image direct ({image.id}) is in direct.polyvisor.tar, 839.5 KiB\n"
    assert run(["image", "export", "direct"]) == AlreadyExists.exit_status
    assert "replace it: --force" in capsys.readouterr().err
    assert run(["image", "export", "../x"]) == InvalidInput.exit_status
    assert run(["image", "export", "direct", "--force", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["file"] == str(tmp_path / "out" / "direct.polyvisor.tar")
    assert (told["image"]["id"], told["size"]) == (image.id, Path("direct.polyvisor.tar").stat().st_size)
    assert run(["image", "export", "direct", "-o", "again.jpg"]) == 0
    assert files(tmp_path / "out") == ["again.jpg", "direct.polyvisor.tar"]

    monkeypatch.setenv("POLYVISOR_HOME", str(tmp_path / "target"))
    capsys.readouterr()
    assert run(["image", "import", "again.jpg", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["id"] == image.id
    for flag in (["--user", "x"], ["--seed", "nocloud"], ["--memory", "512M"], ["--format", "raw"]):
        assert run(["image", "import", "again.jpg", *flag]) == InvalidInput.exit_status
        assert f"(leave out {flag[0]})" in capsys.readouterr().err
    (tmp_path / "out" / "disk.img").write_bytes(bytes(512))
    assert run(["image", "import", "disk.img"]) == InvalidInput.exit_status
    assert "(add --name NAME)" in capsys.readouterr().err
    assert run(["image", "copy", "direct"]) == 2
    assert "--to" in capsys.readouterr().err
    assert run(["image", "copy", "direct", "--to", "nowhere"]) == NotFound.exit_status
    assert "nowhere" in capsys.readouterr().err

"""Polyvisor as one file: what is in it, that it is the same wherever it is made, and that any Python of a host runs it."""

import ast
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

import polyvisor
from polyvisor import __version__
from polyvisor.errors import Unavailable
from polyvisor.remote import archive as module
from polyvisor.remote.archive import archive, build

MAIN = Path(module.__file__).with_name("data") / "main"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return archive(tmp_path_factory.mktemp("made"))


def version(*command: str | Path) -> subprocess.CompletedProcess[str]:
    """`--version` of the application, with nothing of this process's environment."""
    return subprocess.run(
        [*command, "--version"], capture_output=True, text=True, env={"PATH": os.defpath}, cwd="/", check=False
    )


class TestContent:
    def test_our_package_and_what_it_needs(self, made: Path) -> None:
        names = set(zipfile.ZipFile(made).namelist())
        assert {"__main__.py", "polyvisor/__init__.py", "polyvisor/remote/agent.py"} < names
        assert {"qemu/qmp/__init__.py", "yaml/__init__.py", "pycdlib/__init__.py"} < names
        assert {name.partition("/")[0] for name in names} == {"__main__.py", "polyvisor", "qemu", "yaml", "pycdlib"}

    def test_every_module_and_data_file_of_ours(self, made: Path) -> None:
        root = Path(polyvisor.__file__).parent
        ours = {
            f"polyvisor/{path.relative_to(root)}"
            for path in root.rglob("*")
            if path.is_file() and "__pycache__" not in path.parts
        }
        names = {name for name in zipfile.ZipFile(made).namelist() if name.startswith("polyvisor/")}
        assert names == ours
        assert any(not name.endswith(".py") for name in names), "data files too"

    def test_nothing_that_belongs_to_this_machine(self, made: Path) -> None:
        names = zipfile.ZipFile(made).namelist()
        assert not [name for name in names if name.endswith((".pyc", ".so", ".pyi")) or "__pycache__" in name]
        assert not [name for name in names if name.startswith("/") or ".." in name]

    def test_it_is_quick_to_carry(self, made: Path) -> None:
        assert made.stat().st_size < 1 << 20


class TestName:
    def test_the_same_content_is_the_same_file(self, made: Path, tmp_path: Path) -> None:
        again = archive(tmp_path)
        assert again.name == made.name
        assert again.read_bytes() == made.read_bytes()

    def test_times_modes_and_order_do_not_matter(self, tmp_path: Path) -> None:
        for name in "ab":
            (tmp_path / name).write_text(name)
        first = build({"a": tmp_path / "a", "b": tmp_path / "b"})
        (tmp_path / "a").chmod(0o600)
        os.utime(tmp_path / "a", (1, 1))
        assert build({"b": tmp_path / "b", "a": tmp_path / "a"}) == first
        assert build({"b": tmp_path / "a", "a": tmp_path / "b"}) != first

    def test_it_is_made_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        first = archive(tmp_path)
        monkeypatch.setattr(module, "build", None)
        assert archive(tmp_path) == first

    def test_one_that_was_removed_is_made_anew(self, tmp_path: Path) -> None:
        first = archive(tmp_path)
        content = first.read_bytes()
        first.unlink()
        assert archive(tmp_path) == first
        assert first.read_bytes() == content

    def test_a_changed_file_changes_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        package = tmp_path / "packages" / "something"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("a = 1")
        monkeypatch.syspath_prepend(package.parent)
        monkeypatch.setattr(module, "PACKAGES", ("something",))
        names = [archive(tmp_path / "cache").name]
        (package / "__init__.py").write_text("a = 2")
        os.utime(package / "__init__.py", (time.time() + 5,) * 2)
        names.append(archive(tmp_path / "cache").name)
        (package / "more.txt").write_text("")
        names.append(archive(tmp_path / "cache").name)
        assert len(set(names)) == 3
        (package / "more.txt").unlink()
        assert archive(tmp_path / "cache").name == names[1], "the same content has the same name"

    def test_a_package_that_is_missing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "PACKAGES", ("polyvisor", "nowhere_to_be_found"))
        with pytest.raises(Unavailable, match="'nowhere_to_be_found' is not installed"):
            archive(tmp_path)


class TestRun:
    def test_it_runs_and_unpacks_itself_beside(self, made: Path, tmp_path: Path) -> None:
        file = tmp_path / made.name
        file.write_bytes(made.read_bytes())
        assert version(sys.executable, "-I", file).stdout == f"polyvisor {__version__}\n"
        directory = tmp_path / made.stem
        assert (directory / "polyvisor" / "__init__.py").is_file()
        assert list(directory.glob("polyvisor/__pycache__/*.pyc")), "it is compiled"
        assert {path.name for path in tmp_path.iterdir()} == {made.name, made.stem}, "nothing else is left"
        before = directory.stat().st_mtime_ns
        assert version(sys.executable, "-I", file).stdout == f"polyvisor {__version__}\n"
        assert directory.stat().st_mtime_ns == before

    def test_several_at_once_unpack_it_once(self, made: Path, tmp_path: Path) -> None:
        file = tmp_path / made.name
        file.write_bytes(made.read_bytes())
        running = [
            subprocess.Popen([sys.executable, "-I", file, "--version"], stdout=subprocess.PIPE, text=True)
            for _ in range(2)
        ]
        assert [process.communicate()[0] for process in running] == [f"polyvisor {__version__}\n"] * 2
        assert {path.name for path in tmp_path.iterdir()} == {made.name, made.stem}

    def test_where_it_can_not_unpack_itself_it_runs_all_the_same(self, made: Path, tmp_path: Path) -> None:
        file = tmp_path / made.name
        file.write_bytes(made.read_bytes())
        (tmp_path / made.stem).touch()  # in the way, also for root
        done = version(sys.executable, "-I", file)
        assert (done.stdout, done.stderr) == (f"polyvisor {__version__}\n", "")

    def test_the_code_that_runs_is_the_unpacked(self, made: Path, tmp_path: Path) -> None:
        file = tmp_path / made.name
        file.write_bytes(made.read_bytes())
        version(sys.executable, "-I", file)
        (tmp_path / made.stem / "polyvisor" / "__init__.py").write_text('__version__ = "unpacked"\n')
        assert version(sys.executable, "-I", file).stdout == "polyvisor unpacked\n"

    def test_a_python_that_is_too_old_understands_enough_to_say_so(self) -> None:
        ast.parse(MAIN.read_text(), feature_version=(3, 4))
        said = subprocess.run(
            [sys.executable, "-c", f"import sys; sys.version_info = (3, 9, 2); exec(open({str(MAIN)!r}).read())"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert said.returncode == 1
        assert said.stderr == "Python 3.9 is too old: Polyvisor needs 3.11\n"

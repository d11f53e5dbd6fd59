"""Polyvisor as one file: complete, the same wherever it is made, and at home on any Python."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

from polyvisor import __version__
from polyvisor.remote import archive as module
from polyvisor.remote.archive import archive, build


def run(application: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the application with nothing of this environment, as on another machine."""
    argv = [sys.executable, "-I", "-S", str(application), *words]
    return subprocess.run(argv, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=False)


def test_it_holds_all_that_a_host_needs(tmp_path: Path) -> None:
    with zipfile.ZipFile(archive(tmp_path)) as content:
        names = set(content.namelist())
    assert {"__main__.py", "polyvisor/host/host.py", "qemu/qmp/__init__.py", "yaml/__init__.py"} <= names
    assert {"pycdlib/pycdlib.py", "polyvisor/images/data/debian/build.sh"} <= names
    assert [name for name in names if name.endswith((".pyc", ".so")) or ".." in name or name.startswith("/")] == []


def test_it_is_made_once_and_named_by_its_content(tmp_path: Path) -> None:
    first = archive(tmp_path / "a")
    made_at = first.stat().st_mtime_ns
    assert archive(tmp_path / "a") == first
    assert first.stat().st_mtime_ns == made_at
    assert archive(tmp_path / "b").name == first.name
    assert archive(tmp_path / "b").read_bytes() == first.read_bytes()
    first.unlink()
    assert archive(tmp_path / "a").exists()


def test_other_content_has_another_name(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("a = 1\n")
    one = build({"a.py": tmp_path / "a.py"})
    (tmp_path / "a.py").write_text("a = 2\n")
    assert build({"a.py": tmp_path / "a.py"}) != one


def test_it_runs_and_unpacks_itself_once(tmp_path: Path) -> None:
    application = tmp_path / "polyvisor.pyz"
    application.write_bytes(archive(tmp_path / "cache").read_bytes())
    for _ in range(2):
        done = run(application, "--version")
        assert (done.stdout, done.stderr, done.returncode) == (f"polyvisor {__version__}\n", "", 0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "polyvisor", "polyvisor.pyz"]
    assert list((tmp_path / "polyvisor" / "polyvisor" / "__pycache__").iterdir())


def test_it_runs_where_it_can_not_unpack_itself(tmp_path: Path) -> None:
    application = tmp_path / "polyvisor.pyz"
    application.write_bytes(archive(tmp_path / "cache").read_bytes())
    (tmp_path / "polyvisor").symlink_to("/dev/null")  # not even root can put a directory in its place
    assert run(application, "--version").stdout == f"polyvisor {__version__}\n"


def test_a_python_that_is_too_old_understands_enough_to_say_so() -> None:
    text = Path(module.__file__).with_name("data").joinpath("main").read_text()
    ast.parse(text, feature_version=(3, 4))
    assert "needs 3.11" in text

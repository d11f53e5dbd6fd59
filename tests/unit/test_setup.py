"""The scripts that make a fresh machine work: what they say, what they would do, and that they ask nobody in vain."""

import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = [ROOT / "scripts/setup.sh", ROOT / "scripts/demo.sh", ROOT / ".ci/run"]
SETUP = ROOT / "scripts/setup.sh"
# What the script itself calls, which every Debian has.
BASICS = ["sh", "env", "dirname", "sed", "id", "head", "sort", "getconf", "mktemp", "tail", "rm", "mkdir", "ln", "cat"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    argv = ["sh", str(SETUP), *arguments]
    return subprocess.run(argv, check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60)


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A copy of the script on a machine with nothing but the basics; add commands by `fake`."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "scripts").mkdir()
    # The script looks in the usual directories too; on this machine they are not bare.
    text = re.sub(r"^PATH=.*$", "", SETUP.read_text(), flags=re.M)
    assert text != SETUP.read_text()
    (tmp_path / "scripts/setup.sh").write_text(text)
    for name in BASICS:
        if found := shutil.which(name):
            (tmp_path / "bin" / name).symlink_to(found)
    return tmp_path


def fake(machine: Path, name: str, script: str) -> None:
    file = machine / "bin" / name
    file.unlink(missing_ok=True)
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)


def run_bare(machine: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(machine / "bin/sh"), str(machine / "scripts/setup.sh"), *arguments],
        check=False,
        capture_output=True,
        text=True,
        env={"PATH": str(machine / "bin"), "HOME": str(machine)},
        stdin=subprocess.DEVNULL,
        timeout=60,
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_are_posix_shell_and_stop_at_errors(script: Path) -> None:
    text = script.read_text()
    assert text.startswith("#!/bin/sh\n")
    assert os.access(script, os.X_OK)
    checked = subprocess.run(["sh", "-n", str(script)], check=False, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    assert "set -eu" in text or "&& exec" in text
    assert not re.search(r"\[\[|^\s*(function|local)\b|<<<|\$'", text, re.M), "not POSIX"
    assert not re.search(r"`[^`\n]*`", re.sub(r"(#|echo|say|warn).*", "", text)), "use $(…)"


def test_dry_run_changes_nothing_and_names_each_package_with_its_purpose(bare: Path) -> None:
    fake(bare, "apt-get", f"touch {bare}/called")
    fake(bare, "id", "echo 0")
    done = run_bare(bare, "--dry-run", "test")
    assert done.returncode == 0, done.stderr
    assert re.search(r"qemu-system-x86 +runs the virtual machines", done.stdout)
    assert re.search(r"mmdebstrap +builds the image 'debian'", done.stdout)
    assert re.search(
        r"would run: apt-get update && apt-get install -y --no-install-recommends .*qemu-utils", done.stdout
    )
    assert "would run: python3 -m venv" in done.stdout
    assert "would run: uv sync --locked" in done.stdout
    assert "libvirt" not in done.stdout
    assert not (bare / "called").exists()
    assert not (bare / ".venv-tools").exists()


def test_levels_build_on_each_other(bare: Path) -> None:
    fake(bare, "apt-get", "exit 1")
    fake(bare, "id", "echo 0")

    def packages(level: str) -> set[str]:
        command = re.search(r"--no-install-recommends (.*)", run_bare(bare, "--dry-run", level).stdout)
        assert command
        return set(command[1].split())

    assert packages("demo") < packages("test") < packages("bench")


def test_without_rights_it_names_the_administrators_command_and_goes_on(bare: Path) -> None:
    fake(bare, "apt-get", f"touch {bare}/called")
    fake(bare, "id", "echo 1000")
    fake(bare, "uv", f'echo "$*" >>{bare}/uv-called')
    done = run_bare(bare, "demo")
    assert done.returncode == 1
    assert re.search(
        r"administrator to run:\n +apt-get install -y --no-install-recommends .*qemu-system-x86", done.stderr
    )
    assert "Still missing, with what it is for:" in done.stderr
    assert not (bare / "called").exists()
    assert "sync --locked" in (bare / "uv-called").read_text()


def test_sudo_is_used_where_it_asks_nothing(bare: Path) -> None:
    fake(bare, "apt-get", f'echo "$*" >>{bare}/called')
    fake(bare, "id", "echo 1000")
    fake(bare, "uv", "exit 0")
    fake(bare, "sudo", '[ "$1" = -n ] || exec "$@"')
    run_bare(bare, "demo")
    calls = (bare / "called").read_text().splitlines()
    assert calls[0].endswith("update")
    assert "install -y --no-install-recommends" in calls[1]


def test_a_failing_apt_get_shows_its_last_words(bare: Path) -> None:
    fake(bare, "apt-get", "echo 'E: no space' >&2; exit 100")
    fake(bare, "id", "echo 0")
    fake(bare, "uv", "exit 0")
    done = run_bare(bare, "demo")
    assert done.returncode == 1
    assert "E: no space" in done.stderr


def test_a_system_without_apt_is_told_what_it_needs(bare: Path) -> None:
    fake(bare, "uv", "exit 0")
    done = run_bare(bare, "demo")
    assert done.returncode == 1
    assert "no apt-get" in done.stderr


def test_a_uv_that_fails_to_install_leaves_no_half(bare: Path) -> None:
    fake(bare, "apt-get", "exit 0")
    fake(bare, "id", "echo 0")
    fake(bare, "python3", '[ "$2" != venv ] || { mkdir -p "$3/bin"; exit 1; }')
    done = run_bare(bare, "demo")
    assert done.returncode == 1
    assert "uv could not be installed" in done.stderr
    assert not (bare / ".venv-tools").exists()


def test_wrong_usage_is_refused() -> None:
    done = run("everything")
    assert done.returncode == 2
    assert "unknown argument 'everything'" in done.stderr
    assert "demo|test|bench" in run("--help").stdout


def test_where_nothing_is_missing_it_is_silent_and_quick() -> None:
    """The tests run on a machine that `setup.sh test` has set up, so there is nothing to do for `demo`."""
    took = []
    for _ in range(3):
        start = time.perf_counter()
        done = run("--dry-run", "demo")
        took.append(time.perf_counter() - start)
        assert done.returncode == 0, done.stderr
        assert "apt-get" not in done.stdout
    assert min(took) < 1.0


def test_make_lists_its_targets() -> None:
    done = subprocess.run(["make", "-C", str(ROOT), "--no-print-directory"], capture_output=True, text=True, check=True)
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.M)) - {"help", "setup"}
    assert targets == set(re.findall(r"^make ([a-z]+) ", done.stdout, flags=re.M))

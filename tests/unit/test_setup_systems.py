"""Systems that `host prepare` knows: each release is found, and ships what it ships; those that are only like them are not."""

import re

import pytest

from polyvisor.host.setup.systems import RELEASES, Family, assignments, identify
from tests.unit.setups import OS_RELEASES, UNKNOWN

WITH_XEN = {"debian-12", "debian-13", "ubuntu-22.04", "ubuntu-24.04", "leap-15.6", "tumbleweed", "sles-15", "fedora-42"}


@pytest.mark.parametrize("name", OS_RELEASES)
def test_a_release_is_found_and_ships_what_it_ships(name: str) -> None:
    system = identify(OS_RELEASES[name])
    assert system.release is not None
    assert system.name
    assert system.release.kvm
    assert bool(system.release.xen) is (name in WITH_XEN)
    assert bool(system.release.no_xen) is (name not in WITH_XEN)


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_only_like_a_known_system_is_unknown(name: str) -> None:
    assert identify(UNKNOWN[name]).release is None
    assert identify(UNKNOWN[name]).name


def test_no_two_releases_match_one_system() -> None:
    for text in OS_RELEASES.values():
        values = assignments(text)
        found = [r for r in RELEASES if values["ID"] in r.ids and re.fullmatch(r.versions, values["VERSION_ID"])]
        assert len(found) == 1


def test_every_release_is_among_the_tested() -> None:
    assert {identify(text).release for text in OS_RELEASES.values()} == set(RELEASES)


def test_packages_have_names_that_are_no_options() -> None:
    for release in RELEASES:
        for entry in (*release.kvm, *release.xen):
            assert all(
                re.fullmatch(r"[a-z0-9][a-z0-9+._-]+", name) for name in re.split(r"\|", entry.replace("_", "-"))
            )


def test_only_debians_family_is_set_up_by_us() -> None:
    assert {r.family for r in RELEASES if r.tried} <= {Family.DEBIAN}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("A=1\nA=2\n", {"A": "2"}),
        ("A='b c'\n", {"A": "b c"}),
        ('A="$B c" # why\n', {"A": "$B c"}),
        ("#A=1\n  B=2\nexport C=3\nif x; then D=4; fi\n", {"B": "2", "C": "3"}),
        ("A=\n", {"A": ""}),
        ('A="goes on\nB=1"\n', {}),
        ("A=`x -y 2> /dev/null || echo z`\n", {"A": "`x -y 2> /dev/null || echo z`"}),
    ],
)
def test_assignments_of_a_shell(text: str, found: dict[str, str]) -> None:
    assert assignments(text) == found

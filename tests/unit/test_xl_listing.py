"""What xl says of domains: `*-4.17-debian*` and `create-4.17-*` are captured. Other lines are written as xl's source is
understood (tools/xl/xl_list.c, xl_vmcontrol.c); nothing of versions other than 4.17 has been captured yet."""

from __future__ import annotations

from pathlib import Path

import pytest

from polyvisor.drivers.xen.listing import OURS, Told, parse_list, read_errors, read_log
from polyvisor.errors import ProcessFailed
from polyvisor.status import VMState

CAPTURED = Path(__file__).parents[1] / "captured" / "xl"
HVM, PV = "6f4d0a54-1f0a-4b5e-9d0e-2b7f6a1c9e13", "6f4d0a54-1f0a-4b5e-9d0e-2b7f6a1c9e22"
HEADER = "Name  ID  Mem VCPUs\tState\tTime(s)   UUID   Reason-Code\tSecurity Label\n"


def captured(name: str) -> str:
    return (CAPTURED / f"{name}.txt").read_text()


def test_a_list_of_domains() -> None:
    domains = parse_list(captured("list-v-4.17-debian"))
    assert len(domains) == 3
    assert (domains[PV].id, domains[PV].name, domains[PV].state) == (8, "e-pv2", "-b----")
    assert not domains[PV].paused and not domains[PV].shut_down and not domains[PV].dying
    assert parse_list(captured("list-v-4.17-debian-paused"))[PV].paused
    assert domains[HVM].state == "------", "it waits for a CPU"


@pytest.mark.parametrize(
    ("name", "state", "reason", "shut_down"),
    [
        ("a name with 3 blanks", "r-----", "-", False),
        ("(null)", "-----d", "-", False),
        ("x", "---s--", "3", True),
        ("x", "--psc-", "3", True),
        ("x", "--psr-", "3", True),
        ("n" * 63, "--p---", "-", False),
    ],
)
def test_lines_of_other_people(name: str, state: str, reason: str, shut_down: bool) -> None:
    domain = parse_list(f"{HEADER}{name:40} 12   128     1     {state}       0.1 {HVM} {reason:>8}      sys:dom\n")[HVM]
    assert (domain.name, domain.id, domain.state, domain.shut_down) == (name, 12, state, shut_down)
    assert domain.reason == (3 if reason == "3" else None)
    assert domain.dying == (state[5] == "d")


@pytest.mark.parametrize(
    "text", ["", "xl: cannot reach xenstored", HEADER + "web 1 128", "Name ID Mem\nweb 1 2 3 r-----"]
)
def test_what_is_no_list_is_an_error(text: str) -> None:
    with pytest.raises(ProcessFailed, match="xl"):
        parse_list(text)


def test_a_guest_that_powers_off() -> None:
    told = read_log(captured("create-4.17-poweroff"))
    assert told == Told(domain=1, pid=632, boots=1, state=VMState.STOPPED)


def test_a_guest_that_reboots_goes_on_as_another_domain() -> None:
    assert read_log(captured("create-4.17-reboot")) == Told(domain=5, pid=637, boots=2)


def test_at_every_line_the_log_says_what_is_known() -> None:
    lines = captured("create-4.17-reboot").splitlines()
    states = [read_log("\n".join(lines[:n])).state for n in range(len(lines) + 1)]
    assert states == [None, None, None, VMState.STOPPED, VMState.STOPPED, VMState.STOPPED, None, None]


def test_a_start_that_is_refused_has_no_domain() -> None:
    assert read_log(captured("create-4.17-refused")) == Told()


@pytest.mark.parametrize(
    ("lines", "state", "reason"),
    [
        (["Domain 1 has shut down, reason code 3 0x3"], VMState.CRASHED, "kernel has crashed"),
        (["Domain 1 has shut down, reason code 4 0x4"], VMState.CRASHED, "watchdog"),
        (["Domain 1 has shut down, reason code 1 0x1"], VMState.STOPPED, None),
        (["Domain 1 has been destroyed."], VMState.CRASHED, "somebody else"),
        ([OURS, "Domain 1 has been destroyed."], VMState.STOPPED, None),
        (["Domain 1 has shut down, reason code 0 0x0", "Domain 1 has been destroyed."], VMState.STOPPED, None),
    ],
)
def test_why_a_domain_ended(lines: list[str], state: VMState, reason: str | None) -> None:
    told = read_log("\n".join(["Waiting for domain x (domid 1) to die [pid 7]", *lines]))
    assert told.state is state
    assert (reason in (told.reason or "")) if reason else told.reason is None


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "no-bridge",
            "/etc/xen/scripts/vif-bridge online [5228] exited with error status 1; script: Could not find bridge device nosuch",
        ),
        (
            "no-kernel",
            "failed to open file '/var/lib/polyvisor/images/store/27a1a6ab025c/nosuch': No such file or directory: "
            "Internal error; xc_dom_kernel_file failed: No such file or directory",
        ),
        (
            "no-memory",
            "can't allocate low memory for domain: Out of memory; xc_dom_boot_mem_init failed: Cannot allocate memory",
        ),
    ],
)
def test_why_a_domain_could_not_be_made(name: str, said: str) -> None:
    assert read_errors(captured(f"create-4.17-debian-{name}")) == said


def test_other_words_of_a_failure_are_kept_whole() -> None:
    assert read_errors("xl.cfg:3: config parsing error near `=': syntax error\n") == (
        "xl.cfg:3: config parsing error near `=': syntax error"
    )
    assert read_errors("Parsing config from xl.cfg\n") is None

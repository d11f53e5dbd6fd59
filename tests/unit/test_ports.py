"""Ports of this host: what is taken is refused, what is left open is found, what was had is kept."""

import socket
from collections.abc import Iterator

import pytest

from polyvisor.errors import InvalidInput
from polyvisor.network.ports import chosen_forwards, wanted_forwards
from polyvisor.spec.forward import Forward

KINDS = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}


@pytest.fixture(params=["tcp", "udp"])
def taken(request: pytest.FixtureRequest) -> Iterator[Forward]:
    """A port that another process has, as slirp holds it: others may come after it as far as it is concerned.

    For the other protocol nobody has it: another test might, by chance.
    """
    [unlike] = KINDS.keys() - {request.param}
    for _ in range(100):
        with socket.socket(socket.AF_INET, KINDS[request.param]) as other:
            other.bind(("127.0.0.1", 0))
            if not is_free(other.getsockname()[1], unlike):
                continue
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if request.param == "tcp":
                other.listen(1)
            yield Forward(host_port=other.getsockname()[1], guest_port=80, protocol=request.param)
            return
    pytest.fail("there is no port that both protocols have free")


def is_free(port: int, protocol: str) -> bool:
    with socket.socket(socket.AF_INET, KINDS[protocol]) as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_port_that_is_taken_is_refused_by_number(taken: Forward) -> None:
    with pytest.raises(InvalidInput) as caught:
        chosen_forwards([Forward(host_port=0, guest_port=22), taken])
    assert caught.value.field == "forwards[1]"
    assert str(taken.host_port) in caught.value.message
    assert ":80" in (caught.value.hint or "")


def test_a_port_that_is_taken_everywhere_is_refused_on_one_address() -> None:
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen(1)
        with pytest.raises(InvalidInput, match="can't be had"):
            chosen_forwards([Forward(host_port=other.getsockname()[1], guest_port=80)])


def test_the_other_protocol_has_ports_of_its_own(taken: Forward) -> None:
    protocol = "udp" if taken.protocol == "tcp" else "tcp"
    wanted = Forward(host_port=taken.host_port, guest_port=80, protocol=protocol)
    assert chosen_forwards([wanted]) == (wanted,)


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"192\.0\.2\.1"):
        chosen_forwards([Forward(host_port=free_port(), guest_port=80, host_address="192.0.2.1")])
    with pytest.raises(InvalidInput, match=r"192\.0\.2\.1"):
        chosen_forwards([Forward(host_port=0, guest_port=80, host_address="192.0.2.1")])


def test_any_free_port_will_do_and_the_last_one_is_kept() -> None:
    wanted = [Forward(host_port=0, guest_port=22)]
    first = chosen_forwards(wanted)
    assert first[0].host_port > 0
    assert chosen_forwards(wanted, first) == first


def test_the_last_port_is_given_up_where_another_has_it(taken: Forward) -> None:
    [chosen] = chosen_forwards([Forward(host_port=0, guest_port=80, protocol=taken.protocol)], [taken])
    assert chosen.host_port not in (0, taken.host_port)


def test_two_open_ports_to_one_port_of_the_guest_differ_and_are_both_kept() -> None:
    wanted = [Forward(host_port=0, guest_port=80)] * 3
    first = chosen_forwards(wanted)
    assert len({f.host_port for f in first}) == 3
    assert chosen_forwards(wanted, first) == first


def test_an_open_port_keeps_clear_of_those_asked_for() -> None:
    port = free_port()
    asked, any_port = Forward(host_port=port, guest_port=80), Forward(host_port=0, guest_port=22)
    chosen = chosen_forwards([any_port, asked], [Forward(host_port=port, guest_port=22)])
    assert chosen[1] == asked
    assert chosen[0].host_port != port


def test_a_forward_that_stands_twice() -> None:
    twice = Forward(host_port=free_port(), guest_port=80)
    with pytest.raises(InvalidInput, match=r"forwards\[1\].*twice"):
        chosen_forwards([twice, twice])


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0"])
def test_one_port_cant_lead_to_two_places(address: str) -> None:
    port = free_port()
    with pytest.raises(InvalidInput, match=rf"forwards\[1\].*port {port} .* is asked for twice"):
        chosen_forwards(
            [Forward(host_port=port, guest_port=80), Forward(host_port=port, guest_port=81, host_address=address)]
        )


def test_a_privileged_port_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("polyvisor.network.ports.socket.socket.bind", refused)
    with pytest.raises(InvalidInput) as caught:
        chosen_forwards([Forward(host_port=80, guest_port=80)])
    assert "ports below 1024 need rights" in (caught.value.hint or "")


def test_a_way_to_ssh_is_wanted_unless_there_is_one() -> None:
    assert [f.guest_port for f in wanted_forwards([], ssh=True)] == [22]
    assert [f.guest_port for f in wanted_forwards(["8080:80"], ssh=True)] == [80, 22]
    assert [f.host_port for f in wanted_forwards(["2222:22"], ssh=True)] == [2222]
    assert [f.guest_port for f in wanted_forwards(["2222:22/udp"], ssh=True)] == [22, 22]
    assert wanted_forwards([], ssh=False) == []

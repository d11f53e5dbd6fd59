"""Port forwards as people write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyvisor.errors import InvalidInput
from polyvisor.spec.forward import Forward, parse_forward
from tests.unit.specs import QUICK, forwards


@QUICK
@given(forwards)
def test_what_a_forward_prints_is_read_back_as_the_same(forward: Forward) -> None:
    assert parse_forward(str(forward)) == forward


@QUICK
@given(st.text())
def test_any_text_is_a_forward_or_refused(text: str) -> None:
    try:
        forward = parse_forward(text, "forwards[3]")
    except InvalidInput as error:
        assert error.field == "forwards[3]"
        assert error.message.isprintable()
    else:
        assert parse_forward(str(forward)) == forward


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2222:22", Forward(host_port=2222, guest_port=22)),
        ("22", Forward(host_port=0, guest_port=22)),
        (":22", Forward(host_port=0, guest_port=22)),
        ("0:22", Forward(host_port=0, guest_port=22)),
        ("::22", None),
        (":2222:22", None),
        ("0.0.0.0:8080:80", Forward(host_port=8080, guest_port=80, host_address="0.0.0.0")),
        ("0.0.0.0::80", Forward(host_port=0, guest_port=80, host_address="0.0.0.0")),
        ("53:53/udp", Forward(host_port=53, guest_port=53, protocol="udp")),
        ("53:53/tcp", Forward(host_port=53, guest_port=53)),
        ("53:53/sctp", None),
        ("53:53/", None),
        ("", None),
        (":", None),
        ("22:", None),
        ("65536:22", None),
        ("1:65536", None),
        ("1:0", None),
        ("-1:22", None),
        ("99999999999999999999:22", None),
        ("1:2:3:4", None),
        ("localhost:80:80", None),
        ("127.0.0.1,x:80:80", None),
        ("256.0.0.1:80:80", None),
        ("٢:22", None),
        ("2²:22", None),
        ("80:80\n", None),
        (" 80:80", None),
    ],
)
def test_forms(text: str, expected: Forward | None) -> None:
    if expected is not None:
        assert parse_forward(text) == expected
        return
    with pytest.raises(InvalidInput) as caught:
        parse_forward(text)
    assert caught.value.hint
    assert caught.value.message.isprintable()

"""What verbs share: JSON, lines for people, errors on one line."""

import json
from pathlib import Path

import pytest

from polyvisor.cli.context import Context, report, to_json
from polyvisor.errors import NotFound, PolyvisorError, ProcessFailed
from polyvisor.spec.forward import Forward
from polyvisor.status import VMState, VMStatus

STATUS = VMStatus(
    name="é",
    id="1",
    state=VMState.RUNNING,
    vcpus=1,
    memory_mib=128,
    created_at=0.5,
    forwards=(Forward(host_port=1, guest_port=2),),
    labels={"a": "b"},
)


def test_values_as_json() -> None:
    plain = json.loads(to_json([STATUS]))[0]
    assert plain["state"] == "running"
    assert plain["name"] == "é"
    assert plain["pid"] is None
    assert plain["forwards"] == [{"host_port": 1, "guest_port": 2, "host_address": "127.0.0.1", "protocol": "tcp"}]
    assert "é" in to_json(STATUS)
    assert "\n" not in to_json(STATUS, indent=None)
    assert json.loads(to_json({"path": Path("/x"), "state": VMState.PAUSED})) == {"path": "/x", "state": "paused"}


def test_people_are_spoken_to_unless_a_program_listens(capsys: pytest.CaptureFixture[str]) -> None:
    Context().say("out")
    Context().note("err")
    assert capsys.readouterr() == ("out\n", "err\n")
    Context(json=True).say("out")
    Context(json=True).note("err")
    assert capsys.readouterr() == ("", "")


def test_an_error_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    report(NotFound("one\n  two\x1b[2J", hint="do\nthis"), Context())
    assert capsys.readouterr() == ("", "polyvisor: one two\\x1b[2J (do this)\n")
    report(PolyvisorError("no hint"), Context())
    assert capsys.readouterr().err == "polyvisor: no hint\n"


def test_an_error_in_json_is_one_line_too(capsys: pytest.CaptureFixture[str]) -> None:
    report(NotFound("one\ntwo", hint="x"), Context(json=True))
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert json.loads(err) == {"error": {"code": "not-found", "message": "one\ntwo", "hint": "x"}}


def test_with_debug_the_trace_and_the_failed_command(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        raise ProcessFailed(["qemu-img", "in fo"], 1, "all that\nit said\n")
    except ProcessFailed as error:
        report(error, Context(debug=True))
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "command: qemu-img 'in fo'\nall that\nit said\n" in err
    assert err.endswith("polyvisor: qemu-img: it said\n")


def test_the_bar_is_taken_away_whatever_happens() -> None:
    context = Context()
    closed: list[bool] = []

    async def work() -> int:
        context.progress.close = lambda: closed.append(True)  # type: ignore[method-assign]
        raise NotFound("x")

    with pytest.raises(NotFound):
        context.run(work())
    assert closed == [True]

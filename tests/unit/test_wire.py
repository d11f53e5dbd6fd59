"""What goes over the wire: verbs and their arguments, and errors, which survive; what a hostile host sends does no harm."""

import inspect
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyvisor.errors import InvalidInput, PolyvisorError, ProcessFailed, ProtocolError, one_line
from polyvisor.host.api import HostApi
from polyvisor.operation import Step
from polyvisor.remote.host import RemoteHost
from polyvisor.remote.wire import LOOKS, REPEATABLE, STREAMS, decode, encode, failure, raised, verbs
from polyvisor.spec.forward import Forward
from polyvisor.spec.vm import VMSpec
from tests.unit.specs import QUICK, forwards, specs
from tests.unit.test_errors import all_errors

# Verbs that are neither looks nor repeatable: of a half of them nobody knows how far it came.
ONCE = {
    *("run", "create", "fork", "run_from", "template_create", "template_remove"),
    *("reboot", "remove", "remove_forward", "image_remove"),
    *("disk_add", "disk_remove", "nic_add", "nic_remove"),
    *("snapshot_create", "snapshot_remove", "clone", "vm_import"),
}

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
)


def over_the_wire(message: dict[str, Any]) -> dict[str, Any]:
    line = encode(message)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    return decode(line)


class TestVerbs:
    def test_every_verb_of_a_host_is_called_or_is_a_stream(self) -> None:
        declared = {name for name, member in vars(HostApi).items() if inspect.isfunction(member) and name[0] != "_"}
        assert verbs().keys() == declared - {*STREAMS, "close"}
        assert set(STREAMS) < declared

    def test_each_is_a_look_or_repeatable_or_done_once(self) -> None:
        assert {*LOOKS, *REPEATABLE} | ONCE == verbs().keys()
        assert len(LOOKS) + len(REPEATABLE) + len(ONCE) == len(verbs())

    @pytest.mark.parametrize("name", verbs())
    def test_a_remote_host_takes_what_a_host_takes(self, name: str) -> None:
        there = inspect.signature(getattr(RemoteHost, name)).parameters
        assert [(p.name, p.kind) for p in there.values()] == [
            (p.name, p.kind) for p in inspect.signature(getattr(HostApi, name)).parameters.values()
        ]

    def test_progress_is_no_argument(self) -> None:
        assert verbs()["run"].progress
        assert not verbs()["kill"].progress
        assert all("progress" not in verb.parameters for verb in verbs().values())


class TestArguments:
    @QUICK
    @given(specs, st.booleans())
    def test_specs_arrive_as_they_were(self, spec: VMSpec, new: bool) -> None:
        raw = over_the_wire({"params": {"spec": spec, "new": new}})["params"]
        assert verbs()["run"].arguments(raw) == {"spec": spec, "new": new}

    @QUICK
    @given(forwards)
    def test_forwards_arrive_as_they_were(self, forward: Forward) -> None:
        raw = over_the_wire({"params": {"name": "a", "forward": forward}})["params"]
        assert verbs()["add_forward"].arguments(raw) == {"name": "a", "forward": forward}

    def test_names_arrive_as_they_were(self) -> None:
        assert verbs()["fork"].arguments({"name": "a", "names": ["b", "c"]}) == {"name": "a", "names": ("b", "c")}
        assert verbs()["memory_use"].arguments({"names": []}) == {"names": ()}

    def test_options_are_text_numbers_or_nothing(self) -> None:
        raw = {"kind": "debian", "suite": "bookworm", "size_gib": 3, "mirror": None}
        assert verbs()["image_build"].arguments(raw) == raw

    def test_what_has_a_default_may_be_left_out(self) -> None:
        assert verbs()["stop"].arguments({"name": "a"}) == {"name": "a"}
        assert verbs()["status"].arguments({}) == {}

    @pytest.mark.parametrize(
        ("verb", "raw", "field", "problem"),
        [
            ("start", {}, "name", "is missing for start"),
            ("start", None, "params", "is not a mapping"),
            ("start", ["a"], "params", "is not a mapping"),
            ("start", {"name": "a", "nope": 1}, "nope", "is unknown to start"),
            ("start", {"name": "a", "progress": 1}, "progress", "is unknown to start"),
            ("start", {"name": "a", "self": 1}, "self", "is unknown to start"),
            ("start", {"name": 5}, "name", "is not text"),
            ("start", {"name": None}, "name", "is not text"),
            ("stop", {"name": "a", "timeout_s": "5"}, "timeout_s", "is not a number"),
            ("stop", {"name": "a", "timeout_s": True}, "timeout_s", "is not a number"),
            ("remove", {"name": "a", "force": 1}, "force", "is not true or false"),
            ("run", {"spec": {"name": "../a", "image": "tiny"}}, "spec.name", "is not a VM name"),
            ("run", {"spec": {"name": "a", "image": "tiny", "x": 1}}, "spec.x", "is an unknown key"),
            ("run", {"spec": "a"}, "spec", "is not a mapping"),
            ("fork", {"name": "a", "names": "b"}, "names", "is not a list"),
            ("fork", {"name": "a", "names": [1]}, "names[0]", "is not text"),
            ("image_build", {"kind": "tiny", "size": 1.5}, "size", "is neither text nor a whole number"),
            ("image_build", {"kind": "tiny", "size": ["a"]}, "size", "is neither text nor a whole number"),
            ("image_build", {"kind": ["tiny"]}, "kind", "is not text"),
        ],
    )
    def test_others_are_refused(self, verb: str, raw: object, field: str, problem: str) -> None:
        with pytest.raises(InvalidInput, match=problem) as caught:
            verbs()[verb].arguments(raw)
        assert caught.value.field == field

    @QUICK
    @given(st.sampled_from(sorted(verbs())), anything | st.dictionaries(st.sampled_from(("name", "spec")), anything))
    def test_whatever_comes_is_accepted_or_refused(self, verb: str, raw: object) -> None:
        try:
            verbs()[verb].arguments(raw)
        except InvalidInput as error:
            assert len(error.message) < 300


class TestMessages:
    def test_dataclasses_become_plain_data(self) -> None:
        assert json.loads(encode({"params": Step("downloading", 1)})) == {
            "jsonrpc": "2.0",
            "params": {"phase": "downloading", "done": 1},
        }

    @pytest.mark.parametrize(
        "line",
        [
            b"",
            b"\n",
            b"hello\n",
            b"\xff\xfe\n",
            b"[]\n",
            b"5\n",
            b"{}\n",
            b'{"jsonrpc": "1.0"}\n',
            b'{"jsonrpc": 2.0}\n',
            b"[" * 100_000,
            b'{"jsonrpc": "2.0", "id": ' + b"9" * 5000 + b"}\n",
        ],
    )
    def test_what_is_no_message(self, line: bytes) -> None:
        with pytest.raises(ProtocolError) as caught:
            decode(line)
        assert len(caught.value.message) < 400


def made(kind: type[PolyvisorError]) -> PolyvisorError:
    """An error of `kind` with everything set."""
    if kind is ProcessFailed:
        return ProcessFailed(["qemu-img", "info x"], 4, "first\nlast", hint="do this")
    if issubclass(kind, InvalidInput):
        return kind("disks[0].size_gib", 0, "is out of range", hint="do this")
    return _with_details(kind)


def _with_details(kind: type[PolyvisorError]) -> PolyvisorError:
    error = kind.__new__(kind)
    PolyvisorError.__init__(error, "what failed, on “what”", hint="do this")
    for key in kind.details:
        setattr(error, key, f"the {key}")
    return error


class TestErrors:
    @pytest.mark.parametrize("kind", all_errors())
    def test_every_error_survives(self, kind: type[PolyvisorError]) -> None:
        error = made(kind)
        again = raised(over_the_wire({"id": 1, "error": failure(error)})["error"])
        assert type(again) is kind
        assert str(again) == str(error) == again.message
        assert again.to_dict() == error.to_dict()
        assert {key: getattr(again, key) for key in kind.details} == {key: getattr(error, key) for key in kind.details}

    def test_without_a_hint_there_is_none(self) -> None:
        assert raised(failure(PolyvisorError("x"))).hint is None

    def test_a_failed_process_still_tells_its_command(self) -> None:
        again = raised(over_the_wire({"error": failure(ProcessFailed(["a b", "c"], 1, ""))})["error"])
        assert isinstance(again, ProcessFailed)
        assert again.command() == "'a b' c"

    def test_values_that_json_has_no_word_for_are_sent_as_text(self) -> None:
        again = raised(over_the_wire({"error": failure(InvalidInput("a", {1, 2}, "is a set"))})["error"])
        assert isinstance(again, InvalidInput)
        assert again.value == "{1, 2}"

    @pytest.mark.parametrize(
        "garbage",
        [None, 5, "no", [], {}, {"data": 5}, {"data": []}, {"message": ["x"]}, {"data": {}}, {"data": {"code": []}}],
    )
    def test_an_error_that_is_none_is_an_error_all_the_same(self, garbage: object) -> None:
        error = raised(garbage)
        assert isinstance(error, PolyvisorError)
        assert one_line(error.message).isprintable()

    def test_one_of_unknown_kind_keeps_its_words(self) -> None:
        error = raised({"code": -32000, "data": {"code": "from-the-future", "message": "m", "hint": "h"}})
        assert type(error) is PolyvisorError
        assert (error.message, error.hint) == ("m", "h")

    @QUICK
    @given(
        anything
        | st.fixed_dictionaries(
            {
                "data": st.fixed_dictionaries(
                    {"code": st.sampled_from([kind.code for kind in all_errors()]) | anything},
                    optional={"message": anything, "hint": anything, "details": anything},
                )
            },
            optional={"message": anything},
        )
    )
    def test_whatever_a_hostile_host_says_is_an_error_of_ours(self, garbage: object) -> None:
        error = raised(garbage)
        assert isinstance(error, PolyvisorError)
        assert all(isinstance(value, str | None) for value in error.to_dict().values())

    @pytest.mark.parametrize(
        "details", [None, [], {}, {"argv": None}, {"argv": "a b"}, {"argv": [1, None], "stderr": [], "status": "x"}]
    )
    def test_a_failed_process_without_its_parts_can_be_shown(self, details: object) -> None:
        error = raised({"data": {"code": "process-failed", "message": "m", "details": details}})
        assert isinstance(error, ProcessFailed)
        assert isinstance(error.command(), str)
        assert isinstance(error.stderr.rstrip(), str)

    def test_nor_does_it_matter_how_deep_it_is(self) -> None:
        deep: object = None
        for _ in range(100_000):
            deep = [deep]
        for garbage in (deep, {"message": deep}, {"data": {"message": deep, "hint": deep, "code": deep}}):
            assert isinstance(raised(garbage), PolyvisorError)
        while isinstance(deep, list):  # or Python would free it recursively
            deep = deep.pop()

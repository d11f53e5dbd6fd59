"""Spec files: what YAML gives, and everything that it must not do to us."""

import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given

from polyvisor.errors import InvalidInput, NotFound, PolyvisorError
from polyvisor.spec.load import MAX_FILE, load_specs, read_specs, read_ssh_key
from polyvisor.spec.parse import unstructure
from polyvisor.spec.vm import Nic, VMSpec
from tests.unit.specs import QUICK, specs

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIPhgn9Y me@laptop"
VM = "name: a\nimage: tiny\n"


def refused(text: str) -> str:
    with pytest.raises(InvalidInput) as caught:
        load_specs(text, "vm.yaml")
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 300
    return caught.value.message


@QUICK
@given(specs)
def test_a_spec_survives_a_file(spec: VMSpec) -> None:
    text = yaml.safe_dump(unstructure(spec), allow_unicode=True)
    assert load_specs(text, "x") == [spec]


def test_several_documents_are_several_machines() -> None:
    assert [s.name for s in load_specs(f"---\n{VM}---\nname: b\nimage: tiny\n---\n", "x")] == ["a", "b"]


def test_json_is_a_spec_too() -> None:
    assert load_specs('{"name": "a", "image": "tiny", "vcpus": 2}', "x")[0].vcpus == 2


@pytest.mark.parametrize("forward", ["2222:22", "8080:80", "0.0.0.0:8080:80", "53:53/udp", ":22"])
def test_ports_need_no_quotes(forward: str) -> None:
    """YAML 1.1 takes 2222:22 for a number to the base of sixty."""
    [spec] = load_specs(f"{VM}nics:\n- forwards:\n  - {forward}\n", "x")
    assert spec.nics == (Nic(forwards=(forward,)),)


def test_mac_addresses_need_no_quotes() -> None:
    assert load_specs(f"{VM}nics: [{{mac: 52:54:00:12:34:56}}]", "x")[0].nics[0].mac == "52:54:00:12:34:56"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "holds no spec"),
        ("---\n---\n", "holds no spec"),
        ("# nothing\n", "holds no spec"),
        ("a: &x 1\nb: *x", "line 2: aliases (*name) are not allowed"),
        ("a: &x [1]\n<<: *x", "aliases"),
        ("name: a\nimage: b\nname: c", "line 3: the key 'name' stands twice"),
        (f"{VM}nics: [{{network: user, network: none}}]", "line 3: the key 'network' stands twice"),
        ("[" * 50 + "]" * 50, "line 1: nesting is deeper than 20"),
        ("a:\n" + "\n".join(" " * i + "- " for i in range(1, 60)), "nesting is deeper"),
        ("name: [", "line 1:"),
        ("name: 'a", "line 1:"),
        ("\tname: a", "line 1:"),
        ("name: a\0b", "is not valid YAML"),
        ("name: \x07", "is not valid YAML"),
        ("name: !!python/object/apply:os.system [id]", "line 1: could not determine a constructor"),
        ("? [a, b]\n: c", "line 1:"),
        ("? {a: b}\n: c", "line 1:"),
        ("{[a]: b}", "line 1:"),
        ("name: 2001-99-99", "is not valid YAML"),
        ("!!set {a, b}", "is not a mapping"),
        ("<<: 5", "line 1:"),
        ("%YAML 3.0\n---\na: b", "is not valid YAML"),
        ("just text", "is not a mapping"),
        ("- name: a", "is not a mapping"),
        (f"{VM}vcpus: 0x{'f' * 5000}", "vcpus: "),
        (f"{VM}vcpus: {'9' * 5000}", "is not valid YAML"),
        (f"{VM}vcpus: .nan", "vcpus: nan: is not a whole number"),
        (f"{VM}vcpus: yes", "vcpus: True: is not a whole number"),
        ('name: a\nimage: "\\ud800"', "image: "),
        (f'{VM}user_data: "\\ud800"', "user_data: "),
        (f"{VM}ssh_keys: {{a: b}}", "ssh_keys: "),
        (f"{VM}ssh_keys: [5]", "ssh_keys[0]: 5: is not text"),
        (f"{VM}ssh_keys: [/nowhere/key.pub]", "ssh_keys[0]: '/nowhere/key.pub': can't be read: No such file"),
    ],
)
def test_files_that_are_refused_in_one_line(text: str, problem: str) -> None:
    assert problem in refused(text)


def test_a_bomb_of_aliases_is_refused_before_it_goes_off() -> None:
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60))
    began = time.perf_counter()
    assert "aliases" in refused(bomb)
    assert time.perf_counter() - began < 1


def test_nesting_of_a_hundred_thousand_brackets_is_refused_quickly() -> None:
    began = time.perf_counter()
    assert "nesting" in refused("[" * 100_000)
    assert time.perf_counter() - began < 5


def test_size_is_bounded_before_parsing() -> None:
    assert "larger than 1 MiB" in refused("# " + "x" * MAX_FILE)


@pytest.mark.parametrize("filler", ["x", "é", "€"])
def test_a_large_file_is_refused_for_its_size_never_cut(tmp_path: Path, filler: str) -> None:
    for offset in range(3):
        file = tmp_path / "vm.yaml"
        file.write_text(f"{VM}# {'x' * offset}{filler * MAX_FILE}")
        with pytest.raises(InvalidInput, match="is larger than 1 MiB"):
            read_specs(file)


def test_a_file_without_end_is_refused() -> None:
    with pytest.raises(InvalidInput, match="larger than 1 MiB"):
        read_specs(Path("/dev/zero"))


def test_a_byte_order_mark_is_no_part_of_the_spec(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbf" + VM.encode())
    assert read_specs(tmp_path / "a")[0].name == "a"


@pytest.mark.parametrize("raw", [b"name: \xff", b"\xfe\xffn\0a", b"\x7fELF\x02\x01\x80"])
def test_a_file_that_is_no_text(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "a").write_bytes(raw)
    with pytest.raises(InvalidInput, match="is not text in UTF-8"):
        read_specs(tmp_path / "a")


def test_files_that_cant_be_read(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="there is no file"):
        read_specs(tmp_path / "absent")
    with pytest.raises(PolyvisorError, match="Is a directory"):
        read_specs(tmp_path)
    with pytest.raises(PolyvisorError, match="File name too long"):
        read_specs(tmp_path / ("x" * 300))
    with pytest.raises(PolyvisorError, match="Not a directory"):
        read_specs(Path("/dev/null/x"))


class TestKeys:
    def test_the_key_itself(self) -> None:
        assert read_ssh_key(f"{KEY}\n") == KEY

    def test_a_file_that_holds_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "id.pub").write_text(f"{KEY}\n")
        monkeypatch.setenv("HOME", str(tmp_path))
        assert read_ssh_key("~/id.pub") == KEY
        assert load_specs(f"{VM}ssh_keys: [~/id.pub, {KEY}]", "x")[0].ssh_keys == (KEY, KEY)

    @pytest.mark.parametrize("kind", ["OPENSSH ", "RSA ", "", "ENCRYPTED "])
    def test_a_private_key_is_refused_and_not_shown(self, tmp_path: Path, kind: str) -> None:
        (tmp_path / "id").write_text(f"-----BEGIN {kind}PRIVATE KEY-----\nsecret\n")
        with pytest.raises(InvalidInput, match="is a private key") as caught:
            read_ssh_key(str(tmp_path / "id"), "ssh_keys[0]")
        assert "secret" not in str(caught.value)
        assert caught.value.hint == f"use {tmp_path}/id.pub"

    def test_a_file_without_a_key_is_named_and_not_shown(self, tmp_path: Path) -> None:
        (tmp_path / "shadow").write_text("root:secret:19000\n")
        with pytest.raises(InvalidInput) as caught:
            load_specs(f"{VM}ssh_keys: [{tmp_path}/shadow]", "x")
        assert caught.value.field == "ssh_keys[0]"
        assert "secret" not in str(caught.value)
        assert caught.value.value == f"{tmp_path}/shadow"

    def test_what_can_be_no_file(self, tmp_path: Path) -> None:
        (tmp_path / "bytes").write_bytes(b"\xff\xfe")
        for text in ("", "a\0b", "x" * 5000, "~nobody-of-this-name/key", str(tmp_path), str(tmp_path / "bytes")):
            with pytest.raises(InvalidInput, match="can't be read") as caught:
                read_ssh_key(text)
            assert caught.value.hint

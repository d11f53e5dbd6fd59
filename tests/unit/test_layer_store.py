"""The store of frozen layers: who stands on what, and that nothing is removed under anybody."""

import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyvisor.errors import NotFound, PolyvisorError
from polyvisor.storage.layers import DISK, LayerStore

SIZE = 5 << 20


@pytest.fixture
def store(tmp_path: Path) -> LayerStore:
    return LayerStore(tmp_path / "layers")


def disk(path: Path, content: bytes = b"") -> Path:
    """A file that says as much of itself as a qcow2 disk does there where its size stands."""
    path.write_bytes(b"QFI\xfb" + bytes(20) + struct.pack(">Q", SIZE) + content)
    return path


def froze(store: LayerStore, path: Path, parent: str | None = None) -> str:
    with store.frozen([(disk(path), parent)], "a") as (layer,):
        return layer.id


def test_freezing_copies_nothing(store: LayerStore, tmp_path: Path) -> None:
    path = disk(tmp_path / "disk0.qcow2")
    with store.frozen([(path, None)], "a") as (layer,):
        assert path.samefile(store.file(layer.id))
    assert store.get(layer.id) == layer
    assert (layer.of, layer.size, layer.parent) == ("a", SIZE, None)


def test_a_chain_is_from_the_top_down(store: LayerStore, tmp_path: Path) -> None:
    first = froze(store, tmp_path / "1")
    second = froze(store, tmp_path / "2", first)
    third = froze(store, tmp_path / "3", second)
    assert [layer.id for layer in store.chain(third)] == [third, second, first]
    assert store.files(third) == tuple(map(store.file, (third, second, first)))
    assert store.files(None) == ()


def test_a_layer_that_was_merged_is_left_out(store: LayerStore, tmp_path: Path) -> None:
    first = froze(store, tmp_path / "1")
    second = froze(store, tmp_path / "2", first)
    store.file(first).rename(store.file(second))
    assert store.files(second) == (store.file(second),)


def test_what_stands_on_itself_is_refused(store: LayerStore, tmp_path: Path) -> None:
    first = froze(store, tmp_path / "1")
    path = store.path / first / "layer.json"
    path.write_text(path.read_text().replace('"of"', f'"parent": "{first}",\n  "of"'))
    with pytest.raises(PolyvisorError, match="stands on itself"):
        store.chain(first)


def test_a_layer_goes_when_nobody_stands_on_it(store: LayerStore, tmp_path: Path) -> None:
    first = froze(store, tmp_path / "1")
    second = froze(store, tmp_path / "2", first)
    other = froze(store, tmp_path / "3")
    assert store.sweep(lambda: {second}) == [other]
    assert store.ids() == sorted([first, second])
    assert set(store.sweep(set)) == {first, second}
    assert list(store.path.iterdir()) == []
    with pytest.raises(NotFound):
        store.get(first)


def test_what_is_held_stays_with_all_below_it(store: LayerStore, tmp_path: Path) -> None:
    first = froze(store, tmp_path / "1")
    second = froze(store, tmp_path / "2", first)
    with store.held(second, None):
        assert store.sweep(set) == []
    assert len(store.sweep(set)) == 2
    with pytest.raises(NotFound, match="just been removed"), store.held(second):
        pass


def test_layers_are_held_while_they_are_made(store: LayerStore, tmp_path: Path) -> None:
    with store.frozen([(disk(tmp_path / "1"), None)], "a") as (layer,):
        assert store.sweep(set) == []
    assert store.sweep(set) == [layer.id]


def test_a_record_that_comes_between_is_seen(store: LayerStore, tmp_path: Path) -> None:
    """Somebody who held it let go after the first look, having written that it stands on it."""
    first = froze(store, tmp_path / "1")
    looks = iter([set(), {first}])
    assert store.sweep(lambda: next(looks)) == []


def test_nothing_is_removed_where_the_records_cant_be_read(store: LayerStore, tmp_path: Path) -> None:
    first = froze(store, tmp_path / "1")

    def fails() -> set[str]:
        raise PolyvisorError("a record can't be understood")

    with pytest.raises(PolyvisorError):
        store.sweep(fails)
    assert store.ids() == [first]


def test_what_a_killed_command_left_is_removed(store: LayerStore, tmp_path: Path) -> None:
    froze(store, tmp_path / "1")
    for name in (".new-x", ".rm-y"):
        (store.path / name).mkdir()
        (store.path / name / DISK).touch()
    store.sweep(set)
    assert list(store.path.iterdir()) == []


def test_a_sealed_layer_is_written_to_by_nobody(store: LayerStore, tmp_path: Path) -> None:
    layer = froze(store, tmp_path / "1")
    store.seal(layer)
    store.seal(layer)
    assert store.file(layer).stat().st_mode & 0o333 == 0


def test_a_link_in_the_place_of_a_disk_is_not_followed(store: LayerStore, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(disk(tmp_path / "secret"))
    with pytest.raises(PolyvisorError), store.frozen([(tmp_path / "link", None)], "a"):
        pass
    assert store.ids() == []


def test_what_is_no_disk_is_refused(store: LayerStore, tmp_path: Path) -> None:
    (tmp_path / "1").write_bytes(b"QFI")
    with pytest.raises(PolyvisorError, match="no qcow2"), store.frozen([(tmp_path / "1", None)], "a"):
        pass


@settings(deadline=None, max_examples=25)
@given(parents=st.lists(st.integers(-1, 12), min_size=1, max_size=12), stood=st.sets(st.integers(0, 11)))
def test_what_stays_is_what_is_stood_upon_and_all_below(
    tmp_path_factory: pytest.TempPathFactory, parents: list[int], stood: set[int]
) -> None:
    path = tmp_path_factory.mktemp("layers")
    store, ids = LayerStore(path / "layers"), list[str]()
    for i, parent in enumerate(parents):
        ids.append(froze(store, path / str(i), ids[parent] if 0 <= parent < i else None))
    standing = {ids[i] for i in stood if i < len(ids)}
    store.sweep(lambda: standing)
    assert set(store.ids()) == {layer.id for top in standing for layer in store.chain(top)}

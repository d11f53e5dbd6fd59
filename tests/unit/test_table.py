"""Tables, ages and amounts as people read them."""

import pytest

from polyvisor.cli.table import age, memory, pairs, table


def test_columns_are_aligned_and_empty_cells_shown() -> None:
    text = table(("NAME", "STATE", "UP"), [("a", "running", "3m"), ("web-10", "", "")])
    assert text == "NAME    STATE    UP\na       running  3m\nweb-10  -        -"


def test_a_table_without_rows_is_its_header() -> None:
    assert table(("A", "B"), []) == "A  B"


def test_a_cell_takes_one_line_whatever_is_in_it() -> None:
    text = table(("A", "REASON"), [("x", "one\ntwo\x1b[2J\tthree"), ("y", "é")])
    assert text.split("\n")[1:] == ["x  one two\\x1b[2J three", "y  é"]


def test_rows_of_another_length_are_a_mistake() -> None:
    with pytest.raises((ValueError, IndexError)):
        table(("A", "B"), [("x",)])


def test_pairs() -> None:
    assert pairs([("a", "1"), ("long", "x\ny")]) == "a     1\nlong  x y"


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (-5, "0s"),
        (0, "0s"),
        (0.9, "0s"),
        (119, "119s"),
        (120, "2m"),
        (7199, "119m"),
        (7200, "2h"),
        (172_799, "47h"),
        (172_800, "2d"),
        (86_400 * 400, "400d"),
    ],
)
def test_ages(seconds: float, expected: str) -> None:
    assert age(1000.0, 1000.0 + seconds) == expected


def test_no_age() -> None:
    assert age(None) == ""


@pytest.mark.parametrize(
    ("mib", "expected"), [(16, "16M"), (1023, "1023M"), (1024, "1G"), (1536, "1536M"), (16 << 20, "16384G")]
)
def test_amounts_of_memory(mib: int, expected: str) -> None:
    assert memory(mib) == expected

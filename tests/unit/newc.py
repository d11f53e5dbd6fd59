"""A second reader of newc archives, independent of our writer: it follows the kernel's buffer-format.rst."""

from __future__ import annotations


def unpack(data: bytes) -> dict[str, tuple[int, bytes, tuple[int, int]]]:
    """Members by name: (mode, content, device)."""
    members: dict[str, tuple[int, bytes, tuple[int, int]]] = {}
    at = 0
    while True:
        assert data[at : at + 6] == b"070701", f"no header at {at}"
        assert at % 4 == 0
        fields = [int(data[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        mode, size, name_size = fields[1], fields[6], fields[11]
        name = data[at + 110 : at + 110 + name_size - 1].decode()
        assert data[at + 110 + name_size - 1] == 0
        at = -(-(at + 110 + name_size) // 4) * 4
        content = data[at : at + size]
        assert len(content) == size
        at = -(-(at + size) // 4) * 4
        if name == "TRAILER!!!":
            assert at == len(data)
            return members
        members[name] = (mode, content, (fields[9], fields[10]))

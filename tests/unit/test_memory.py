"""What a process occupies, as the kernel tells it."""

from __future__ import annotations

import mmap
import os

from polyvisor.host.memory import of_process, parsed

ROLLUP = """55d0c0000000-7ffc00000000 ---p 00000000 00:00 0                  [rollup]
Rss:              102400 kB
Pss:               40960 kB
Pss_Dirty:         20480 kB
Shared_Clean:      71680 kB
Private_Clean:      2048 kB
Private_Dirty:     18432 kB
"""


def test_own_and_shared() -> None:
    use = parsed(ROLLUP)
    assert use is not None
    assert (use.own_mib, use.shared_mib, use.total_mib) == (20.0, 20.0, 40.0)


def test_nothing_is_known_of_a_process_that_has_ended() -> None:
    assert parsed("") is None
    assert of_process(0) is None


def test_of_this_process() -> None:
    before = of_process(os.getpid())
    with mmap.mmap(-1, 32 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.write(b"x" * (32 << 20))
        after = of_process(os.getpid())
    assert before is not None and after is not None
    assert 30 < after.own_mib - before.own_mib < 40

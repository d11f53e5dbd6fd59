"""GRUB as update-grub configures it: its settings, and which entry of its menu is booted.

Settings are read as grub-mkconfig of Debian reads them: /etc/default/grub, then /etc/default/grub.d/*.cfg in the order of
their names. The menu is grub.cfg as 00_header, 10_linux and 20_linux_xen of GRUB 2.06 to 2.12 write it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from polyvisor.values import dataclass

DROP_IN = "/etc/default/grub.d/polyvisor.cfg"
"""It has to sort before xen.cfg of Debian's Xen, which reads XEN_OVERRIDE_GRUB_DEFAULT."""
SETTINGS = "/etc/default/grub"
CONFIG = "/boot/grub/grub.cfg"
BACKUP = "/boot/grub/grub.cfg.before-polyvisor"


@dataclass(frozen=True, kw_only=True)
class Grub:
    """What a machine's GRUB is set to.

    `files` are the assignments of each settings file but ours, by path, in their order; `drop_in` is the text of ours, None
    where there is none. `default` is the text of the menu's entry that is booted, None where nobody can tell; `menu` says
    whether there is a menu that could be read.
    """

    files: tuple[tuple[str, Mapping[str, str]], ...] = ()
    drop_in: str | None = None
    default: str | None = None
    menu: bool = True

    def setting(self, name: str) -> str:
        """The last value that `name` is given, but for ours."""
        return next((values[name] for _, values in reversed(self.files) if name in values), "")

    def boots_xen(self) -> bool:
        return self.default is not None and xen_command_line(self.default) is not None


def xen_command_line(entry: str) -> str | None:
    """Xen's command line in an entry of the menu; None where the entry boots no Xen."""
    match = re.search(r"^\s*(?:multiboot2?|xen_hypervisor)\s+\S*/?xen\S*[ \t]*(.*)$", entry, re.MULTILINE)
    return match[1].removeprefix("placeholder").strip() if match else None


def default_entry(config: str, saved: str = "") -> str | None:
    """The text of the entry that grub.cfg boots; `saved` is the entry that grubenv remembers. None where it can't be told."""
    values = re.findall(r'^\s*set default="?([^"\n]*)"?\s*$', config, re.MULTILINE)
    wanted = next((value for value in reversed(values) if value != "${next_entry}"), "0")
    if wanted == "${saved_entry}":
        wanted = saved or "0"
    if "$" in wanted:
        return None
    entries: Sequence[_Entry] = _entries(config)
    for part in re.split(r"(?<!>)>(?!>)", wanted):
        entry = _chosen(entries, part.replace(">>", ">"))
        if entry is None:
            return None
        entries = _entries(entry.body)
    return entry.body if entry else None


@dataclass(frozen=True)
class _Entry:
    title: str
    id: str
    body: str


def _chosen(entries: Sequence[_Entry], wanted: str) -> _Entry | None:
    if wanted.isdecimal():
        return entries[int(wanted)] if int(wanted) < len(entries) else None
    return next((entry for entry in entries if wanted in (entry.title, entry.id)), None)


_HEAD = re.compile(r"^\s*(?:menuentry|submenu)\s+(?:'((?:[^']|'\\'')*)'|\"([^\"]*)\")(.*)\{\s*$")


def _entries(text: str) -> list[_Entry]:
    """The entries and submenus of `text` that stand in no other; a line that is `}` alone ends one, or a block within."""
    found: list[_Entry] = []
    head: re.Match[str] | None = None
    body: list[str] = []
    depth = 0
    for line in text.splitlines():
        if head is None:
            head, body, depth = _HEAD.match(line), [], 1
            continue
        depth += line.rstrip().endswith("{") - (line.strip() == "}")
        if depth == 0:
            title = (head[1] or head[2] or "").replace("'\\''", "'")
            named = re.search(r"(?:--id|\$menuentry_id_option)\s+'?([^'\s]+)", head[3])
            found.append(_Entry(title, named[1] if named else "", "\n".join(body)))
            head = None
        else:
            body.append(line)
    return found

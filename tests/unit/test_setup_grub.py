"""Which entry of GRUB's menu is booted: told from grub.cfg as Debian's GRUB writes it, or not at all."""

from pathlib import Path

import pytest

from polyvisor.host.setup.grub import default_entry, xen_command_line

CAPTURED = (Path(__file__).parents[1] / "captured" / "setup" / "grub-2.06-debian-12-xen.cfg").read_text()
MENU = """\
if [ -s $prefix/grubenv ]; then
  load_env
fi
if [ "${next_entry}" ] ; then
   set default="${next_entry}"
   set next_entry=
   save_env next_entry
else
   set default="%s"
fi
function gfxmode {
	set gfxpayload="${1}"
}
menuentry 'Debian GNU/Linux' --class debian $menuentry_id_option 'gnulinux-simple-ab' {
	if [ x$grub_platform = xxen ]; then
		insmod xzio
	fi
	linux	/boot/vmlinuz-6.1 root=UUID=ab ro
}
submenu 'Advanced options for Debian GNU/Linux' $menuentry_id_option 'gnulinux-advanced-ab' {
	menuentry 'Debian GNU/Linux, with Linux 6.1' $menuentry_id_option 'gnulinux-6.1-advanced-ab' {
		linux	/boot/vmlinuz-6.1 root=UUID=ab ro single
	}
}
menuentry 'Debian GNU/Linux, with Xen hypervisor' --class xen $menuentry_id_option 'xen-gnulinux-simple-ab' {
	multiboot2	/boot/xen-4.17-amd64.gz placeholder dom0_mem=1G ${xen_rm_opts}
	module2	/boot/vmlinuz-6.1 placeholder root=UUID=ab ro
}
menuentry "It's memtest" {
	linux16	/boot/memtest
}
"""


@pytest.mark.parametrize(
    ("default", "has"),
    [
        ("0", "/boot/vmlinuz-6.1 root=UUID=ab ro"),
        ("2", "multiboot2"),
        ("Debian GNU/Linux, with Xen hypervisor", "multiboot2"),
        ("xen-gnulinux-simple-ab", "multiboot2"),
        ("Advanced options for Debian GNU/Linux>Debian GNU/Linux, with Linux 6.1", "single"),
        ("gnulinux-advanced-ab>gnulinux-6.1-advanced-ab", "single"),
        ("1>0", "single"),
        ("It's memtest", "memtest"),
        ("9", None),
        ("gone", None),
        ("1>7", None),
        ("${something}", None),
    ],
)
def test_the_entry_that_is_booted(default: str, has: str | None) -> None:
    entry = default_entry(MENU % default)
    if has is None:
        assert entry is None
    else:
        assert entry is not None
        assert has in entry


def test_one_that_was_saved() -> None:
    saved = default_entry(MENU % "${saved_entry}", "Debian GNU/Linux, with Xen hypervisor")
    assert saved is not None
    assert xen_command_line(saved) == "dom0_mem=1G ${xen_rm_opts}"
    first = default_entry(MENU % "${saved_entry}")
    assert first is not None
    assert xen_command_line(first) is None


def test_a_menu_that_chooses_nothing_boots_its_first() -> None:
    assert default_entry("menuentry 'a' {\n  linux /vmlinuz\n}\n") == "  linux /vmlinuz"
    assert default_entry("") is None


def test_the_menu_of_a_real_host() -> None:
    """As update-grub of Debian 12 wrote it after `host prepare xen --yes`."""
    entry = default_entry(CAPTURED)
    assert entry is not None
    words = (xen_command_line(entry) or "").split()
    assert {"dom0_mem=1168M,max:1168M", "dom0_max_vcpus=2", "com1=115200,8n1", "console=com1,vga"} <= set(words)
    assert "console=tty0 console=hvc0" in entry

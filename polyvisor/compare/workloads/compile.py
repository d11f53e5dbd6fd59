"""Compiling, as a kernel is built: a module of it, by its own makefiles and headers."""

from __future__ import annotations

from polyvisor.compare.workload import Metric, Program, Script

_FILES = 2
# Each file takes in a good part of the kernel's headers, which is most of the work.
_SOURCE = """#include <linux/module.h>
#include <linux/pci.h>
#include <linux/fs.h>
int polyvisor_compare_@N@(struct pci_dev *device);
int polyvisor_compare_@N@(struct pci_dev *device) { return device->vendor + @N@; }
"""
_DIRECTORY = "/tmp/polyvisor-compile"  # noqa: S108 - of the guest
_PREPARE = f"""mkdir -p {_DIRECTORY} && cd {_DIRECTORY} || exit 1
for n in {" ".join(map(str, range(_FILES)))}; do
sed "s/@N@/$n/g" >part$n.c <<'END'
{_SOURCE}END
echo "whole-objs += part$n.o" >>Kbuild
done
echo 'MODULE_LICENSE("GPL");' >>part0.c
echo "obj-m := whole.o" >>Kbuild"""
_MAKE = f"make -s -C /lib/modules/$(uname -r)/build M={_DIRECTORY}"
_SCRIPT = f"""{_MAKE} clean || exit 1
read -r a _ </proc/uptime
{_MAKE} -j $(nproc) modules >/dev/null 2>&1 || exit 1
read -r b _ </proc/uptime
echo $a $b"""


def _read(said: str) -> dict[str, float]:
    began, ended = map(float, said.split())
    return {"time": ended - began}


WORKLOAD = Script(
    name="compile",
    about="a module of Linux, of two files, by the kernel's own makefiles and gcc",
    metrics=(Metric(name="time", unit="s", about="until it is built", lower_is_better=True),),
    programs=(Program(name="gcc", package="gcc"), Program(name="make", package="make")),
    prepare=_PREPARE,
    script=_SCRIPT,
    read=_read,
    native=False,  # the headers are those of the guest's kernel
    timeout_s=900.0,
)

"""A program `xl` for tests of the Xen driver: domains are files, the guest does as it is told, and a call can fail or be slow.

It writes the lines that xl 4.17 writes (tests/captured/xl). `broken` in its directory names the call that fails, or `hangs`; of
those that take long also `half`, a creation that does not come to its end, and `save-fails`, `save-dies`,
`save-hangs` and `save-slow`, when the guest is suspended and half of it is written.
A guest that was saved brings its counter along (`count` in the directory), which is all of its memory.
"""

PROGRAM = r"""#!{python} -S
import os, re, sys, time
D = "{directory}"
words = [w for w in sys.argv[1:] if w not in ("-F", "-c", "-v", "-p", "--ignore-host")]
verb = words[0]
broken = open(D + "/broken").read() if os.path.exists(D + "/broken") else ""
open(D + "/calls", "a").write(" ".join(sys.argv[1:]) + "\n")
if broken == "hangs " + verb:
    time.sleep(600)
if verb == broken:
    sys.exit(print("libxl: error: " + verb + " is broken", file=sys.stderr) or 1)
def domains():
    return sorted(int(n) for n in os.listdir(D) if n.isdigit())
def read(i):
    return open(D + "/" + str(i)).read().split()
def write(i, *values):
    new = D + "/new%d" % os.getpid()
    open(new, "w").write(" ".join(values)); os.replace(new, D + "/" + str(i))
def number():
    n = int(open(D + "/last").read()) + 1 if os.path.exists(D + "/last") else 1
    open(D + "/last", "w").write(str(n))
    return n
def say(text):
    os.write(2, (text + "\n").encode())
def state(i):
    try:
        return read(i)[1]
    except FileNotFoundError:
        return "gone"
def become(i, state):
    uuid, _, name = read(i)
    write(i, uuid, state, name)
def keep(config, i):
    name, uuid = re.search('name = "(.*)"', config)[1], re.search('uuid = "(.*)"', config)[1]
    while True:
        say("Waiting for domain %s (domid %d) to die [pid %d]" % (name, i, os.getpid()))
        while state(i) in ("running", "paused"):
            time.sleep(0.01)
        if state(i) == "gone":
            sys.exit(say("Domain %d has been destroyed." % i))
        code = 2 if state(i).startswith("suspended") else int(state(i))
        say("Domain %d has shut down, reason code %d 0x%x" % (i, code, code))
        if code == 2:
            say("Domain has suspended.")
            sys.exit(say("Done. Exiting now"))
        os.unlink(D + "/" + str(i))
        if code != 1 or 'on_reboot = "restart"' not in config:
            sys.exit(say("Done. Exiting now"))
        say("Done. Rebooting now")
        i = number()
        write(i, uuid, "running", name)
if verb == "info":
    print(open("{info}").read())
elif verb == "list":
    print("Name ID Mem VCPUs State Time(s) UUID Reason-Code Security Label")
    for i in map(int, words[1:]) if words[1:] else domains():
        uuid, its, name = read(i)
        has = lambda what, usual: open(D + "/" + what).read() if os.path.exists(D + "/" + what) else usual
        shown = {"paused": "--p---", "suspended": "---ss-", "suspended-paused": "--pss-"}.get(its, "-b----")
        more = (uuid, 2 if its.startswith("suspended") else "-", "-") if "-v" in sys.argv else ()
        print(name, i, has("memory", 128), has("vcpus", 1), shown, "0.1", *more)
elif verb == "create":
    config = open(words[1]).read()
    name, uuid = re.search('name = "(.*)"', config)[1], re.search('uuid = "(.*)"', config)[1]
    say("Parsing config from " + words[1])
    i = number()
    write(i, uuid, "running", name)
    if broken == "half":
        time.sleep(600)
    keep(config, i)
elif verb == "save":
    i, out = int(words[1]), open(words[2], "wb", buffering=0)
    say("Saving to " + words[2] + " new xl format (info 0x3/0x0/1398)")
    if state(i) != "running":
        say("libxl: error: libxl_dom_suspend.c:408:wait_guest_timeout: Domain %d:guest did not suspend, timed out" % i)
        sys.exit(1)
    become(i, "suspended")
    count = int(open(D + "/count").read()) if os.path.exists(D + "/count") else 0
    try:
        for part in (b"XENSAVE\n", b"%020d" % count, bytes(3 << 20)):
            out.write(part)
            if broken == "save-slow":
                time.sleep(0.2)
        if broken == "save-dies":
            os.kill(os.getpid(), 9)
        if broken == "save-hangs":
            time.sleep(600)
        if broken == "save-fails":
            raise OSError("it is told to")
        out.write(b"END\n")
    except OSError as error:
        say("libxl: error: libxl_stream_write.c:345:stream_done: Domain %d:%s" % (i, error))
        say("Failed to save domain, resuming domain")
        become(i, "running")
        sys.exit(1)
    become(i, "paused")
elif verb == "restore":
    config, file = open(words[1]).read(), open(words[2], "rb")
    say("Loading new save file " + words[2] + " (new xl fmt info 0x3/0x0/1398)")
    i = number()
    write(i, re.search('uuid = "(.*)"', config)[1], "paused", re.search('name = "(.*)"', config)[1])
    if broken == "half":
        time.sleep(600)
    data = file.read()
    if not (data.startswith(b"XENSAVE\n") and data.endswith(b"END\n")):
        say("xc: error: Failed to read Record Header from stream (0 = Success): Internal error")
        say("libxl: error: libxl_create.c:1803:domcreate_rebuild_done: Domain %d:cannot (re-)build domain: -3" % i)
        os.unlink(D + "/" + str(i))
        sys.exit(1)
    open(D + "/count", "w").write(str(int(data[8:28])))
    keep(config, i)
elif verb in ("mem-set", "vcpu-set"):
    what = "memory" if verb == "mem-set" else "vcpus"
    if not os.path.exists(D + "/deaf"):
        open(D + "/" + what, "w").write(words[2].rstrip("m"))
elif verb in ("sched-credit2", "vcpu-pin", "config-update", "qemu-monitor-command"):
    pass
elif verb == "console":
    os.write(1, b"hello\n")
    while os.path.exists(D + "/" + words[-1]):
        time.sleep(0.01)
else:
    i = int(words[1])
    its = read(i)[1]
    if verb == "destroy":
        os.unlink(D + "/" + str(i))
    elif verb == "pause" and its.startswith("suspended"):
        become(i, "suspended-paused")
    elif verb == "shutdown" and os.path.exists(D + "/deaf"):
        pass
    else:
        become(i, dict(pause="paused", unpause="running", shutdown="0", reboot="1", crash="3")[verb])
"""

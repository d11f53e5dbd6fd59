"""A program `xl` for tests of the Xen driver: domains are files, the guest does as it is told, and a call can fail or be slow.

It writes the lines that xl 4.17 writes (tests/captured/xl). `broken` in its directory names the call that fails.
"""

PROGRAM = r"""#!{python} -S
import os, re, sys, time
D = "{directory}"
words = [w for w in sys.argv[1:] if w not in ("-F", "-c", "-v", "--ignore-host")]
verb = words[0]
broken = open(D + "/broken").read() if os.path.exists(D + "/broken") else ""
open(D + "/calls", "a").write(" ".join(sys.argv[1:]) + "\n")
if verb == broken:
    sys.exit(print("libxl: error: " + verb + " is broken", file=sys.stderr) or 1)
def domains():
    return sorted(int(n) for n in os.listdir(D) if n.isdigit())
def read(i):
    return open(D + "/" + str(i)).read().split()
def write(i, *values):
    open(D + "/new", "w").write(" ".join(values)); os.replace(D + "/new", D + "/" + str(i))
def number():
    n = int(open(D + "/last").read()) + 1 if os.path.exists(D + "/last") else 1
    open(D + "/last", "w").write(str(n))
    return n
def say(text):
    os.write(2, (text + "\n").encode())
if verb == "info":
    print(open("{info}").read())
elif verb == "list":
    print("Name ID Mem VCPUs State Time(s) UUID Reason-Code Security Label")
    for i in domains():
        uuid, state, name = read(i)[:3]
        has = lambda what, usual: open(D + "/" + what).read() if os.path.exists(D + "/" + what) else usual
        print(name, i, has("memory", 128), has("vcpus", 1), "--p---" if state == "paused" else "-b----", "0.1", uuid, "-", "-")
elif verb == "create":
    config = open(words[1]).read()
    name, uuid = re.search('name = "(.*)"', config)[1], re.search('uuid = "(.*)"', config)[1]
    say("Parsing config from " + words[1])
    if broken == "half":
        write(number(), uuid, "running", name); time.sleep(600)
    while True:
        i = number()
        write(i, uuid, "running", name)
        say("Waiting for domain %s (domid %d) to die [pid %d]" % (name, i, os.getpid()))
        while os.path.exists(D + "/" + str(i)) and read(i)[1] in ("running", "paused"):
            time.sleep(0.01)
        if not os.path.exists(D + "/" + str(i)):
            sys.exit(say("Domain %d has been destroyed." % i))
        code = int(read(i)[1])
        say("Domain %d has shut down, reason code %d 0x%x" % (i, code, code))
        os.unlink(D + "/" + str(i))
        if code != 1 or 'on_reboot = "restart"' not in config:
            sys.exit(say("Done. Exiting now"))
        say("Done. Rebooting now")
elif verb in ("mem-set", "vcpu-set"):
    what = "memory" if verb == "mem-set" else "vcpus"
    if not os.path.exists(D + "/deaf"):
        open(D + "/" + what, "w").write(words[2].rstrip("m"))
elif verb in ("sched-credit2", "vcpu-pin", "config-update"):
    pass
elif verb == "console":
    os.write(1, b"hello\n")
    while os.path.exists(D + "/" + words[-1]):
        time.sleep(0.01)
else:
    i = int(words[1])
    uuid, state, name = read(i)
    if verb == "destroy":
        os.unlink(D + "/" + str(i))
    else:
        write(i, uuid, dict(pause="paused", unpause="running", shutdown="0", reboot="1", crash="3")[verb], name)
"""

"""`python -m tests.real.bridge_verbs VERB DIRECTORY OWNER [WHAT]`: `Bridge` in the network namespace of whoever starts it.

`join` takes cards as JSON, `[[MAC, [FORWARD, …], BRIDGE], …]`, holds the owner's lock, says `ready` and ends with its standard
input; `add` and `remove` take the forward of the owner's first card.
"""

import asyncio
import fcntl
import json
import os
import sys
from pathlib import Path

from polyvisor.errors import PolyvisorError
from polyvisor.network.bridge import Bridge
from polyvisor.network.nat import BRIDGE, Card
from polyvisor.spec.forward import parse_forward


async def main(verb: str, directory: str, owner: str, what: str = "") -> None:
    bridge = Bridge(Path(directory))
    if verb == "leave":
        await bridge.leave(Path(owner))
    elif verb == "add":
        await bridge.add_forward(Path(owner), 0, parse_forward(what))
    elif verb == "remove":
        await bridge.remove_forward(Path(owner), 0, parse_forward(what))
    else:
        await join(bridge, owner, what)


async def join(bridge: Bridge, owner: str, what: str) -> None:
    fcntl.flock(os.open(owner, os.O_RDWR | os.O_CREAT), fcntl.LOCK_EX)
    cards = [
        Card(owner=owner, mac=mac, bridge=name or BRIDGE, forwards=tuple(map(parse_forward, texts)))
        for mac, texts, name in json.loads(what)
    ]
    await bridge.join(Path(owner), cards)
    print("ready", flush=True)
    sys.stdin.read()


try:
    asyncio.run(main(*sys.argv[1:]))
except PolyvisorError as error:
    sys.exit(error.message)

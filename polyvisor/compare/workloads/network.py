"""The network between two guests of one host: throughput, latency, connections."""

from __future__ import annotations

import json
import re

from polyvisor.compare.workload import Metric, Program, Script

# The second card is on a network of the two guests alone, without addresses: one is given to each, whatever the card is called.
_ADDRESS = "10.99.0"
_CARD = "card=$(ls /sys/class/net | grep -v lo | sort -V | tail -n 1)"
_UP = f"{_CARD}; ip link set $card up && ip address replace {_ADDRESS}.{{}}/24 dev $card || exit 1"
_CALL = f"""for i in $(seq 50); do ping -c 1 -W 1 {_ADDRESS}.2 >/dev/null && break; done
iperf3 --client {_ADDRESS}.2 --time 3 --json || exit 1
ping -q -c 40 -i 0.05 {_ADDRESS}.2
wrk -t 1 -c 8 -d 3s -H 'Connection: close' http://{_ADDRESS}.2/"""


def _read(said: str) -> dict[str, float]:
    sent, end = json.JSONDecoder().raw_decode(said[said.index("{") :])
    after = said[said.index("{") + end :]
    [average] = re.findall(r"^rtt .* = [\d.]+/([\d.]+)/", after, re.MULTILINE)
    [rate] = re.findall(r"^Requests/sec:\s*([\d.]+)", after, re.MULTILINE)
    return {
        "throughput": sent["end"]["sum_received"]["bits_per_second"] / 1e6,
        "latency": float(average),
        "connections": float(rate),
    }


WORKLOAD = Script(
    name="network",
    about="two guests on a private network: iperf3, ping, and wrk with a new connection for each request",
    metrics=(
        Metric(name="throughput", unit="Mbit/s", about="of one TCP connection"),
        Metric(name="latency", unit="ms", about="to the other guest and back, on average", lower_is_better=True),
        Metric(name="connections", unit="1/s", about="opened to nginx, served, and closed"),
    ),
    programs=(
        Program(name="iperf3", package="iperf3"),
        Program(name="wrk", package="wrk"),
        Program(name="nginx", package="nginx-light"),
    ),
    prepare=_UP.format(1),
    prepare_peer=f"{_UP.format(2)}; systemctl start nginx && iperf3 --server --daemon",
    script=_CALL,
    read=_read,
    native=False,
)

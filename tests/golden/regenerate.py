"""`uv run python -m tests.golden.regenerate`: write the golden files anew, after a wanted change."""

from polyvisor.drivers.xen.config import build_config
from polyvisor.network.nat import build_rules
from tests.golden.boots import BOOTS, DIRECTORY, golden, rendered
from tests.golden.networks import NETWORKS, NETWORKS_DIRECTORY, network_golden
from tests.golden.xl_boots import VM_DIRECTORY, XL_BOOTS, XL_DIRECTORY, xl_golden

for stale in set(DIRECTORY.glob("*.argv")) - {golden(name) for name in BOOTS}:
    stale.unlink()
for stale in set(XL_DIRECTORY.glob("*.cfg")) - {xl_golden(name) for name in XL_BOOTS}:
    stale.unlink()
for stale in set(NETWORKS_DIRECTORY.glob("*.nft")) - {network_golden(name) for name in NETWORKS}:
    stale.unlink()
for name, boot in BOOTS.items():
    golden(name).write_text(rendered(boot))
for name, boot in XL_BOOTS.items():
    xl_golden(name).write_text(build_config(boot, VM_DIRECTORY))
for name, network in NETWORKS.items():
    network_golden(name).write_text(build_rules(network))
print(f"{len(BOOTS)} files in {DIRECTORY}, {len(XL_BOOTS)} in {XL_DIRECTORY}, {len(NETWORKS)} in {NETWORKS_DIRECTORY}")
print("look at what has changed with git diff")

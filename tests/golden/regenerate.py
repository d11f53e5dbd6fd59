"""`uv run python -m tests.golden.regenerate`: write the golden files anew, after a wanted change."""

from polyvisor.network.nat import build_rules
from tests.golden.boots import BOOTS, DIRECTORY, golden, rendered
from tests.golden.networks import NETWORKS, NETWORKS_DIRECTORY, network_golden
from tests.golden.setup_plans import PLANS, SETUP_DIRECTORY, shown
from tests.golden.xl_boots import XL_BOOTS, XL_DIRECTORY, configuration, xl_golden

WANTED = {
    **{golden(name): rendered(boot) for name, boot in BOOTS.items()},
    **{xl_golden(name): configuration(name) for name in XL_BOOTS},
    **{network_golden(name): build_rules(network) for name, network in NETWORKS.items()},
    **{SETUP_DIRECTORY / f"{name}.txt": shown(name) for name in PLANS},
}

for directory, ending in (
    (DIRECTORY, "argv"),
    (XL_DIRECTORY, "cfg"),
    (NETWORKS_DIRECTORY, "nft"),
    (SETUP_DIRECTORY, "txt"),
):
    directory.mkdir(exist_ok=True)
    for stale in set(directory.glob(f"*.{ending}")) - set(WANTED):
        stale.unlink()
for path, text in WANTED.items():
    path.write_text(text)
print(f"{len(WANTED)} files in {DIRECTORY} and below: look at what has changed with git diff")

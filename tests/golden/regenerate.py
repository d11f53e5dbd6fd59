"""`uv run python -m tests.golden.regenerate`: write the golden files anew, after a wanted change."""

from tests.golden.boots import BOOTS, DIRECTORY, golden, rendered

for stale in set(DIRECTORY.glob("*.argv")) - {golden(name) for name in BOOTS}:
    stale.unlink()
for name, boot in BOOTS.items():
    golden(name).write_text(rendered(boot))
print(f"{len(BOOTS)} files in {DIRECTORY}: look at what has changed with git diff")

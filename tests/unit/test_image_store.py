"""The image store: what others may see of it, whoever made it."""

import os
from pathlib import Path

from polyvisor.images.image import Image, ImageFile
from polyvisor.images.store import ImageStore


def test_a_strict_umask_does_not_keep_qemu_from_images(tmp_path: Path) -> None:
    """QEMU runs as another user than root, who made the image: it has to pass the directories and read the files."""
    store = ImageStore(tmp_path)
    before = os.umask(0o077)
    try:
        with store.staging() as staging:
            (staging / "vmlinuz").write_bytes(b"kernel")
            kernel = ImageFile(name="vmlinuz", sha256="", size=0)
            image = store.add(staging, Image(id="", name="a", created_at=0.0, source="test", kernel=kernel))
    finally:
        os.umask(before)
    for directory in (tmp_path / "store", tmp_path / "names"):
        assert directory.stat().st_mode & 0o777 == 0o711
    assert store.directory(image).stat().st_mode & 0o777 == 0o755
    assert store.file(image, kernel).stat().st_mode & 0o777 == 0o444

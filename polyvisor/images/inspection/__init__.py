"""What an image can boot in, found by reading it: nothing is mounted, run or believed.

    disk → partitions → file systems → kernel, initramfs, boot loader, fstab → findings → verdicts

The image is hostile data. Every read is bounded and is charged to one `Budget`; what is damaged, odd or not known here
becomes a finding with its reason, and a verdict of "unknown" where that matters. See docs/design/image-inspect.md.
"""

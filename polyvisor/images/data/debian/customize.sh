#!/bin/sh
# Runs inside the new system (chroot), after its packages are installed; beside it stands boot/ with GRUB's configuration.
set -eu
here=/run

passwd --lock root >/dev/null
systemctl enable systemd-networkd systemd-resolved ssh polyvisor-agent
ln -sf ../run/systemd/resolve/stub-resolv.conf /etc/resolv.conf

# Nothing that wakes up by itself: on a fresh VM these compete with the user's first command.
# "systemctl enable --now" brings each back.
for unit in apt-daily.timer apt-daily-upgrade.timer e2scrub_all.timer e2scrub_reap.service dpkg-db-backup.timer; do
    systemctl disable "$unit" 2>/dev/null || true
done

# GRUB's modules stand beside its configuration, where grub-install would have put them.
for platform in i386-pc x86_64-efi; do
    mkdir -p "/boot/grub/$platform"
    cp "/usr/lib/grub/$platform"/*.mod "/usr/lib/grub/$platform"/*.lst "/boot/grub/$platform/"
done
mkdir -p /boot/efi
cp "$here/boot/grub.cfg" /boot/grub/grub.cfg
grub-editenv /boot/grub/grubenv create
grub-mkimage --format i386-pc --directory /usr/lib/grub/i386-pc --prefix /boot/grub --config "$here/boot/early.cfg" \
    --output /boot/core.img biosdisk part_gpt ext2 search_fs_uuid

# What kinds of image beyond plain Debian add.
for more in "$here"/boot/customize.d/*.sh; do
    if [ -e "$more" ]; then sh "$more"; fi
done

rm -f /vmlinuz.old /initrd.img.old

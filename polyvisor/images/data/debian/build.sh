#!/bin/sh
# Builds the root file system. Runs as root of a user namespace (or as root), in mount and process namespaces of its own.
#   $1  directory to work in; holds rootfs and boot (files to add), customize.sh, disk.raw and perhaps sources.list
#   $2  directory for packages that were fetched, kept between builds
#   $3  suite; $4  packages, by commas
#   $5 UUID, $6 offset in bytes, $7 size in KiB of the root file system in disk.raw
# Leaves in $1: the root file system in disk.raw, vmlinuz, initrd.img, boot.img, core.img, shim.efi, grub.efi.
set -eu
work=$1 packages=$2 suite=$3 include=$4 uuid=$5 offset=$6 size_kib=$7
root=$work/root
umask 022
# Whoever builds may have a stricter mask; the guest's services have to read these.
chmod -R u=rwX,go=rX "$work/rootfs" "$work/boot"
exec 2>&1

# Packages of the cache shall belong to who builds. In a user namespace its root has no more rights than that user.
sandbox=root
if grep -q ' 0  *0  *4294967295' /proc/self/uid_map; then sandbox=_apt; fi

export work packages
set --
if [ -e "$work/sources.list" ]; then set -- "$work/sources.list"; fi
mmdebstrap --verbose --mode=unshare --format=directory --variant=minbase --include="$include" \
    --aptopt="APT::Sandbox::User \"$sandbox\"" \
    --skip=essential/unlink --skip=download/empty \
    --setup-hook='mkdir -p "$1/var/cache/apt/archives"; mount --bind "$packages" "$1/var/cache/apt/archives"' \
    --essential-hook='cp -R "$work/rootfs/." "$1"; chmod 755 "$1/etc/grub.d/01_serial"' \
    --customize-hook='cp -R "$work/boot" "$work/customize.sh" "$1/run/"' \
    --customize-hook='chroot "$1" sh /run/customize.sh' \
    --customize-hook='chroot "$1" apt-get autoclean; umount "$1/var/cache/apt/archives"' \
    "$suite" "$root" "$@"

# mmdebstrap names sources by the file they came from.
given=$root/etc/apt/sources.list.d/0000sources.list
if [ -e "$given" ]; then mv "$given" "$root/etc/apt/sources.list"; fi

echo "P: collecting the boot files"
rm -rf "$root"/dev/* "$root/etc/apt/apt.conf.d/99mmdebstrap" "$root"/etc/ssh/ssh_host_* "$root"/var/lib/systemd/random-seed
cp -L "$root/vmlinuz" "$work/vmlinuz"
cp -L "$root/initrd.img" "$work/initrd.img"
chmod 644 "$work/vmlinuz" "$work/initrd.img"
mv "$root/boot/core.img" "$work/core.img"
cp "$root/usr/lib/grub/i386-pc/boot.img" "$work/boot.img"
cp "$root/usr/lib/shim/shimx64.efi.signed" "$work/shim.efi"
cp "$root/usr/lib/grub/x86_64-efi-signed/grubx64.efi.signed" "$work/grub.efi"

echo "P: making the file system"
# The features are spelled out: newer versions of mke2fs add some that the suite's GRUB and fsck don't know.
mke2fs -q -F -t ext4 -b 4096 -I 256 -m 1 -L root -U "$uuid" \
    -O none,has_journal,ext_attr,resize_inode,dir_index,filetype,extent,64bit,flex_bg,sparse_super \
    -O large_file,huge_file,dir_nlink,extra_isize,metadata_csum \
    -E "offset=$offset,root_owner=0:0" -d "$root" "$work/disk.raw" "${size_kib}k"
rm -rf --one-file-system "$root"

# GRUB's first configuration finds Xen by this name.
cd /boot && ln -sf xen-*-amd64.gz xen.gz

# GRUB's first configuration finds Xen by this name.
cd /boot && ln -sf xen-*-amd64.gz xen.gz
# It would save every domain when the host goes down, and restore it behind Polyvisor's back.
systemctl disable xendomains.service

# These stages of cloud-init have nothing to do here (see 91_lab.cfg), and each costs an emulated host ten seconds.
systemctl mask cloud-config.service cloud-final.service

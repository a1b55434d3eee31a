#!/bin/bash
# The guest's second program where systemd is to be the init: puts files in place, then systemd takes over, boots,
# and runs guest.sh as a service.
. /run/vm/config
set -eu
units=/run/systemd/system
mkdir -p $units

# what this machine would do at its boot is not what a guest is for; in emulation each of them takes a second
> /etc/fstab
for unit in \
	dbus.socket dev-hugepages.mount dev-mqueue.mount proc-sys-fs-binfmt_misc.automount ldconfig.service \
	sys-fs-fuse-connections.mount sys-kernel-config.mount sys-kernel-debug.mount sys-kernel-tracing.mount \
	systemd-ask-password-console.path systemd-binfmt.service systemd-firstboot.service systemd-hwdb-update.service \
	systemd-initctl.socket systemd-journal-catalog-update.service systemd-journal-flush.service \
	systemd-machine-id-commit.service systemd-random-seed.service systemd-sysusers.service systemd-timesyncd.service \
	systemd-tmpfiles-setup.service systemd-update-done.service systemd-update-utmp.service kmod-static-nodes.service; do
	ln -s /dev/null $units/$unit
done

# this machine may be a container; systemd does less in one, and would not have unmounts reach its services
rm -f /.dockerenv

# only wanted: what did not start is for the command to find out
cat > $units/vm.target <<-END
	[Unit]
	Wants=basic.target vm.service
END
cat > $units/vm.service <<-END
	[Unit]
	DefaultDependencies=no
	After=basic.target local-fs.target
	[Service]
	ExecStart=/bin/bash /run/vm/guest.sh
	TasksMax=infinity
END

cd "$folder"
bash -ec "$systemd"
exec /lib/systemd/systemd --unit=vm.target --show-status=no

#!/bin/busybox sh
# The guest's first program: puts the root file system together and hands over to guest.sh, or to systemd.sh.
# Whatever fails here ends the machine: the kernel panics when its first program exits.
set -eu
export PATH=/bin
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev

# the channel to the harness shows up a moment after boot
until [ -c "$(echo /dev/vport*p1)" ]; do sleep 0.1; done
echo "channel=$(echo /dev/vport*p1)" >> /config
. /config

if [ "$root" = none ]; then
	printf '\0%s started\n' "$token" > "$channel"
	sleep 1d
fi

insmod /modules/ublk_drv.ko
ip link set lo up
mount -t virtiofs files /host
if [ "$root" = direct ]; then
	mount --bind /host /root
else
	insmod /modules/overlay.ko
	mount -t tmpfs -o size=90% top /top
	mkdir /top/upper /top/work
	mount -t overlay -o lowerdir=/host,upperdir=/top/upper,workdir=/top/work root /root
fi
for folder in dev proc sys; do mount --move /$folder /root/$folder; done
for folder in run mnt; do mount -t tmpfs $folder /root/$folder; done
mkdir -p /root/dev/shm /root/dev/pts
mount -t tmpfs shm /root/dev/shm
mount -t devpts devpts /root/dev/pts
ln -s /proc/self/fd /root/dev/fd
for stream in 0:stdin 1:stdout 2:stderr; do ln -s /proc/self/fd/${stream%:*} /root/dev/${stream#*:}; done
if [ -n "$out" ]; then
	mkdir -p "/root$out"
	mount --bind "/host$out" "/root$out"
fi
mkdir /root/run/vm
# now that it has booted, every word of the kernel may matter
dmesg -n 8
cp /config /guest.sh /systemd.sh /root/run/vm/
second=guest.sh
[ -z "$systemd" ] || second=systemd.sh
exec switch_root /root /bin/bash /run/vm/$second

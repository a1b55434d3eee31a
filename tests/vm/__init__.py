"""A real kernel with the ublk driver, in a small QEMU machine that shares this machine's files.

`python3 -m tests.vm -k 7.3 -- COMMAND` is the way in; `python3 -m tests.vm --help` says the rest. The tests need
kernels that carry ublk_drv, of several ages, and must not depend on (or endanger) the kernel of the machine that they
run on. Standard library only: it runs before the project's own environment exists.

From the outside in:

- `__main__`  the command line and its exit status
- `run`       one command on one kernel: boot, watch, judge; and several kernels side by side
- `machine`   one QEMU process; `share` its view of this machine's files; `accel` which accelerator it uses
- `guest`     what happens inside: the initrd around `init.sh` and `guest.sh`, with `systemd.sh` between them when
              systemd is to be the init; `cpio` packs it
- `channel`   what comes out: the command's output and its exit status; `output` prints it
- `console`   what the kernel complained about
- `kernels`   Debian's cloud kernels, fetched into a cache; `mirror` where from
- `host`      no machine at all: this machine's own driver, when asked
- `process`   child processes that never outlive us; `errors` what a user sees when something is missing
"""

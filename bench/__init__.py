"""How much work a request costs, in ublkpy and in what else serves block devices: the same figures on any machine.

`make bench` is the way in, docs/performance.md says how to read what it prints. One small machine is booted under the
instruction clock (tests.vm), where a guest instruction takes a nanosecond, and all subjects are measured in it, one
after the other.

On this machine:

- `__main__`   the command line and its exit status
- `machine`    boots the machine with `guest` in it
- `report`     what it measured: ratios, instructions per request, JSON; `table` as text, `plot` as a picture

On both sides:

- `subjects`   the table of what is measured, `subject` an entry; `workloads` with which requests
- `result`     what one subject gave, as it comes out of the machine

In the machine:

- `guest`      subject after subject; `measure` one of them
- `servers/`   how each is started and stopped; `peers` those whose program is given
- `disks/`     the disks of some of them: Python files
- `fio`        its command line, and its figures
- `memory`     that of a server
"""

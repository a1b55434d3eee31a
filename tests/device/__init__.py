"""Against the real driver, inside a small machine: `python3 -m tests.vm --pytest tests/device`.

`devices` adds and removes them, `disk` moves bytes, `load` runs fio, `program` runs the ublk command, `kernel` and
`traces` watch what a test leaves behind.
"""

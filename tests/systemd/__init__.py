"""ublk@.service under a real systemd: `python3 -m tests.vm --systemd tests/systemd/prepare --pytest tests/systemd`."""

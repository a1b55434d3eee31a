"""What happens to a device, a module for each command of ``ublk``."""

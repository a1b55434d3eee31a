"""What happens to a device, beginning with ``add``."""

"""What the driver and the machine say of a device, and what root may order of them."""

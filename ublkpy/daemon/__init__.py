"""The process that serves a device."""

"""What a daemon wants of Linux, whatever it serves."""

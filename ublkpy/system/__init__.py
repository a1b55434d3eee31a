"""What any program might want of Linux; nothing here knows ublk."""

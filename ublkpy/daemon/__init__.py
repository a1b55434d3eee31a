"""One device's life. What the command line may use is in add, delete, recover and inspect."""

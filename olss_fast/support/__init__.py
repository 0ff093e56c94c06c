"""What every room needs and none owns: files, text, devices, progress."""

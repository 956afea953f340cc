"""Every file format, column and row is read and written here, once, for all commands."""

"""What every resumable job shares: files that are whole or not there, one process a folder, what changed since."""

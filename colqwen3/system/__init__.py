"""What any long computation needs: files, disk, device, progress, locks, resuming."""

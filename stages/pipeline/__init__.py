"""What every stage needs: its parameters, its place on disk, its start and its end."""

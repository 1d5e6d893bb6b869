"""The metadata of a released folder, and whether the folder is as they say."""

"""What a released folder says about itself, and whether that is true."""

"""Yes or no, where a test would take too long or needs what CI lacks."""

"""Files that stages meet in."""

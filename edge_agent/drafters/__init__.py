"""Sources of draft tokens behind one small interface."""

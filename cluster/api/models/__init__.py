"""Several models behind one API."""

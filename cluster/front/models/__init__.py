"""The served models, one or several, behind one API."""

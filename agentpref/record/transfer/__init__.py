"""Copies a whole home (``backup``) and unites several homes (``merge``)."""

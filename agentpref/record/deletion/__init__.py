"""Deletes records: by user (``forget``) and by age (``removal.expire``)."""

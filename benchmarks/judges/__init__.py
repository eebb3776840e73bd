"""Can judges be trusted as far as their calibration says?

``statistics.py`` measures what judges are united and corrected by, on real verdicts and on made-up
judges whose truth is known; it asks no model.
"""

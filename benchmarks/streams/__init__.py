"""Streams of nights: what each way to learn keeps, loses and costs, night after night.

``items.py`` is what people judged, ``rules.py`` how an answer is scored, ``catalogue.py`` the
streams, ``subjects.py`` what is asked of a model beside them. ``arms.py`` names the ways to learn,
``altered.py`` holds all that an arm changes in the product beyond its settings. ``measure.py``
measures a revision, ``life.py`` lives through one stream with one arm, ``rows.py`` keeps a JSON row
of every night, and ``promises.py``, ``table.py`` and ``plots.py`` make of them what people read.
"""

"""Swapping revisions under load: are all replies right, and how long do requests wait for a swap?

``stage.py`` makes the revisions, and computes the answers of each with plain transformers and peft.
``load.py`` sends requests from several threads while another thread swaps. ``elsewhere.py`` is the
process that publishes. Each engine has a module with an :class:`~benchmarks.swap.load.Engine`,
which also names the other ways to swap that it is compared with; ``rival.py`` measures these.
"""

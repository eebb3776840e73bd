"""Swapping revisions under load: are all replies right, and what does a swap cost those who wait?

``stage.py`` makes the revisions and says, by plain transformers and peft, what each of them
answers. ``load.py`` asks from several threads while another one swaps, and knows no engine.
``elsewhere.py`` is the process that publishes. Each engine is a module that makes an
:class:`~benchmarks.swap.load.Engine`, which also names the ways to swap that it is compared with;
``rival.py`` measures these.
"""

"""Swapping revisions under load: are all replies right, and what does a swap cost those who wait?

``stage.py`` makes the revisions and says, by plain transformers and peft, what each of them does.
``load.py`` asks from several threads while a thread swaps, and knows no engine. Each engine is a
module with an :class:`~benchmarks.swap.load.Engine`; what it is compared with is a module, too.
"""

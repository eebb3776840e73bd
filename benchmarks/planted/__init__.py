"""Planted nights: what the shipped gate does with nights that are known to be bad, or good.

``cases.py`` says what each kind of night is, ``__main__.py`` runs them and counts the verdicts. The
parts are those of ``benchmarks/streams``.
"""

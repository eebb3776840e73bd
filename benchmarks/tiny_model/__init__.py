"""The bundled model ``tiny``: its corpus, its tokenizer, its training. Run it as a module."""

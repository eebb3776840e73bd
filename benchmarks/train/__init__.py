"""The trainer beside TRL's DPOTrainer: the same job, to the same result, in how much time.

A *job* is a folder that says everything: model, first LoRA weights, settings, token ids and their
order. An *arm* is a process that does one job and saves an adapter; the parent times processes and
never imports torch. ``python -m benchmarks.train --help`` lists what can be measured.
"""

"""Judges of a home at work: opened, calibrated by what people said, and let loose on its answers.

What a judge is, how it is asked and what its verdicts are worth is in ``prefer/judges``, which
knows no home. Here is what people do with one.
"""

from __future__ import annotations

from agentpref.judging.calibrating import Calibrating as Calibrating
from agentpref.judging.calibrating import calibrate_judge as calibrate_judge
from agentpref.judging.opened import Asking as Asking
from agentpref.judging.opened import open_judge as open_judge
from agentpref.judging.revising import RevisionRun as RevisionRun
from agentpref.judging.revising import revise as revise
from agentpref.judging.running import JudgeRun as JudgeRun
from agentpref.judging.running import judge_runs as judge_runs

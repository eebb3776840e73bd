"""Asks people the comparisons that tell most: which, in what order, and what they answered.

A person has minutes, and a log has thousands of pairs of answers. Those are asked first of which a
reward model knows least (:mod:`agentpref.elicitation.acquisition`). Nobody is asked the same twice;
some questions that others have answered are mixed in, because how far people agree says how noisy
their labels are.
"""

from agentpref.elicitation.acquisition import RULES as RULES
from agentpref.elicitation.acquisition import Rule as Rule
from agentpref.elicitation.questions import Question as Question
from agentpref.elicitation.questions import Queue as Queue
from agentpref.elicitation.questions import open_queue as open_queue

"""A reward model: how much better people would find one answer than another.

It is a few kernel regressions on the features of a frozen base, fitted on all that people and
trusted judges have said, and proven on held-out pairs. It chooses among several answers
(best-of-N), scores in the gate, and says what nobody knows yet, so that people are asked that
first.
"""

from agentpref.reward.fitting import RewardReport as RewardReport
from agentpref.reward.fitting import fit_reward as fit_reward
from agentpref.reward.kept import Shelf as Shelf
from agentpref.reward.model import RewardFollower as RewardFollower
from agentpref.reward.model import RewardModel as RewardModel
from agentpref.reward.model import Score as Score
from agentpref.reward.model import kl_of_best as kl_of_best
from agentpref.reward.model import open_reward as open_reward

"""Off-policy evaluation: what would another revision have earned on the logged traffic?

Answers were drawn from one policy and are weighed by how much likelier another one would have given
them: w = π(a|x) / π_b(a|x). All functions are pure, over arrays; whoever calls them knows where the
numbers come from (``agentpref.offpolicy``). An estimate without support is refused
(:func:`~agentpref.prove.ope.support.refusals`), and not computed with a wide interval.
"""

from agentpref.prove.ope.estimators import direct_method as direct_method
from agentpref.prove.ope.estimators import doubly_robust as doubly_robust
from agentpref.prove.ope.estimators import dr_with_shrinkage as dr_with_shrinkage
from agentpref.prove.ope.estimators import importance_weights as importance_weights
from agentpref.prove.ope.estimators import ips as ips
from agentpref.prove.ope.estimators import mixture as mixture
from agentpref.prove.ope.estimators import self_normalised_dr as self_normalised_dr
from agentpref.prove.ope.estimators import snips as snips
from agentpref.prove.ope.estimators import switch as switch
from agentpref.prove.ope.intervals import Interval as Interval
from agentpref.prove.ope.support import Support as Support
from agentpref.prove.ope.support import refusals as refusals

"""A page on which people compare answers: blind, by keyboard, one pair after the other.

It is a small web app of its own (extra ``review``): no JavaScript is needed, nothing is fetched
from elsewhere, and everything that was logged is shown as text or as Markdown that was cleaned.
Each annotator has a token, and the questions of :mod:`agentpref.elicitation`. Owners also see the
runs, the updates, the revisions and what the annotators did, and may change what serves.
"""

from agentpref_adapters.review.app import create_app as create_app
from agentpref_adapters.review.desk import Desks as Desks
from agentpref_adapters.review.office import Office as Office

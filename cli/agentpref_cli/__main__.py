"""`python -m agentpref_cli`, for where the script is not on the path."""

from agentpref_cli.main import main

main()

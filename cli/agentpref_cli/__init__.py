"""The command line of agentpref: the only code of the project that prints."""

"""What the project is measured with; a script for each claim, none of it installed."""

"""What is done to a run and to feedback before they are stored: checks, redaction, pseudonyms."""

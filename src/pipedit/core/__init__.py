"""Words that every part shares: requests, messages, spans, errors, units. Standard library only."""
